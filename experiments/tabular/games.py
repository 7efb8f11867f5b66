"""The random games that the exact and the deep runs share, and the file that their results go to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_AGENTS, NUM_ACTIONS = 2, 3
SEED = 0
FOLDER = Path(__file__).parent


class Share(NamedTuple):
    """How often one algorithm or weighting was right.

    Attributes:
        name: ``uniform`` and so on for exact projections, an algorithm's name for trained ones.
        alpha: its alpha; 1 without a weighting.
        argmax: share of games whose argmax set holds the optimum.
        greedy: share of games in which the agents play the optimum.
        games: how many games.
    """

    name: str
    alpha: float
    argmax: float
    greedy: float
    games: int


def random_games(num_games: int) -> np.ndarray:
    """Standard normal payoffs, ``[num_games, 3, 3]``; the first are the same whatever the number."""
    return np.random.default_rng(SEED).normal(size=(num_games, *(NUM_ACTIONS,) * NUM_AGENTS))


def write(path: Path, shares: Sequence[Share]) -> None:
    path.write_text("".join(json.dumps(share._asdict()) + "\n" for share in shares))


def read(path: Path) -> list[Share]:
    return [Share(**json.loads(line)) for line in path.read_text().splitlines()]
