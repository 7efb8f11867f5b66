"""Speed on this machine: ``python -m experiments.benchmark [algo=NAME|all] [seeds=all] [KEY=VALUE] [--out F]``.

Prints one table, and with ``--out`` writes its rows as JSON, ``{"name", "value", "unit", "algo", "num_seeds"}`` each,
after a row that describes the machine. Times are medians of several repetitions, after one that is not counted; compile
time has its own row. ``algo=all`` times one learner call of every algorithm and no loop; ``seeds=all`` only the loop,
for 1, 2, 4, .. seeds while they fit into the memory. No other program should run at the same time.
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

from experiments.benchmarks.plain_learner import make_plain_learner
from wqmix_jax import load_config, make_trainer
from wqmix_jax.algos.base import Context, hyperparams, latent_template
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.config import RunConfig, names
from wqmix_jax.errors import ConfigError, refuse
from wqmix_jax.records.run_dir import versions
from wqmix_jax.runs.memory import memory_plan
from wqmix_jax.training.compiled_loop import Trainer, TrainState, compile_trainer, train_sharding
from wqmix_jax.training.devices import claim_cores
from wqmix_jax.training.members import make_members
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import rollout
from wqmix_jax.types import Array, Episode, StepOutcome

REPETITIONS, CHUNKS = 5, 3
"""Repetitions of a call, and measured chunks of the loop."""

CALLS = 4
"""Learner calls of one repetition, in sequence in a compiled loop, as a run makes them. The time of a single call would
include allocating a third of a gigabyte from the system and returning it."""

MAX_SEEDS = 64
"""The largest number of seeds of ``seeds=all``."""

MATMUL_SIZE = 4096

AUTHORS = {
    "iql": 0.31, "vdn": 0.31, "qmix": 0.40, "ow_qmix": 0.89, "cw_qmix": 0.94, "qtran": 0.52, "qplex": 0.80,
    "masac": 0.95, "maddpg": 3.1,
}  # fmt: skip
"""Seconds of the same call in the authors' code with one thread, measured for this project on another day."""


class Row(NamedTuple):
    """One measurement."""

    name: str
    value: float
    unit: str
    algo: str = ""
    num_seeds: int = 1


@command
def main() -> None:
    """Measures the chosen algorithm and prints the table."""
    run(str(__doc__), lambda algo, overrides: [*measured(algo, overrides), peak_memory(algo)])


def run(description: str, measure: Callable[[str, list[str]], list[Row]]) -> None:
    """Parses the command line, calls ``measure``, prints the table and writes it to the file after ``--out``."""
    parser = OneLineParser(description=description)
    parser.add_argument("overrides", nargs="*", help="algo=NAME, and options of a run, as for wqmix_jax.train")
    parser.add_argument("--out", type=out_file, help="a JSON file for the rows")
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
    """Writes the rows as JSON, after a row with the machine and the ``chosen`` options."""
    listed = [{"name": "machine", **chosen, **machine()}, *(row._asdict() for row in rows)]
    out.write_text(json.dumps(listed, indent=1) + "\n")


