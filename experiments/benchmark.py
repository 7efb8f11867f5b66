"""How fast this machine trains: ``python -m experiments.benchmark [algo=NAME|all] [seeds=all] [KEY=VALUE] [--out F]``.

Prints one table, and with ``--out`` writes its rows as JSON, ``{"name", "value", "unit", "algo", "num_seeds"}`` each;
the first says what the machine was. Times are medians of several repetitions, after one that is not counted; compile
time stands apart. ``algo=all`` times one learner call of every algorithm and no loop; ``seeds=all`` the loop alone, for
1, 2, 4, .. seeds while they fit into the memory. Nothing else should run meanwhile.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from rich.console import Console
from rich.table import Table

from experiments.plain_learner import make_plain_learner
from wqmix_jax import load_config, make_trainer
from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.config import RunConfig, names
from wqmix_jax.errors import ConfigError, refuse
from wqmix_jax.records.run_dir import versions
from wqmix_jax.runs.memory import memory_plan
from wqmix_jax.training.compiled_loop import Trainer, TrainState, train_sharding
from wqmix_jax.training.devices import claim_cores
from wqmix_jax.training.host_loop import compile_trainer
from wqmix_jax.training.members import make_members
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import rollout
from wqmix_jax.types import Array, Episode, StepOutcome

REPETITIONS, CHUNKS = 5, 3
"""Of a call, and of the loop."""

CALLS = 4
"""Learner calls of one repetition, one after the other in a compiled loop, as a run makes them. A call by itself would
also be charged for fetching a third of a gigabyte of memory from the system and giving it back."""

MAX_SEEDS = 64
"""Of ``seeds=all``."""

MATMUL_SIZE = 4096

AUTHORS = {
    "iql": 0.31, "vdn": 0.31, "qmix": 0.40, "ow_qmix": 0.89, "cw_qmix": 0.94, "qtran": 0.52, "qplex": 0.80,
    "masac": 0.95, "maddpg": 3.1,
}  # fmt: skip
"""Seconds of the same call in the authors' code, one thread, measured for this project on another day."""


class Row(NamedTuple):
    """One measurement."""

    name: str
    value: float
    unit: str
    algo: str = ""
    num_seeds: int = 1


@command
def main() -> None:
    """Measures what the command line names and prints the table."""
    run(str(__doc__), lambda algo, overrides: [*measured(algo, overrides), peak_memory(algo)])


def run(description: str, measure: Callable[[str, list[str]], list[Row]]) -> None:
    """Measures what the command line names, prints the table and writes it where ``--out`` asks for it."""
    parser = OneLineParser(description=description)
    parser.add_argument("overrides", nargs="*", help="algo=NAME, and options of a run as for wqmix_jax.train")
    parser.add_argument("--out", type=out_file, help="where the rows go as JSON")
    args = parser.parse_args()
    claim_cores()
    try:
        rows = measure(*chosen_algorithm(args.overrides))
    except ConfigError as error:
        refuse(str(error))
    show(rows)
    if args.out is not None:
        write(args.out, rows)


def write(out: Path, rows: list[Row], **chosen: str) -> None:
    """The rows as JSON, behind one that says what the machine was and what was ``chosen``."""
    listed = [{"name": "machine", **chosen, **machine()}, *(row._asdict() for row in rows)]
    out.write_text(json.dumps(listed, indent=1) + "\n")


