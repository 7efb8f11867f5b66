"""The algorithms on the game of the paper's Table 2: ``python -m experiments.table2 [ALGO ..] [--out FILE]``.

Ten seeds of each algorithm train in one call, with random actions throughout. A seed is right if its greedy joint
action has the optimal payoff, 8.
"""

import json
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from wqmix_jax import load_config, train_seeds
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.config import RunConfig, names
from wqmix_jax.errors import ConfigError, refuse

NUM_SEEDS = 10
OPTIMUM = 8.0
OVERRIDES = (
    "env=matrix_game",
    "env.payoff=table2",
    "algo.batch_size=64",
    "algo.buffer_size=500",
    "num_envs=8",
    "total_env_steps=10000",
    "eval_interval=2000",
    "eval_episodes=1",
    "chunk_iterations=250",
)


@command
def main() -> None:
    """Trains each algorithm and prints one table."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("algos", nargs="*", default=names("algo").split(", "), help="by default all of them")
    parser.add_argument("--out", type=out_file, help="a file for the rows, one JSON object per line")
    args = parser.parse_args()
    try:
        for algo in args.algos:
            config_of(algo)  # raises for an unknown name before anything is trained
    except ConfigError as error:
        refuse(str(error))
    rows = []
    for algo in args.algos:
        rows.append(train(algo))
        if args.out is not None:  # after each algorithm, so that an interrupted command keeps its rows
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Table("algorithm", "right of 10 seeds", "greedy payoffs", "seconds with compilation")
    for row in rows:
        payoffs = ", ".join(f"{payoff:g}" for payoff in row["payoffs"])
        table.add_row(row["algo"], str(row["right"]), payoffs, f"{row['seconds']:.0f}")
    Console().print(table)


def train(algo: str) -> dict[str, Any]:
    """Trains ten seeds of one algorithm, and returns the payoff of each seed's final greedy joint action."""
    started = time.perf_counter()
    _, records = train_seeds(config_of(algo), range(NUM_SEEDS))
    last = {record["seed"]: record["episode_return"] for record in records if record["kind"] == "eval"}
    payoffs = [last[seed] for seed in range(NUM_SEEDS)]
    right = sum(payoff == OPTIMUM for payoff in payoffs)
    return {"algo": algo, "right": right, "payoffs": payoffs, "seconds": round(time.perf_counter() - started, 1)}


def config_of(algo: str) -> RunConfig:
    """Returns the options of an algorithm's run.

    Raises:
        ConfigError: if there is no such algorithm.
    """
    return load_config(f"+algo={algo}", *OVERRIDES, *exploration(algo))


def exploration(algo: str) -> tuple[str, str]:
    """Returns options for random play; MASAC gets 0.5, since its epsilon is its policy's floor and 1 stops learning."""
    epsilon = 0.5 if algo == "masac" else 1.0
    return f"algo.epsilon_start={epsilon}", f"algo.epsilon_finish={epsilon}"


if __name__ == "__main__":
    main()
