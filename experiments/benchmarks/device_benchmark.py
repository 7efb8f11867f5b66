"""Speed, memory and precisions on a GPU or TPU: ``python -m experiments.device_benchmark [algo=NAME] [KEY=VALUE ..]``.

One prepared script for a device that is available for minutes. For each of ``--seeds`` (1, 8, 64 and 256) it measures
end-to-end training, with the device's peak memory next to the planned memory, a learner call on full episodes, and a
step of playing. With the second number of seeds it also measures tensorfloat32 and bfloat16. Times are medians of
``--repeats`` repetitions after one that is not counted; compile time has its own rows.

A measurement is left out if it would end after ``--budget`` seconds, taking as long as the last one of its kind. Rows
are printed as soon as they are known, and ``--out`` is written after each measurement, in the format of
`experiments.benchmarks.benchmark`, so that a command that is killed loses one measurement only. ``--trace`` also writes
a trace of one training iteration, for TensorBoard or Perfetto.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.benchmark import (
    Row,
    chosen_algorithm,
    learner_calls,
    loop_rows,
    one_batch_config,
    rollout_rows,
    show,
    timed_in_turn,
    with_episodes,
    write,
)
from wqmix_jax import load_config, make_trainer
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count, out_file
from wqmix_jax.config import RunConfig
from wqmix_jax.errors import ConfigError
from wqmix_jax.runs.memory import MAX_REASON
from wqmix_jax.training.compiled_loop import train_sharding
from wqmix_jax.training.devices import claim_cores

SEEDS, REPEATS, BUDGET = (1, 8, 64, 256), 3, 480
"""Defaults: the numbers of seeds, the repetitions, and the seconds of the command."""

CHUNK_ITERATIONS = 10
"""Iterations of one compiled call, unless the option is given: enough to hide the start of a call."""

PRECISIONS = {
    "float32": (),
    "tensorfloat32": ("matmul_precision=tensorfloat32",),
    "bfloat16": ("compute_dtype=bfloat16",),
}
"""Options by the name of a precision, which is the prefix of its rows' names except for float32."""

REFUSED = {
    "num_seeds": "--seeds chooses the numbers of seeds",
    "matmul_precision": "each precision is measured",
    "compute_dtype": "each precision is measured",
}


class Measurement(NamedTuple):
    """A part of the benchmark.

    Attributes:
        kind: ``training``, ``learner call``, ``rollout`` or ``trace``.
        precision: a key of `PRECISIONS`.
        config: the options of the run, with its number of seeds.
        measure: returns the rows.
    """

    kind: str
    precision: str
    config: RunConfig
    measure: Callable[[RunConfig], list[Row]]

    def __str__(self) -> str:
        seeds = "1 seed" if self.config.num_seeds == 1 else f"{self.config.num_seeds} seeds"
        return f"{self.kind}, {seeds}, {self.precision}"


@command
def main() -> None:
    """Measures what fits into the budget, prints the table and writes the rows."""
    started = time.perf_counter()
    parser = OneLineParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="algo=NAME, and options of a run, as for wqmix_jax.train")
    parser.add_argument("--seeds", type=count, nargs="+", default=SEEDS, help="the numbers of seeds")
    parser.add_argument("--repeats", type=count, default=REPEATS, help="repetitions, whose median is reported")
    parser.add_argument("--budget", type=count, default=BUDGET, help="seconds of the whole command")
    parser.add_argument("--trace", type=new_folder, help="a new folder for a trace of one training iteration")
    parser.add_argument("--out", type=out_file, help="a JSON file for the rows")
    args = parser.parse_args()
    claim_cores()
    algo, options = chosen_algorithm(args.overrides)
    plan = list(measurements(algo, options, args.seeds, args.repeats, args.trace))
    rows: list[Row] = []
    left_out: list[str] = []
    for new_rows, reason in measured(plan, started + args.budget):
        rows += new_rows
        left_out += [reason] if reason else []
        if args.out is not None:
            write(args.out, rows, options=" ".join(args.overrides), not_measured="; ".join(left_out))
    show(rows)
    for reason in left_out:
        print(f"not measured: {reason}")


def new_folder(text: str) -> Path:
    """An argument's type: a folder that does not exist yet, or is empty.

    Raises:
        ArgumentTypeError: if there is a file, or the folder contains something.
    """
    path = Path(text)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{path} is not allowed: choose a new or empty folder")
    return path