def peak_memory(algo: str) -> Row:
    """Of this process so far."""
    return Row("peak_memory_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "B", algo)


def chosen_algorithm(overrides: list[str]) -> tuple[str, list[str]]:
    """The algorithm, ``ow_qmix`` where none is named, and the other overrides."""
    named = [override for override in overrides if override.lstrip("+").startswith("algo=")]
    algo = named[-1].partition("=")[2] if named else "ow_qmix"
    return algo, [override for override in overrides if override not in named]


def measured(algo: str, overrides: list[str]) -> Iterator[Row]:
    """The rows that the command line asks for."""
    options = [override for override in overrides if override != "seeds=all"]
    for override in (override for override in options if override.startswith("seeds=")):
        raise ConfigError(f"{override} is not allowed: seeds=all times 1, 2, 4, .. seeds, num_seeds=N that many")
    if algo == "all" and options != overrides:
        raise ConfigError("seeds=all is not allowed with algo=all, which times no loop")
    if algo == "all":
        for name in names("algo").split(", "):
            yield from learner_rows(load_config(f"+algo={name}", *options), name)
    elif options != overrides:
        for num_seeds in (2**power for power in range(MAX_SEEDS.bit_length())):
            rows = loop_rows(
                load_config(f"+algo={algo}", *options, f"num_seeds={num_seeds}", "chunk_iterations=1"), algo
            )
            if not rows:
                return
            yield from rows
    else:
        config = load_config(f"+algo={algo}", *options)
        yield from learner_rows(config, algo)
        yield from rollout_rows(config, algo)
        yield from loop_rows(config, algo)
        yield from [row._replace(name=f"full_episodes_{row.name}") for row in loop_rows(endless(config), algo)[:1]]


def learner_rows(config: RunConfig, name: str) -> list[Row]:
    """One learner call of one seed on a batch of episodes that all last to the time limit, as a run makes it.

    And on one of shorter episodes, from a twentieth of the limit to eleven of them, 30% of it on average.
    """
    batch_size = config.algo.batch_size
    algo = dataclasses.replace(config.algo, buffer_size=batch_size)
    one_batch = dataclasses.replace(config, algo=algo)
    trainer, limit = make_trainer(one_batch, sharding=train_sharding(config, 1)), config.env.spec.episode_limit
    full = with_episodes(trainer, config, jnp.full(batch_size, limit))
    short = with_episodes(trainer, config, jnp.linspace(limit / 20, limit * 11 / 20, batch_size))
    calls = learner_calls(trainer)
    beside = counterparts(config, name)
    in_turn = [functools.partial(calls, full), functools.partial(calls, short), *beside.values()]
    seconds, short_seconds, *others = timed_in_turn(in_turn)
    # Without tiles, whose number the traced function doesn't tell.
    whole = make_trainer(one_batch, sharding=trainer.sharding, batches="whole")
    flops = matmul_flops(whole.learn, full)
    rows = [
        Row("learner_call_seconds", seconds, "s", name),
        Row("learner_call_gflop", flops / 1e9, "GFLOP", name),
        Row("learner_call_gflop_per_second", flops / 1e9 / seconds, "GFLOP/s", name),
        Row("matmul_gflop_per_second", matmul_speed() / 1e9, "GFLOP/s"),
        Row("learner_call_short_episodes_seconds", short_seconds, "s", name),
        Row("learner_call_short_episodes_vs_full", short_seconds / seconds, "of its time", name),
    ]
    for counterpart, its_seconds in zip(beside, others, strict=True):
        rows += [
            Row(f"learner_call_{counterpart}_seconds", its_seconds, "s", name),
            Row(f"learner_call_vs_{counterpart}", seconds / its_seconds, "of its time", name),
        ]
    if name in AUTHORS:
        rows.append(Row("learner_call_seconds_authors", AUTHORS[name], "s", name))
    return rows


def learner_calls(trainer: Trainer) -> Callable[[TrainState], TrainState]:
    """Learner calls of all seeds, one after another, compiled."""
    return jax.jit(lambda state: one_after_another(functools.partial(next_step, trainer), state))


def next_step(trainer: Trainer, state: TrainState) -> TrainState:
    """The state after one learner step on a batch of its own."""
    learner, _ = trainer.learn(state)
    counters = state.counters._replace(learner_steps=state.counters.learner_steps + 1)
    return state._replace(learner=learner, counters=counters)


def one_after_another(step: Callable[[Any], Any], state: Any) -> Any:
    """The state after `CALLS` steps in one compiled loop."""
    return jax.lax.scan(lambda state, _: (step(state), None), state, length=CALLS)[0]


def counterparts(config: RunConfig, name: str) -> dict[str, Callable[[], Any]]:
    """The same call of OW-QMIX in plain JAX, and in PyTorch where that is installed."""
    if name != "ow_qmix":
        return {}
    batch = full_episodes(config)
    learner, call = make_plain_learner(config.algo, batch)
    plain_calls = jax.jit(lambda learner, batch: one_after_another(lambda it: call(it, batch)[0], learner))
    calls: dict[str, Callable[[], Any]] = {"plain_jax": functools.partial(plain_calls, learner, batch)}
    with contextlib.suppress(ImportError):
        from experiments.torch_learner import make_torch_learner

        torch_call = make_torch_learner(config.algo, batch)
        calls["pytorch"] = lambda: [torch_call() for _ in range(CALLS)]
    return calls


def stored_rows(config: RunConfig, lengths: Array) -> Array:
    """A batch ``[B, row_bytes]`` as it is stored, played at random and declared to have had these lengths ``[B]``.

    What comes after an early end is zero.
    """
    algo, env, batch_size = config.algo, config.env, config.algo.batch_size
    replay = make_replay(env, buffer_size=batch_size, batch_size=batch_size)

    @jax.jit
    def play() -> Array:
        params, hp, ctx = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[None],
            (algo.init(jax.random.key(0), env.spec), hyperparams(algo), at_random()),
        )
        keys = jax.random.split(jax.random.key(1), 1)
        played = rollout(env, algo, params, hp, ctx, keys, num_envs=batch_size)
        episodes = jax.tree.map(lambda leaf: leaf[0], played.episodes)
        episodes = episodes._replace(length=lengths.astype(jnp.int32))
        return replay.add(replay.init(), episodes, jnp.bool_(True)).experience[0]

    return play()


