"""The random games that the exact and the deep runs share, and the format of their results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_AGENTS, NUM_ACTIONS = 2, 3
SEED = 0
FOLDER = Path(__file__).parent


class Share(NamedTuple):
    """The share of games on which one algorithm or weighting was right.

    Attributes:
        name: a weighting (``uniform``, ..) for exact projections, an algorithm's name for trained networks.
        alpha: its alpha; 1 if it has no weighting.
        argmax: share of games whose argmax set holds the optimum.
        greedy: share of games in which the agents play the optimum.
        games: the number of games.
    """

    name: str
    alpha: float
    argmax: float
    greedy: float
    games: int


def random_games(num_games: int) -> np.ndarray:
    """Returns standard normal payoffs, ``[num_games, 3, 3]``; the first ones don't depend on the number."""
    return np.random.default_rng(SEED).normal(size=(num_games, *(NUM_ACTIONS,) * NUM_AGENTS))


def write(path: Path, shares: Sequence[Share]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(share._asdict()) + "\n" for share in shares))


def read(path: Path) -> list[Share]:
    """Reads a file that `write` wrote."""
    return [Share(**json.loads(line)) for line in path.read_text().splitlines()]