def measurements(
    algo: str, options: Sequence[str], seeds: Sequence[int], repeats: int, trace: Path | None = None
) -> Iterator[Measurement]:
    """Yields all measurements in their order: the fewest seeds first, since the peak of a device's memory only grows.

    Args:
        algo: the algorithm's yaml.
        options: other options of a run.
        seeds: the numbers of seeds.
        repeats: repetitions of every measurement.
        trace: the folder of the trace, of the second number of seeds; None for no trace.

    Raises:
        ConfigError: if an option is not allowed.
    """
    for option in options:
        if reason := REFUSED.get(option.lstrip("+").partition("=")[0]):
            raise ConfigError(f"{option} is not allowed: {reason}")
    if not any(option.lstrip("+").startswith("chunk_iterations=") for option in options):
        options = [*options, f"chunk_iterations={CHUNK_ITERATIONS}"]
    load = functools.partial(load_config, f"+algo={algo}", *options)
    kinds = {
        "training": functools.partial(training_rows, name=algo, repeats=repeats),
        "learner call": functools.partial(learner_rows, name=algo, repeats=repeats),
        "rollout": functools.partial(rollout_rows, name=algo, repetitions=repeats),
    }
    ascending = sorted(set(seeds))
    for num_seeds in ascending:
        is_compared = num_seeds == ascending[:2][-1]
        for precision, settings in PRECISIONS.items() if is_compared else [("float32", ())]:
            config = load(*settings, f"num_seeds={num_seeds}")
            for kind, measure in kinds.items():
                if kind != "rollout" or precision == "float32":
                    yield Measurement(kind, precision, config, measure)
        if is_compared and trace is not None:
            measure = functools.partial(trace_rows, folder=trace)
            yield Measurement("trace", "float32", load(f"num_seeds={num_seeds}"), measure)


def measured(plan: Sequence[Measurement], end: float) -> Iterator[tuple[list[Row], str]]:
    """Takes the measurements that should end in time, and yields the rows of each, or the reason why it has none.

    Args:
        plan: the measurements.
        end: the time of `time.perf_counter` at which the budget is used up.
    """
    lasted: dict[str, tuple[float, int]] = {}
    for measurement in plan:
        kind, num_seeds = measurement.kind, measurement.config.num_seeds
        seconds, seeds_then = lasted.get(kind, (0.0, num_seeds))
        started = time.perf_counter()
        if started + seconds * _growth(num_seeds / seeds_then) > end:
            yield [], f"{measurement}: it would end after the budget"
            continue
        print(f"{measurement} ..", flush=True)
        try:
            rows = measurement.measure(measurement.config)
        except jax.errors.JaxRuntimeError as error:
            yield [], f"{measurement}: {str(error).splitlines()[0][:MAX_REASON]}"
            continue
        lasted[kind] = time.perf_counter() - started, num_seeds
        if measurement.precision != "float32":
            rows = [row._replace(name=f"{measurement.precision}_{row.name}") for row in rows]
        for row in rows:
            print(f"  {row.name}: {row.value:,.6g} {row.unit}", flush=True)
        reason = "" if rows or kind == "trace" else f"{measurement}: the planned memory does not fit"
        yield rows, reason


def _growth(ratio: float) -> float:
    """Returns the expected growth of a measurement's time with the number of seeds: on a CPU they take turns."""
    return max(1.0, ratio) if jax.default_backend() == "cpu" else 1.0


def training_rows(config: RunConfig, name: str, repeats: int) -> list[Row]:
    """Returns the rows of `loop_rows`, and the device's peak memory where it reports one.

    The peak is left out if an earlier measurement of this process reached it.
    """
    before = peak_memory()
    rows = loop_rows(config, name, chunks=repeats)
    peak = peak_memory()
    planned = next((row.value for row in rows if row.name == "planned_memory_bytes"), None)
    if peak is None or planned is None or peak == before:
        return rows
    peak_rows = [
        Row("peak_memory_bytes", peak, "B", name, config.num_seeds),
        Row("peak_memory_vs_planned", peak / planned, "of the plan", name, config.num_seeds),
    ]
    return rows + peak_rows


def peak_memory() -> int | None:
    """Returns the largest peak of a local device's memory in bytes since the start; None if no device reports it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each), default=None)


def learner_rows(config: RunConfig, name: str, repeats: int) -> list[Row]:
    """Times a learner call of all seeds, on episodes that all last to the time limit, and its compilation."""
    trainer = make_trainer(one_batch_config(config), sharding=train_sharding(config, config.num_seeds))
    lengths = jnp.full(config.algo.batch_size, config.env.spec.episode_limit)
    state = with_episodes(trainer, config, lengths, num_seeds=config.num_seeds)
    jitted: Any = learner_calls(trainer)
    started = time.perf_counter()
    calls = jitted.lower(state).compile()
    compile_seconds = time.perf_counter() - started
    [seconds] = timed_in_turn([functools.partial(calls, state)], repetitions=repeats)
    return [
        Row("learner_call_seconds", seconds, "s", name, config.num_seeds),
        Row("learner_call_compile_seconds", compile_seconds, "s", name, config.num_seeds),
    ]


def trace_rows(config: RunConfig, folder: Path) -> list[Row]:
    """Writes a trace of one iteration that plays and learns; returns no rows."""
    trainer = make_trainer(config, sharding=train_sharding(config, config.num_seeds))
    state, one = trainer.init(config.seeds), np.int32(1)
    for _ in range(math.ceil(config.algo.batch_size / config.num_envs)):
        state, _ = trainer.train(state, one)
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        jax.block_until_ready(trainer.train(state, one))
    print(f"  the trace is in {folder}", flush=True)
    return []


if __name__ == "__main__":
    main()
