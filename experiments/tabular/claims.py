"""The statistics behind the README's findings: ``python -m experiments.tabular.claims [--games N]``.

They cover many Gaussian 3 x 3 games, the operators, and games with more actions. For a single payoff table use
``python -m wqmix_jax.tabular``.
"""

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.tabular.games import random_games
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count
from wqmix_jax.tabular import PracticalCentral, Weighting, project
from wqmix_jax.tabular.claims import (
    argmax_is_right,
    followed_policy,
    greedy_is_right,
    largest_alpha,
    proof_alpha,
    stable_policies,
    with_zero_actions,
)
from wqmix_jax.tabular.operators import qmix, restarts, two_steps, weighted

TIED = np.array([[2.0, -10], [0, 1]])
SMALL_ALPHA = 1e-6
EPSILONS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@command
def main() -> None:
    """Computes all statistics and prints their tables."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--games", type=count, default=150)
    parser.add_argument(
        "--policy-games", type=count, default=40, help="the number of games for epsilon-greedy behaviour"
    )
    args = parser.parse_args()
    games = random_games(args.games)
    show("Gaussian 3 x 3 games", ("weighting", "alpha", "argmax set right", "greedy right", "games"), shares(games))
    show("Table 2 with k zero actions: least losses", ("k", "optimum on top", "(1,1) on top", "right"), zero_actions())
    show(
        "The alpha of the proofs, and the largest that works",
        ("game", "weighting", "proof", "argmax", "greedy"),
        alphas(),
    )
    show(
        "Value of the state before a game (discount 0.9)",
        ("game", "operator", "values over 20 draws", "optimal"),
        values(),
    )
    behaviour = policies(games[: args.policy_games])
    show(
        "Epsilon-greedy behaviour",
        ("epsilon", "optimum stable", "wrong stable", "ends on the optimum", "circles"),
        behaviour,
    )


def show(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    """Prints a table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(table)


def shares(games: np.ndarray) -> Iterable[tuple[object, ...]]:
    """Yields each weighting's number of games with the optimum in the argmax set, and with agents that play it."""
    weightings: dict[str, Weighting] = {
        "uniform": "uniform",
        "central": "central",
        "optimistic": "optimistic",
        "practical central (eq. 10)": PracticalCentral(SMALL_ALPHA),
    }
    for name, weighting in weightings.items():
        found = [(q, project(q, weighting=weighting, alpha=SMALL_ALPHA)) for q in games]
        right = [sum(is_right(*each) for each in found) for is_right in (argmax_is_right, greedy_is_right)]
        yield name, "-" if name == "uniform" else SMALL_ALPHA, *right, len(games)


def zero_actions() -> Iterable[tuple[object, ...]]:
    """Yields losses of the exact unweighted projection with more and more zero actions, until it fails."""
    for k in (1, 2, 3, 4):
        q = with_zero_actions(k)
        yield k, project(q, greedy=(0, 0)).loss, project(q, greedy=(1, 1)).loss, greedy_is_right(q, project(q))


def alphas() -> Iterable[tuple[object, ...]]:
    """Yields the proofs' alpha and the largest that works, for several games."""
    named = {"table 2": with_zero_actions(2), "table 2, 3 zero actions": with_zero_actions(3), "tied": TIED}
    named |= {f"lead {lead:g}": np.array([[3, 8 + lead, 8], [2, -7, 5]]) for lead in (0.1, 0.01, 0.001)}
    for name, q in named.items():
        for weighting in ("central", "optimistic"):
            yield name, weighting, proof_alpha(q), *(largest_alpha(q, weighting, works) or "none" for works in RIGHT)


RIGHT = (argmax_is_right, greedy_is_right)


def values() -> Iterable[tuple[object, ...]]:
    """Yields fixed points over restarts, each with independent draws among minimisers and maxima."""
    operators = {
        "T*_Qmix": (qmix, {}),
        "T*_w, w = 1": (weighted, {"weighting": "uniform"}),
        "T*_w, optimistic 0.001": (weighted, {"weighting": "optimistic", "alpha": 1e-3}),
        "the same, any maximum": (weighted, {"weighting": "optimistic", "alpha": 1e-3, "plays": "argmax"}),
        "T*_w, eq. 10, 0.001": (weighted, {"weighting": PracticalCentral(1e-3)}),
    }
    for game, payoff in (("table 1", np.eye(2)), ("tied", TIED)):
        for name, (operator, how) in operators.items():
            traces = restarts(operator, two_steps(payoff, 0.9), num_restarts=20, **how)
            ends = sorted({round(float(trace.fixed_point[0].flat[0]), 6) for trace in traces})
            yield game, name, ", ".join(f"{end:g}" for end in ends), 0.9 * payoff.max()


def policies(games: np.ndarray) -> Iterable[tuple[object, ...]]:
    """Yields statistics on MAVEN's claim (section 6): QMIX trained on its own epsilon-greedy behaviour."""
    best = [tuple(int(action) for action in np.unravel_index(q.argmax(), q.shape)) for q in games]
    for epsilon in EPSILONS:
        stable = [stable_policies(q, epsilon) for q in games]
        ends = [[followed_policy(q, epsilon, start) for start in np.ndindex(q.shape)] for q in games]
        yield (
            epsilon,
            float(np.mean([optimum in each for each, optimum in zip(stable, best, strict=True)])),
            float(np.mean([bool(each - {optimum}) for each, optimum in zip(stable, best, strict=True)])),
            float(np.mean([[end == optimum for end in each] for each, optimum in zip(ends, best, strict=True)])),
            float(np.mean([[end is None for end in each] for each in ends])),
        )


if __name__ == "__main__":
    main()