def peak_memory(algo: str) -> Row:
    """Returns the peak memory of this process so far."""
    return Row("peak_memory_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "B", algo)


def chosen_algorithm(overrides: list[str]) -> tuple[str, list[str]]:
    """Returns the algorithm, by default ``ow_qmix``, and the other overrides."""
    named = [override for override in overrides if override.lstrip("+").startswith("algo=")]
    algo = named[-1].partition("=")[2] if named else "ow_qmix"
    return algo, [override for override in overrides if override not in named]


def measured(algo: str, overrides: list[str]) -> Iterator[Row]:
    """Yields the rows for the chosen algorithm and options."""
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
    """Times one seed's learner call on a batch of episodes that all last to the time limit, as a run makes it.

    Times it also on shorter episodes, of 5% to 55% of the time limit, 30% on average.
    """
    batch_size, one_batch = config.algo.batch_size, one_batch_config(config)
    trainer, limit = make_trainer(one_batch, sharding=train_sharding(config, 1)), config.env.spec.episode_limit
    full = with_episodes(trainer, config, jnp.full(batch_size, limit))
    short = with_episodes(trainer, config, jnp.linspace(limit / 20, limit * 11 / 20, batch_size))
    calls = learner_calls(trainer)
    others = counterparts(config, name)
    in_turn = [functools.partial(calls, full), functools.partial(calls, short), *others.values()]
    seconds, short_seconds, *their_seconds = timed_in_turn(in_turn)
    # Without tiles: their number is not part of the traced function.
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
    for counterpart, its_seconds in zip(others, their_seconds, strict=True):
        rows += [
            Row(f"learner_call_{counterpart}_seconds", its_seconds, "s", name),
            Row(f"learner_call_vs_{counterpart}", seconds / its_seconds, "of its time", name),
        ]
    if name in AUTHORS:
        rows.append(Row("learner_call_seconds_authors", AUTHORS[name], "s", name))
    return rows


def one_batch_config(config: RunConfig) -> RunConfig:
    """Returns the options of a trainer whose `learn` takes one step, and whose replay holds one batch.

    The batch of an on-policy algorithm is then all episodes of an iteration.
    """
    size = config.algo.batch_size
    algo = dataclasses.replace(config.algo, buffer_size=size)
    num_envs = size if config.algo.is_on_policy else config.num_envs
    return dataclasses.replace(config, algo=algo, num_envs=num_envs, updates_per_iteration=1)


def learner_calls(trainer: Trainer) -> Callable[[TrainState], TrainState]:
    """Returns a compiled function that makes `CALLS` learner calls of all seeds in sequence."""
    return jax.jit(lambda state: one_after_another(functools.partial(next_step, trainer), state))


def next_step(trainer: Trainer, state: TrainState) -> TrainState:
    """Returns the state after one learner step on a newly sampled batch."""
    learner, _ = trainer.learn(state)
    counters = state.counters._replace(learner_steps=state.counters.learner_steps + 1)
    return state._replace(learner=learner, counters=counters)


def one_after_another(step: Callable[[Any], Any], state: Any) -> Any:
    """Returns the state after `CALLS` steps in one compiled loop."""
    return jax.lax.scan(lambda state, _: (step(state), None), state, length=CALLS)[0]


def counterparts(config: RunConfig, name: str) -> dict[str, Callable[[], Any]]:
    """Returns the same call of OW-QMIX in plain JAX, and in PyTorch if it is installed; empty for other algorithms."""
    if name != "ow_qmix":
        return {}
    batch = full_episodes(config)
    learner, call = make_plain_learner(config.algo, batch)
    plain_calls = jax.jit(lambda learner, batch: one_after_another(lambda it: call(it, batch)[0], learner))
    calls: dict[str, Callable[[], Any]] = {"plain_jax": functools.partial(plain_calls, learner, batch)}
    with contextlib.suppress(ImportError):
        from experiments.benchmarks.torch_learner import make_torch_learner

        torch_call = make_torch_learner(config.algo, batch)
        calls["pytorch"] = lambda: [torch_call() for _ in range(CALLS)]
    return calls


def stored_rows(config: RunConfig, lengths: Array) -> Array:
    """Returns a stored batch ``[B, row_bytes]`` of random episodes that are cut to ``lengths`` ``[B]``.

    Steps after the end of an episode are zero.
    """
    algo, env, batch_size = config.algo, config.env, config.algo.batch_size
    latent = latent_template(algo, env.spec)
    replay = make_replay(env, buffer_size=batch_size, batch_size=batch_size, latent=latent)

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
    """Returns a decoded batch of episodes that all last to the time limit."""
    algo, env = config.algo, config.env
    latent = latent_template(algo, env.spec)
    replay = make_replay(env, buffer_size=algo.batch_size, batch_size=algo.batch_size, latent=latent)
    limit = env.spec.episode_limit
    rows = stored_rows(config, jnp.full(algo.batch_size, limit))
    return jax.jit(lambda rows: replay.decode(rows, limit))(rows)


def with_episodes(trainer: Trainer, config: RunConfig, lengths: Array, *, num_seeds: int = 1) -> TrainState:
    """Returns initial states of seeds whose replay buffers, of the size of one batch, hold `stored_rows`."""
    state = trainer.init(range(config.seed, config.seed + num_seeds))
    rows = jnp.broadcast_to(stored_rows(config, lengths)[None, None], state.replay.experience.shape)
    experience = jax.device_put(rows, trainer.sharding)
    return state._replace(replay=state.replay.replace(experience=experience, is_full=~state.replay.is_full))


def endless(config: RunConfig) -> RunConfig:
    """Returns the same run with an environment in which only the time limit ends an episode."""

    class Endless(type(config.env)):
        def step(self, env_state: Any, joint_action: Array, key: Any) -> tuple[Any, StepOutcome]:
            env_state, outcome = super().step(env_state, joint_action, key)
            return env_state, outcome._replace(terminated=jnp.zeros_like(outcome.terminated))

    fields = {field.name: getattr(config.env, field.name) for field in dataclasses.fields(config.env)}
    return dataclasses.replace(config, env=Endless(**fields))


def rollout_rows(config: RunConfig, name: str, *, repetitions: int = REPETITIONS) -> list[Row]:
    """Times playing without learning: one iteration's episodes of all seeds, at random.

    The time of a step is that of one step of all environments, until the longest episode ends.
    """
    algo, env, num_seeds = config.algo, config.env, config.num_seeds
    keys = jax.random.split(jax.random.key(0), num_seeds)
    params = jax.vmap(lambda key: algo.init(key, env.spec))(keys)
    hp, ctx = jax.tree.map(lambda leaf: jnp.full(num_seeds, leaf), (hyperparams(algo), at_random()))
    call = jax.jit(lambda params, keys: rollout(env, algo, params, hp, ctx, keys, num_envs=config.num_envs))
    seconds, played = timed(call, params, keys, repetitions=repetitions)
    lengths = played.episodes.length
    return [
        Row("rollout_env_steps_per_second", float(lengths.sum()) / seconds, "1/s", name, num_seeds),
        Row("rollout_seconds_per_step", seconds / float(lengths.max()), "s", name, num_seeds),
    ]


def loop_rows(config: RunConfig, name: str, *, chunks: int = CHUNKS) -> list[Row]:
    """Times the compiled loop as a run uses it, ``chunks`` times from the first chunk in which every iteration learns.

    Rates are sums over seeds. Returns no rows if the planned memory doesn't fit.
    """
    trainer = make_trainer(config, sharding=train_sharding(config, config.num_seeds))
    members = make_members(config.algo, config.seeds, {})
    trainer, compilation = compile_trainer(trainer, members)
    plan = memory_plan(trainer, members)
    if not plan.fits:
        return []
    state, rates = trainer.init(config.seeds), []
    while len(rates) < chunks:
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
    """Returns the context at the start of training, with epsilon 1."""
    return Context(epsilon=jnp.float32(1), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))


