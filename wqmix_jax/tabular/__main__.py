"""The command ``python -m wqmix_jax.tabular NAME|PAYOFF.json [--weighting NAME] [--alpha A] [--json]``.

It prints a payoff and its projections next to each other, as the paper's tables do. Errors in its arguments are
reported in one line on stderr, with exit code 2.
"""

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, integer
from wqmix_jax.envs.payoffs import PRESET_NAMES, is_preset, payoff_tensor
from wqmix_jax.tabular.projection import Projection, project
from wqmix_jax.tabular.search import MAX_ORDERINGS, is_enumerable, num_orderings
from wqmix_jax.tabular.weightings import NAMES, checked_alpha

DEFAULT_ALPHA = 0.1
"""The paper's value on predator-prey."""

MAX_BYTES = 1_000_000
"""Larger payoff files are not read."""

MAX_SHOWN = 8
"""The most minimisers that are printed; ``--json`` prints all of them."""

_MAX_DENOMINATOR = 30
"""Numbers within rounding of a fraction with a denominator up to this are printed as one."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        alpha = _alpha(args)
        payoff = read_payoff(args.payoff)
        greedy = None if args.greedy is None else tuple(args.greedy)
        projection = project(payoff, weighting=args.weighting, alpha=alpha, greedy=greedy)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(as_json(projection)) if args.json else as_text(payoff, projection))


def read_payoff(name: str) -> np.ndarray:
    """Reads the payoff from a preset's name or a JSON file.

    Raises:
        ValueError: if it is no payoff, or the game has too many orderings to enumerate.
    """
    payoff = payoff_tensor(name) if is_preset(name) else _from_file(Path(name))
    shape = " x ".join(str(length) for length in payoff.shape)
    if num_orderings(payoff.shape) > MAX_ORDERINGS:
        raise ValueError(
            f"{name} has {shape} actions, which is too many: at most {MAX_ORDERINGS:,} orderings are tried"
        )
    if not is_enumerable(payoff.shape):
        raise ValueError(f"{name} has {shape} joint actions, which is too many; 3 x 3 x 3 and 6 x 6 are possible")
    return payoff


def as_json(projection: Projection) -> dict[str, Any]:
    """Converts a projection to plain types, for ``--json``."""
    return {
        "q_tot": projection.q_tot.tolist(),
        "loss": projection.loss,
        "argmax_set": sorted(list(each) for each in projection.argmax_set),
        "decentralised_greedy": list(projection.decentralised_greedy),
        "minimisers": [each.tolist() for each in projection.minimisers],
        "unique": projection.unique,
    }


def as_text(payoff: np.ndarray, projection: Projection) -> str:
    """Formats the payoff and the minimisers next to each other, followed by their loss, number and greedy actions."""
    shown = projection.minimisers[:MAX_SHOWN]
    names = ["Q", *("Q_tot" if len(shown) == 1 else f"Q_tot {index}" for index in range(1, len(shown) + 1))]
    lines = _side_by_side(names, [payoff, *shown])
    if len(projection.minimisers) > len(shown):
        lines.append(f"and {len(projection.minimisers) - len(shown)} more")
    several = "" if len(shown) == 1 else "of Q_tot 1: "
    lines += [
        "",
        f"loss                  {_number(projection.loss)}",
        f"minimisers            {_count(projection)}",
        f"argmax of Q           {_actions(np.argwhere(payoff == payoff.max()))}",
        f"argmax of Q_tot       {several}{_actions(sorted(projection.argmax_set))}",
        f"decentralised greedy  {several}{_actions([projection.decentralised_greedy])}, "
        f"worth {_number(payoff[projection.decentralised_greedy])}",
    ]
    return "\n".join(lines)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m wqmix_jax.tabular", description="Projects a payoff as QMIX or Weighted QMIX do."
    )
    parser.add_argument("payoff", help=f"{', '.join(PRESET_NAMES)}, or a JSON file: a nested list, one axis per agent")
    parser.add_argument("--weighting", choices=NAMES, default="uniform", help="w(u); uniform by default")
    parser.add_argument("--alpha", type=float, help=f"in (0, 1], {DEFAULT_ALPHA} by default; not with uniform weights")
    parser.add_argument("--greedy", type=integer, nargs="+", help="only tables with these as the agents' top actions")
    parser.add_argument("--json", action="store_true", help="prints one JSON object")
    return parser


def _alpha(args: argparse.Namespace) -> float:
    if args.alpha is None:
        return DEFAULT_ALPHA
    if args.weighting == "uniform":
        others = " or ".join(NAMES[1:])
        raise ValueError(f"alpha={args.alpha} is not allowed: the weighting is uniform; name {others} with --weighting")
    return checked_alpha(args.alpha)


def _from_file(path: Path) -> np.ndarray:
    try:
        payoff = json.loads(_text(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: one level per agent is needed") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(payoff, str):
        raise ValueError(f"{path} is not allowed: a nested list of numbers is needed")
    try:
        return payoff_tensor(payoff)
    except ValueError as error:
        raise ValueError(f"{path} is not allowed: {error}") from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} is too large: at most {MAX_BYTES:,} bytes are read")
        return path.read_text()
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: name {', '.join(PRESET_NAMES)} or a JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _side_by_side(names: Sequence[str], tables: Sequence[np.ndarray]) -> list[str]:
    """Formats tables of the last two agents in a row; one such row for each joint action of the other agents."""
    lines = []
    tables = [np.atleast_2d(table) for table in tables]
    for leading in np.ndindex(tables[0].shape[:-2]):
        others = "".join(f"{action}, " for action in leading)
        heading = [f"{name}({others}.., ..)" if leading else name for name in names]
        cells = [[[_number(value) for value in row] for row in table[leading]] for table in tables]
        blocks = [_block(name, rows) for name, rows in zip(heading, cells, strict=True)]
        lines += ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)] + [""]
    return lines[:-1]


def _block(heading: str, rows: list[list[str]]) -> list[str]:
    width = max(len(cell) for row in rows for cell in row)
    lines = [heading, *("  ".join(cell.rjust(width) for cell in row) for row in rows)]
    return [line.ljust(max(map(len, lines))) for line in lines]


def _count(projection: Projection) -> str:
    if projection.unique:
        return "1"
    return "a continuum, of which one is shown" if len(projection.minimisers) == 1 else str(len(projection.minimisers))


def _actions(joint_actions: Any) -> str:
    return " ".join(f"({','.join(str(int(action)) for action in each)})" for each in joint_actions)


def _number(value: float) -> str:
    """Formats a number as an integer, a simple fraction as the paper prints them, or with five digits."""
    near = Fraction(float(value)).limit_denominator(_MAX_DENOMINATOR)
    if abs(float(near) - value) <= 1e-9 * max(1.0, abs(value)):
        return str(near)
    return f"{value:.5g}"


if __name__ == "__main__":
    main()