def full_episodes(config: RunConfig) -> Episode:
    """A batch of episodes that all last to the time limit, decoded."""
    algo, env = config.algo, config.env
    replay = make_replay(env, buffer_size=algo.batch_size, batch_size=algo.batch_size)
    limit = env.spec.episode_limit
    rows = stored_rows(config, jnp.full(algo.batch_size, limit))
    return jax.jit(lambda rows: replay.decode(rows, limit))(rows)


def with_episodes(trainer: Trainer, config: RunConfig, lengths: Array, *, num_seeds: int = 1) -> TrainState:
    """Seeds at their start, the replay of each, of one batch, holding `stored_rows`."""
    state = trainer.init(range(config.seed, config.seed + num_seeds))
    rows = jnp.broadcast_to(stored_rows(config, lengths)[None, None], state.replay.experience.shape)
    experience = jax.device_put(rows, trainer.sharding)
    return state._replace(replay=state.replay.replace(experience=experience, is_full=~state.replay.is_full))


def endless(config: RunConfig) -> RunConfig:
    """The same run, where only the time limit ends an episode."""

    class Endless(type(config.env)):
        def step(self, env_state: Any, joint_action: Array, key: Any) -> tuple[Any, StepOutcome]:
            env_state, outcome = super().step(env_state, joint_action, key)
            return env_state, outcome._replace(terminated=jnp.zeros_like(outcome.terminated))

    fields = {field.name: getattr(config.env, field.name) for field in dataclasses.fields(config.env)}
    return dataclasses.replace(config, env=Endless(**fields))


def rollout_rows(config: RunConfig, name: str) -> list[Row]:
    """Playing alone: one iteration's episodes of all seeds at random."""
    algo, env, num_seeds = config.algo, config.env, config.num_seeds
    keys = jax.random.split(jax.random.key(0), num_seeds)
    params = jax.vmap(lambda key: algo.init(key, env.spec))(keys)
    hp, ctx = jax.tree.map(lambda leaf: jnp.full(num_seeds, leaf), (hyperparams(algo), at_random()))
    call = jax.jit(lambda params, keys: rollout(env, algo, params, hp, ctx, keys, num_envs=config.num_envs))
    seconds, played = timed(call, params, keys)
    steps_per_second = float(played.episodes.length.sum()) / seconds
    return [Row("rollout_env_steps_per_second", steps_per_second, "1/s", name, num_seeds)]


