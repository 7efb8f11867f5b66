"""Payoffs of cooperative games: those of the literature, and the check of any other. Uses numpy, not JAX."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

TABLE_1 = ((1.0, 0.0), (0.0, 1.0))
TABLE_2 = ((8.0, -12.0, -12.0), (-12.0, 0.0, 0.0), (-12.0, 0.0, 0.0))

PRESETS = {
    # The left tables of the paper (section 3.1): the first has two optima, the second misleads a monotonic mix.
    "table1": TABLE_1,
    "table2": TABLE_2,
    # Claus and Boutilier 1998: next to the optimum, 11, one deviation costs 30.
    "climbing": ((11.0, -30.0, 0.0), (-30.0, 7.0, 6.0), (0.0, 0.0, 5.0)),
    # Son et al. 2019 (QTRAN, arXiv 1905.05408), table 1: the paper's table 2.
    "qtran": TABLE_2,
    # Wang et al. 2021 (QPLEX, arXiv 2008.01062): `matrix_game_1.py` and `matrix_game_3.py` of the authors' code,
    # with the values of its yamls. The second game is QTRAN's.
    "qplex_1": ((10.4, 0.0, 10.0), (0.0, 10.0, 10.0), (10.0, 10.0, 10.0)),
    "qplex_3": ((8.0, -12.0, -12.0), (-12.0, 6.0, 0.0), (-12.0, 0.0, 6.0)),
    # PyMARL2 (Hu et al. 2021, arXiv 2102.03479): the payoffs of `one_step_matrix_game.py`, with a mild and a harsh
    # punishment of the agent that plays its part of the optimum alone, and with a safe action.
    "pymarl2_mild": ((12.0, -0.1, -0.1), (-0.1, 0.0, 0.0), (-0.1, 0.0, 0.0)),
    "pymarl2_harsh": ((12.0, -12.0, -12.0), (-12.0, 0.0, 0.0), (-12.0, 0.0, 0.0)),
    "pymarl2_safe": ((12.0, 0.0, 10.0), (0.0, 0.0, 10.0), (10.0, 10.0, 10.0)),
}
"""The payoffs of the literature by name, one level of tuples per agent."""

PENALTY = re.compile(r"penalty_(-?\d+(?:\.\d+)?)")
"""The names of penalty games (Claus and Boutilier 1998): ``penalty_-100`` has the penalty -100."""

PRESET_NAMES = (*PRESETS, "penalty_K (K at most 0: penalty_-100)")
"""The names that `payoff_tensor` knows, for messages."""

MAX_AGENTS = 32
"""The limit on agents, one axis each; numpy allows 64 axes."""


def payoff_tensor(payoff: Any) -> np.ndarray:
    """Returns the payoff of every joint action, one axis per agent.

    Args:
        payoff: a name in `PRESETS`, ``penalty_K``, or a nested list of numbers, one level per agent.

    Returns:
        A float64 array with at least one axis and no empty axis; every entry is finite in float32.

    Raises:
        ValueError: if ``payoff`` is no such array; the message says what is allowed.
    """
    if isinstance(payoff, str):
        return _preset(payoff)
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


def is_preset(name: str) -> bool:
    """Returns True if ``name`` is in `PRESETS` or has the form of a penalty game's name."""
    return name in PRESETS or PENALTY.fullmatch(name) is not None


def available_actions(shape: Sequence[int]) -> np.ndarray:
    """Returns which actions each agent has, where they have different numbers of actions.

    Args:
        shape: the number of actions of each agent.

    Returns:
        ``[N, A]`` bool, with ``A`` the largest number of actions.
    """
    return np.arange(max(shape))[None] < np.asarray(shape)[:, None]


def as_tuples(nested: Any) -> Any:
    """Returns nested lists as nested tuples, which can be hashed."""
    return tuple(map(as_tuples, nested)) if isinstance(nested, list) else nested


def _preset(name: str) -> np.ndarray:
    if not is_preset(name):
        raise ValueError(f"a preset is one of {', '.join(PRESET_NAMES)}, anything else a nested list of numbers")
    if name in PRESETS:
        return np.array(PRESETS[name])
    penalty = float(name.removeprefix("penalty_"))
    if not -float(np.finfo(np.float32).max) <= penalty <= 0:
        raise ValueError("the penalty must be at most 0 and finite in float32, as in penalty_-100")
    return np.array([[10.0, 0.0, penalty], [0.0, 2.0, 0.0], [penalty, 0.0, 10.0]])


def _depth(nested: Any) -> int:
    """Counts the levels of lists, along the first entries."""
    depth = 0
    while isinstance(nested, list | tuple) and nested:
        nested, depth = nested[0], depth + 1
    return depth
