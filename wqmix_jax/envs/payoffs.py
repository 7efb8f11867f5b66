"""Payoffs of cooperative games of one step: those of the paper, and the check of any other. Uses numpy, not JAX."""

from typing import Any

import numpy as np

PRESETS = {
    "table1": ((1.0, 0.0), (0.0, 1.0)),
    "table2": ((8.0, -12.0, -12.0), (-12.0, 0.0, 0.0), (-12.0, 0.0, 0.0)),
}
"""The left tables of the paper: the first has two optima, the second misleads a monotonic mix (Son et al. 2019)."""

MAX_AGENTS = 32
"""The limit on agents, one axis each; numpy allows 64 axes."""


def payoff_tensor(payoff: Any) -> np.ndarray:
    """Returns the payoff of every joint action, one axis per agent.

    Args:
        payoff: a name in `PRESETS`, or a nested list of numbers, one level per agent.

    Returns:
        A float64 array with at least one axis and no empty axis; every entry is finite in float32.

    Raises:
        ValueError: if ``payoff`` is no such array; the message says what is allowed.
    """
    if isinstance(payoff, str):
        if payoff not in PRESETS:
            raise ValueError(f"a preset is one of {', '.join(PRESETS)}, anything else a nested list of numbers")
        return np.array(PRESETS[payoff])
    if _depth(payoff) > MAX_AGENTS:
        raise ValueError(f"at most {MAX_AGENTS} agents, one level of lists each, are possible")
    try:
        table = np.asarray(payoff)
    except ValueError:
        raise ValueError("lists on the same level must be equally long") from None
    if table.dtype.kind not in "iuf":
        raise ValueError("a payoff is a preset's name or a nested list of numbers")
    if table.ndim == 0 or table.size == 0:
        raise ValueError("at least one agent and one action are needed")
    if not (np.abs(table) <= np.finfo(np.float32).max).all():
        raise ValueError("each payoff must be finite in float32")
    return table.astype(float)


def _depth(nested: Any) -> int:
    """Counts the levels of lists, along the first entries."""
    depth = 0
    while isinstance(nested, list | tuple) and nested:
        nested, depth = nested[0], depth + 1
    return depth
