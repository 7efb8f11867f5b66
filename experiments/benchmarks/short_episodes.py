"""The cost of short episodes: ``python -m experiments.short_episodes [algo=NAME] [KEY=VALUE ..] [--out F]``.

Times learner calls on batches of chosen lengths, in turn: with all padding, cut to the longest episode (as on a GPU),
and packed (as on a CPU); see `wqmix_jax.training.batch_gradients.make_batching`. Seconds are one
seed's share of a call of all ``num_seeds``. No other program should run at the same time.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp

from experiments.benchmarks.benchmark import Row, learner_calls, one_batch_config, run, timed_in_turn, with_episodes
from wqmix_jax import load_config, make_trainer
from wqmix_jax.cli.command import command
from wqmix_jax.config import RunConfig
from wqmix_jax.training.batch_gradients import Batches
from wqmix_jax.training.compiled_loop import train_sharding
from wqmix_jax.types import Array


@command
def main() -> None:
    """Times the calls, prints the table and writes it."""
    run(str(__doc__), lambda algo, overrides: measured(load_config(f"+algo={algo}", *overrides), algo))


def batch_lengths(config: RunConfig) -> dict[str, Array]:
    """Returns lengths ``[B]`` by name: as at the start of training, and after agents have learned to end earlier."""
    limit, size = config.env.spec.episode_limit, config.algo.batch_size
    spread = jnp.linspace(0.2, 1, size) ** 2  # a few long ones, many short ones
    return {
        "all to the limit": jnp.full(size, limit),
        "a fifth to the limit, the others to 0.7 of it": jnp.where(jnp.arange(size) % 5 == 0, 1.0, 0.7 * spread)
        * limit,
        "to 0.7 of the limit": 0.7 * spread * limit,
        "to a quarter of the limit": 0.25 * spread * limit,
    }


def measured(config: RunConfig, name: str) -> list[Row]:
    """Times every treatment of padding on every batch."""
    one_batch = one_batch_config(config)
    cases: dict[tuple[str, str], Callable[[], Any]] = {}
    for way in get_args(Batches):
        trainer = make_trainer(one_batch, sharding=train_sharding(config, config.num_seeds), batches=way)
        states = {
            lengths: with_episodes(trainer, config, steps, num_seeds=config.num_seeds)
            for lengths, steps in batch_lengths(config).items()
        }
        calls = learner_calls(trainer)
        cases |= {(lengths, way): functools.partial(calls, state) for lengths, state in states.items()}
    times = dict(zip(cases, timed_in_turn(list(cases.values())), strict=True))
    return [
        Row(
            f"{lengths}, {float(steps.astype(int).mean()):.0f} steps on average: {way}",
            times[lengths, way] / config.num_seeds,
            "s",
            name,
            config.num_seeds,
        )
        for lengths, steps in batch_lengths(config).items()
        for way in get_args(Batches)
    ]


if __name__ == "__main__":
    main()