def loop_rows(config: RunConfig, name: str) -> list[Row]:
    """The compiled loop as a run uses it, from the first chunk in which every iteration learns.

    Nothing where the plan of its memory doesn't fit. Rates are the sum over seeds.
    """
    trainer = make_trainer(config, sharding=train_sharding(config, config.num_seeds))
    members = make_members(config.algo, config.seeds, {})
    trainer, compilation = compile_trainer(trainer, members)
    plan = memory_plan(trainer, members)
    if not plan.fits:
        return []
    state, rates = trainer.init(config.seeds), []
    while len(rates) < CHUNKS:
        before, started = int(state.counters.env_steps.sum()), time.perf_counter()
        state, record = jax.block_until_ready(trainer.train_chunk(state))
        seconds = time.perf_counter() - started
        if (record.updates > 0).all():
            rates.append((int(state.counters.env_steps.sum()) - before) / seconds)
    seconds, evaluated = timed(trainer.evaluate, state)
    evaluation_steps = float(evaluated.metrics["episode_length"].sum()) * config.eval_episodes
    rows = {
        "end_to_end_env_steps_per_second": (statistics.median(rates), "1/s"),
        "evaluation_env_steps_per_second": (evaluation_steps / seconds, "1/s"),
        "compile_seconds": (compilation.seconds, "s"),
        "replay_bytes_per_seed": (trainer.replay_bytes, "B"),
        "planned_memory_bytes": (plan.total, "B"),
    }
    return [Row(row, value, unit, name, config.num_seeds) for row, (value, unit) in rows.items()]


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


def timed_in_turn(calls: list[Callable[[], Any]]) -> list[float]:
    """The median seconds of one of the `CALLS` that each makes, in turn: what else the machine does slows all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + REPETITIONS):
        for call, its_times in zip(calls, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(call())
            its_times.append(time.perf_counter() - started)
    return [statistics.median(its_times[1:]) / CALLS for its_times in times]


def matmul_speed() -> float:
    """Floating point operations per second of a large matrix product on one device of the default backend."""
    square = jnp.ones((MATMUL_SIZE, MATMUL_SIZE))
    return 2 * MATMUL_SIZE**3 / timed(jax.jit(jnp.matmul), square, square)[0]


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating point operations of the matrix products that what a function returns depends on.

    Of each branch the longest. XLA's own count takes the body of a loop once.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _flops_of_all(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])  # XLA drops the others, too


def _flops_of_all(jaxpr: Any) -> int:
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: Any) -> int:
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "cond":
        return max(_flops_of_all(branch.jaxpr) for branch in params["branches"])
    inside = (getattr(value, "jaxpr", value) for value in params.values())
    times = params.get("length", 1) * (params["mesh"].size if "mesh" in params else 1)
    return times * sum(_flops_of_all(jaxpr) for jaxpr in inside if hasattr(jaxpr, "eqns"))


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    devices = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    return {"cpu": cpu, "cores": os.cpu_count(), "devices": devices, "versions": versions()}


def show(rows: list[Row]) -> None:
    """The table; rates are the sum over seeds."""
    device = jax.devices()[0]
    title = f"jax {jax.__version__}, {device.device_kind} x {jax.device_count()}"
    table = Table("measurement", "algorithm", "seeds", "value", "unit", title=title)
    for row in rows:
        value = f"{row.value:,.3f}" if row.value < 1000 else f"{row.value:,.0f}"
        table.add_row(row.name, row.algo, str(row.num_seeds), value, row.unit)
    Console().print(table)


if __name__ == "__main__":
    main()