def timed(call: Callable[..., Any], *args: Any, repetitions: int = REPETITIONS) -> tuple[float, Any]:
    """Returns the median seconds of a call after one that compiles it, and the call's result."""
    result, times = jax.block_until_ready(call(*args)), []
    for _ in range(repetitions):
        started = time.perf_counter()
        result = jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def timed_in_turn(calls: list[Callable[[], Any]], *, repetitions: int = REPETITIONS) -> list[float]:
    """Returns each function's median seconds per call (of `CALLS`); they take turns, so that other load affects all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + repetitions):
        for call, its_times in zip(calls, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(call())
            its_times.append(time.perf_counter() - started)
    return [statistics.median(its_times[1:]) / CALLS for its_times in times]


def matmul_speed() -> float:
    """Returns floating point operations per second of a large matrix product on one device of the default backend."""
    square = jnp.ones((MATMUL_SIZE, MATMUL_SIZE))
    return 2 * MATMUL_SIZE**3 / timed(jax.jit(jnp.matmul), square, square)[0]


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Counts the floating point operations of the matrix products on which a function's result depends.

    Of several branches the longest counts. XLA's own count includes the body of a loop only once.
    """
    return _flops_of_all(jax.make_jaxpr(function)(*args).jaxpr)


def _flops_of_all(jaxpr: Any) -> int:
    # XLA drops the other products as well, also those in the body of a `while`, which jax leaves as it is.
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(_flops(eqn) for eqn in needed.eqns)


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
    """Returns the machine and the versions on which the numbers depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    devices = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    return {"cpu": cpu, "cores": os.cpu_count(), "devices": devices, "versions": versions()}


def show(rows: list[Row]) -> None:
    """Prints the table; rates are sums over seeds."""
    device = jax.devices()[0]
    title = f"jax {jax.__version__}, {device.device_kind} x {jax.device_count()}"
    table = Table("measurement", "algorithm", "seeds", "value", "unit", title=title)
    for row in rows:
        value = f"{row.value:,.3f}" if row.value < 1000 else f"{row.value:,.0f}"
        table.add_row(row.name, row.algo, str(row.num_seeds), value, row.unit)
    Console().print(table)


if __name__ == "__main__":
    main()
