"""How fast this machine trains: ``python -m experiments.benchmark [algo=NAME|all] [key=value ..] [--out FILE]``.

Prints one table, and with ``--out`` writes it as a JSON list of ``{"name", "algo", "value", "unit"}`` rows. Times are
medians of several repetitions, after one that is not counted; compile time stands apart. ``algo=all`` times one learner
call of every algorithm and no loop. Nothing else should run meanwhile.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from wqmix_jax import load_config, make_trainer
from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.config import RunConfig
from wqmix_jax.devices import claim_cores
from wqmix_jax.learner import init_learner, learner_step
from wqmix_jax.replay import make_replay
from wqmix_jax.rollout import rollout
from wqmix_jax.train import names
from wqmix_jax.trainer import train_sharding
from wqmix_jax.types import Episode

REPETITIONS = 5

AUTHORS = {
    "iql": 0.31, "vdn": 0.31, "qmix": 0.40, "ow_qmix": 0.89, "cw_qmix": 0.94, "qtran": 0.52, "qplex": 0.80,
    "masac": 0.95, "maddpg": 3.1,
}  # fmt: skip
"""Seconds of the same call in the authors' code, one thread, measured for this project on another day."""


class Row(NamedTuple):
    """One measurement."""

    name: str
    algo: str
    value: float
    unit: str


def main() -> None:
    """Measures what the command line names and prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("overrides", nargs="*", help="options of a run, as for wqmix_jax.train")
    parser.add_argument("--out", type=Path, help="where the rows go as JSON")
    args = parser.parse_args()
    algo, overrides = chosen_algorithm(args.overrides)
    claim_cores()
    if algo == "all":
        configs = {name: load_config(f"+algo={name}", *overrides) for name in names("algo").split(", ")}
        rows = [row for name, config in configs.items() for row in learner_rows(config, name)]
    else:
        config = load_config(f"+algo={algo}", *overrides)
        rows = [*learner_rows(config, algo), *rollout_rows(config, algo), *loop_rows(config, algo)]
    show(rows)
    if args.out is not None:
        args.out.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


def chosen_algorithm(overrides: list[str]) -> tuple[str, list[str]]:
    """The algorithm, ``ow_qmix`` where none is named, and the other overrides."""
    named = [override for override in overrides if override.lstrip("+").startswith("algo=")]
    algo = named[-1].partition("=")[2] if named else "ow_qmix"
    return algo, [override for override in overrides if override not in named]


def learner_rows(config: RunConfig, name: str) -> list[Row]:
    """One learner call of one seed on a batch of episodes that all last to the time limit, on one device."""
    algo, hp = config.algo, hyperparams(config.algo)
    learner = init_learner(algo.init(jax.random.key(0), config.env.spec))

    def call(learner: Any, batch: Episode) -> Any:
        return learner_step(algo, learner, batch, hp, at_random(), jax.random.key(0))

    batch = full_episodes(config)
    seconds, _ = timed(jax.jit(call), learner, batch)
    rows = [Row("learner_call_seconds", name, seconds, "s")]
    return rows + [Row("learner_call_seconds_authors", name, AUTHORS[name], "s")] * (name in AUTHORS)


def full_episodes(config: RunConfig) -> Episode:
    """A batch played at random and declared to have lasted to the limit: what comes after an early end is zero."""
    algo, env, batch_size = config.algo, config.env, config.algo.batch_size
    replay = make_replay(env, buffer_size=batch_size, batch_size=batch_size)

    @jax.jit
    def play() -> Episode:
        params, hp, ctx = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[None],
            (algo.init(jax.random.key(0), env.spec), hyperparams(algo), at_random()),
        )
        keys = jax.random.split(jax.random.key(1), 1)
        played = rollout(env, algo, params, hp, ctx, keys, num_envs=batch_size)
        episodes = jax.tree.map(lambda leaf: leaf[0], played.episodes)
        episodes = episodes._replace(length=jnp.full_like(episodes.length, env.spec.episode_limit))
        rows = replay.add(replay.init(), episodes, jnp.bool_(True)).experience[0]
        return replay.decode(rows, env.spec.episode_limit)

    return play()


def rollout_rows(config: RunConfig, name: str) -> list[Row]:
    """Playing alone: one iteration's episodes of all seeds at random."""
    algo, env, num_seeds = config.algo, config.env, config.num_seeds
    keys = jax.random.split(jax.random.key(0), num_seeds)
    params = jax.vmap(lambda key: algo.init(key, env.spec))(keys)
    hp, ctx = jax.tree.map(lambda leaf: jnp.full(num_seeds, leaf), (hyperparams(algo), at_random()))
    call = jax.jit(lambda params, keys: rollout(env, algo, params, hp, ctx, keys, num_envs=config.num_envs))
    seconds, played = timed(call, params, keys)
    return [Row("rollout_env_steps_per_second", name, float(played.episodes.length.sum()) / seconds, "1/s")]


def loop_rows(config: RunConfig, name: str) -> list[Row]:
    """The compiled loop as a run uses it, from the first chunk in which every iteration learns."""
    trainer = make_trainer(config, sharding=train_sharding(config, config.num_seeds))
    state = trainer.init(range(config.seed, config.seed + config.num_seeds))
    started = time.perf_counter()
    train_chunk = trainer.train_chunk.lower(state).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - started
    started = time.perf_counter()
    trainer.evaluate.lower(state).compile()  # type: ignore[attr-defined]
    evaluation_seconds = time.perf_counter() - started
    rates = []
    while len(rates) < REPETITIONS:
        before, started = int(state.counters.env_steps.sum()), time.perf_counter()
        state, record = jax.block_until_ready(train_chunk(state))
        seconds = time.perf_counter() - started
        if (record.updates > 0).all():
            rates.append((int(state.counters.env_steps.sum()) - before) / seconds)
    return [
        Row("end_to_end_env_steps_per_second", name, statistics.median(rates), "1/s"),
        Row("compile_seconds", name, compile_seconds, "s"),
        Row("evaluation_compile_seconds", name, evaluation_seconds, "s"),
        Row("replay_bytes_per_seed", name, trainer.replay_bytes, "B"),
    ]


def at_random() -> Context:
    """The beginning of training: epsilon is 1."""
    return Context(epsilon=jnp.float32(1), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))


def timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """The median seconds of a call that is compiled first, and what it returns."""
    result, times = jax.block_until_ready(call(*args)), []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        result = jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def show(rows: list[Row]) -> None:
    """The table; rates are the sum over seeds."""
    device = jax.devices()[0]
    title = f"jax {jax.__version__}, {device.device_kind} x {jax.device_count()}"
    table = Table("measurement", "algorithm", "value", "unit", title=title)
    for row in rows:
        value = f"{row.value:,.3f}" if row.value < 1000 else f"{row.value:,.0f}"
        table.add_row(row.name, row.algo, value, row.unit)
    Console().print(table)


if __name__ == "__main__":
    main()
