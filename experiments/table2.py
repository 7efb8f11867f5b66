"""The algorithms on the game of the paper's Table 2, or on other matrix games of the literature.

``python -m experiments.table2 [ALGO ..] [--games GAME ..] [--seeds N] [--out FILE]`` trains all seeds of an
algorithm in one call, with random actions throughout. A seed is right if its greedy joint action has the best payoff.
"""

import json
import time
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from wqmix_jax import load_config, train_seeds
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count, out_file
from wqmix_jax.config import RunConfig, names
from wqmix_jax.envs.matrix_game import MatrixGame
from wqmix_jax.envs.payoffs import payoff_tensor
from wqmix_jax.errors import ConfigError, refuse

OVERRIDES = (
    "env=matrix_game",
    "algo.batch_size=64",
    "algo.buffer_size=500",
    "num_envs=8",
    "total_env_steps=10000",
    "eval_interval=2000",
    "eval_episodes=1",
    "chunk_iterations=250",
)

OWN = {"powqmix": ("algo.no_weighted_steps=0",)}
"""Options of single algorithms: POWQMIX's weights would otherwise start after the end of the run."""


@command
def main() -> None:
    """Trains each algorithm on each game and prints one table."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("algos", nargs="*", default=names("algo").split(", "), help="by default all of them")
    parser.add_argument("--games", nargs="+", default=["table2"], help="values of env.payoff; default: table2")
    parser.add_argument("--seeds", type=count, default=10, help="number of seeds; default: 10")
    parser.add_argument("--out", type=out_file, help="a file for the rows, one JSON object per line")
    args = parser.parse_args()
    tasks = [(game, algo) for game in args.games for algo in args.algos]
    try:
        for task in tasks:
            config_of(*task)  # raises for an unknown name before anything is trained
    except ConfigError as error:
        refuse(str(error))
    rows = []
    for task in tasks:
        rows.append(train(*task, args.seeds))
        if args.out is not None:  # after each algorithm, so that an interrupted command keeps its rows
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table("game", "algorithm", f"right of {args.seeds} seeds", "greedy payoffs", "seconds with compilation")
    for row in rows:
        payoffs = ", ".join(f"{payoff:g}" for payoff in row["payoffs"])
        table.add_row(row["game"], row["algo"], str(row["right"]), payoffs, f"{row['seconds']:.0f}")
    Console().print(table)


def train(game: str, algo: str, num_seeds: int) -> dict[str, Any]:
    """Trains some seeds of one algorithm, and returns the payoff of each seed's final greedy joint action."""
    started = time.perf_counter()
    config = config_of(game, algo)
    _, records = train_seeds(config, range(num_seeds))
    last = {record["seed"]: record["episode_return"] for record in records if record["kind"] == "eval"}
    payoffs = [last[seed] for seed in range(num_seeds)]
    best = np.float32(payoff_tensor(cast(MatrixGame, config.env).payoff).max())  # returns are float32
    right = sum(payoff == best for payoff in payoffs)
    seconds = round(time.perf_counter() - started, 1)
    return {"game": game, "algo": algo, "right": int(right), "payoffs": payoffs, "seconds": seconds}


def config_of(game: str, algo: str) -> RunConfig:
    """Returns the options of an algorithm's run on a game.

    Raises:
        ConfigError: if there is no such game or algorithm.
    """
    overrides = [f"+algo={algo}", f"env.payoff={game}", *OVERRIDES, *exploration(algo), *OWN.get(algo, ())]
    if load_config(f"+algo={algo}").algo.is_on_policy:  # its replay is what it has just played
        overrides = [text for text in overrides if not text.startswith(("algo.batch_size=", "algo.buffer_size="))]
    return load_config(*overrides)


def exploration(algo: str) -> tuple[str, str]:
    """Returns options for random play; 0.5 where epsilon is the floor of a policy, since 1 stops learning."""
    epsilon = 0.5 if algo in ("masac", "coma", "liir") else 1.0
    return f"algo.epsilon_start={epsilon}", f"algo.epsilon_finish={epsilon}"


if __name__ == "__main__":
    main()
