"""Exact projections on random games: ``python -m experiments.tabular.exact [--games N]``.

Gaussian payoffs, 2 agents with 3 actions; each weighting of the paper with each alpha, and QMIX's uniform one.
"""

import numpy as np

from experiments.tabular.games import FOLDER, Share, random_games, write
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count, out_file
from wqmix_jax.tabular import PracticalCentral, Weighting, project
from wqmix_jax.tabular.claims import argmax_is_right, greedy_is_right

ALPHAS = (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-6)
NAMES = ("central", "optimistic", "practical_central")


@command
def main() -> None:
    """Projects all games, prints the shares and writes them."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--games", type=count, default=500)
    parser.add_argument("--out", type=out_file, default=FOLDER / "exact.jsonl")
    args = parser.parse_args()
    games = random_games(args.games)
    shares = [share(games, "uniform", 1.0)]
    shares += [share(games, name, alpha) for name in NAMES for alpha in ALPHAS]
    for each in shares:
        print(f"{each.name:18} alpha {each.alpha:<8g} argmax {each.argmax:.3f}  greedy {each.greedy:.3f}")
    write(args.out, shares)


def share(games: np.ndarray, name: str, alpha: float) -> Share:
    """Projects all games with one weighting and one alpha."""
    weighting: Weighting = PracticalCentral(alpha) if name == "practical_central" else name
    projections = [project(q, weighting=weighting, alpha=alpha) for q in games]
    right = [(argmax_is_right(q, each), greedy_is_right(q, each)) for q, each in zip(games, projections, strict=True)]
    argmax, greedy = np.mean(right, axis=0)
    return Share(name, alpha, round(float(argmax), 4), round(float(greedy), 4), len(games))


if __name__ == "__main__":
    main()
