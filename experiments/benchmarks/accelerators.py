"""Compiles for absent accelerators: ``python -m experiments.accelerators [target=T] [algo=NAME|all] [KEY=VALUE ..]``.

XLA's compilers for TPUs and GPUs work without the device, given a description of it. For each target, algorithm and
number of seeds, this command compiles the programs of a run and reports the time of compilation, the size of the code
and of the memory, and the number of kernels that run one after another. Nothing is executed, so none of the numbers is
a time of training.
"""

import functools
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import hlo
from experiments.benchmarks.accelerator_targets import (
    PACKAGES,
    Target,
    find_target,
    refuse_missing_extra,
    sharding_of,
    version_of,
)
from wqmix_jax import load_config, make_trainer
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.config import RunConfig, names
from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.records import text_table
from wqmix_jax.records.run_dir import versions
from wqmix_jax.training.compiled_loop import Trainer, TrainState, abstract_state, compiler_options
from wqmix_jax.training.members import make_members

FOLDER = Path(__file__).parent
OUT = FOLDER / "accelerators.json"

PROGRAMS = ("train", "evaluate", "learn", "init")

DEFAULTS = {"target": "cuda:h100,tpu:v5e", "algo": "ow_qmix", "num_seeds": "1", "program": "train,evaluate"}
"""The options of this command; each is a list with commas. All others are options of the run."""

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened, so no lock is needed
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # libtpu asks Google's metadata server for what it doesn't find here
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Settings of the processes that compile, which libtpu reads when it is loaded."""

Row = dict[str, Any]
"""The numbers of one program, as they are written."""

MOST_BUFFERS, NOTABLE_BYTES = 5, 1_000_000
"""The number of temporaries that are written, and the size from which on they are printed."""

AT_MOST = re.compile(r"(\w+)_at_most_(\d+)")
"""A named scope around a loop of dynamic length, `jax.named_scope("blocks_at_most_13")`, says how long it can be."""


class Job(NamedTuple):
    """One process's work: programs of one algorithm and number of seeds, for one target."""

    target: Target
    algo: str
    num_seeds: int
    programs: tuple[str, ...]
    overrides: tuple[str, ...]
    hlo_folder: Path | None


@command
def main() -> None:
    """Compiles the chosen programs, prints the table and writes the numbers."""
    description = (
        f"{__doc__}\nOptions of this command: {shlex.join(f'{key}={value}' for key, value in DEFAULTS.items())}."
    )
    parser = OneLineParser(description=description)
    parser.add_argument("overrides", nargs="*", help="options of this command, and of a run, as for wqmix_jax.train")
    parser.add_argument("--out", type=out_file, default=OUT, help=f"a JSON file for the numbers (default: {OUT.name})")
    parser.add_argument("--loops", action="store_true", help="print the kernels of each loop and branch")
    parser.add_argument("--hlo", type=Path, help="a folder for the compiled programs' texts")
    args = parser.parse_args()
    rows: list[Row] = []
    for job in jobs(args.overrides, args.hlo):
        for row in compiled_in_process(job):
            loops = row.pop("loops")  # printed only: they would be most of the file
            rows.append(row)
            print(summary(row), flush=True)
            if args.loops:
                print("\n".join(loops))
        args.out.write_text(json.dumps([header(), *rows], indent=1) + "\n")
    print()
    text_table.show([cells(row) for row in rows])
    for line in notes(rows):
        print(line)


def jobs(overrides: Sequence[str], hlo_folder: Path | None = None) -> list[Job]:
    """Reads the command line and checks everything that can be checked before anything compiles.

    Raises:
        ConfigError: if an option is unknown or its value is not allowed.
    """
    chosen, run_options = chosen_options(overrides)
    algos = names("algo").split(", ") if chosen["algo"] == ["all"] else chosen["algo"]
    targets = [find_target(name) for name in chosen["target"]]
    numbers = [_seeds(text) for text in chosen["num_seeds"]]
    for program in chosen["program"]:
        if program not in PROGRAMS:
            raise ConfigError(f"program={program} is not allowed: choose from {', '.join(PROGRAMS)}")
    for algo in algos:
        load_config(f"+algo={algo}", *run_options)
    for target in targets:
        refuse_missing_extra(target)
    if hlo_folder is not None:
        hlo_folder.mkdir(parents=True, exist_ok=True)
    return [
        Job(target, algo, num_seeds, tuple(chosen["program"]), tuple(run_options), hlo_folder)
        for target in targets
        for algo in algos
        for num_seeds in numbers
    ]


def chosen_options(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Splits the arguments into this command's options, each a list, and those of runs."""
    chosen, run_options = {key: value.split(",") for key, value in DEFAULTS.items()}, []
    for override in overrides:
        key, is_option, value = override.lstrip("+").partition("=")
        if is_option and key in DEFAULTS:
            chosen[key] = value.split(",")
        else:
            run_options.append(override)
    return chosen, run_options


def _seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"num_seeds={text} is not allowed: choose whole numbers above 0, with commas between them")
    return int(text)


def compiled_in_process(job: Job) -> Iterator[Row]:
    """Yields the numbers of a job's programs, compiled in a separate process.

    A compiler for a device can be loaded once per process, and may end it.

    Raises:
        RunError: if the process ended.
    """
    with tempfile.NamedTemporaryFile() as log:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(log.name,)) as pool:
            for program in job.programs:
                try:
                    yield pool.submit(measure, job, program).result()
                except BrokenProcessPool:
                    last = [line for line in Path(log.name).read_text(errors="replace").splitlines() if line.strip()]
                    reason = f"the compiler ended its process: {last[-1][:200] if last else 'it left no message'}"
                    raise RunError(f"{job.target.name}, {job.algo}, {program}: {reason}") from None


def _prepare(log: str) -> None:
    """Sets up a process that compiles; the compilers' own messages go to a file."""
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())


def measure(job: Job, program: str) -> Row:
    """Compiles one program and returns its numbers.

    Raises:
        ConfigError: if the target has no such devices.
        RunError: if the compiler fails for another reason than too little memory.
    """
    config = load_config(f"+algo={job.algo}", f"num_seeds={job.num_seeds}", *job.overrides)
    trainer = make_trainer(config, sharding=sharding_of(job.target, job.num_seeds))
    devices = trainer.sharding.device_set
    started = time.perf_counter()
    state = abstract_state(trainer, make_members(config.algo, config.seeds, {}))
    lowered = lower(trainer, state, program)
    row: Row = {
        "target": job.target.name,
        "device": next(iter(devices)).device_kind,
        "num_devices": len(devices),
        "algo": job.algo,
        "num_seeds": job.num_seeds,
        "program": program,
        "trace_seconds": round(time.perf_counter() - started, 2),
        "memory_limit_bytes": job.target.memory_bytes,
    }
    try:
        compiled = compile_lowered(lowered, compiler_options(trainer.sharding))
    except jax.errors.JaxRuntimeError as error:
        reason = next(line for line in str(error).splitlines() if line)
        if "RESOURCE_EXHAUSTED" not in reason:
            raise RunError(f"{job.target.name}, {job.algo}, {program}: {reason[:300]}") from None
        return row | {"fits": False, "reason": reason, "loops": []}
    text = compiled.program.as_text()
    if job.hlo_folder is not None:
        name = re.sub(r"\W+", "_", f"{job.target.name} {job.algo} {job.num_seeds} {program}")
        (job.hlo_folder / f"{name}.hlo").write_text(text)
    computations = hlo.parse(text)
    row |= compiled.seconds | memory_numbers(compiled, job.target, job.num_seeds // len(devices))
    row |= kernel_numbers(computations, config, program, job.target.platform)
    return row | buffer_numbers(
        hlo.temporaries(compiled.assignment, computations), largest_replay_array(trainer, state)
    )


def lower(trainer: Trainer, state: TrainState, program: str) -> Any:
    """Traces and lowers one of a trainer's programs, for a state of shapes."""
    jitted: Any = trainer
    if program == "init":
        return jitted.init_program.lower(jax.ShapeDtypeStruct(state.failed.shape, jnp.uint32))
    if program == "train":
        return jitted.train.lower(state, jax.ShapeDtypeStruct((), jnp.int32))
    return getattr(jitted, program).lower(state)


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
        program: as jax returns it.
        seconds: numbers of a row: the time that passed, and that of all threads and processes.
        assignment: XLA's text on where each value is stored.
        ptx_bytes: of a GPU's code before it is assembled, 0 for others.
    """

    program: Any
    seconds: dict[str, float]
    assignment: str
    ptx_bytes: int


def compile_lowered(lowered: Any, options: Mapping[str, Any]) -> Compiled:
    """Compiles a program without any cache, with the options that a run uses, and reads what XLA dumps."""
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds, started = sum(os.times()[:4]), time.perf_counter()
        program = lowered.compile({**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        seconds = {
            "compile_seconds": round(time.perf_counter() - started, 2),
            "compile_cpu_seconds": round(sum(os.times()[:4]) - cpu_seconds, 2),
        }
        assignments = sorted(Path(folder).rglob("*after_optimizations-buffer-assignment.txt"))
        assignment = assignments[-1].read_text() if assignments else ""
        return Compiled(program, seconds, assignment, sum(file.stat().st_size for file in Path(folder).rglob("*.ptx")))


def memory_numbers(compiled: Compiled, target: Target, seeds_per_device: int) -> dict[str, Any]:
    """Returns the bytes that a program needs on each device, and whether it has them."""
    analysis = compiled.program.memory_analysis()
    # For a GPU, XLA states no size of the code.
    code = compiled.ptx_bytes or analysis.generated_code_size_in_bytes
    sizes = {
        "code_bytes": code,
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "new_output_bytes": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    }
    total = sum(sizes.values())
    return sizes | {
        "total_bytes": total,
        "total_bytes_per_seed": total // seeds_per_device,
        "temporary_bytes_per_seed": analysis.temp_size_in_bytes // seeds_per_device,
        "fits": total <= target.memory_bytes,
    }


def kernel_numbers(computations: hlo.Computations, config: RunConfig, program: str, platform: str) -> dict[str, Any]:
    """Counts the kernels that run one after another, with episodes that all last to the time limit."""
    limit, updates = config.env.spec.episode_limit, config.updates_per_iteration
    counted = hlo.structure(computations, scalars_are_free=platform == "tpu")
    counted = hlo.with_trips(counted, functools.partial(assumed_trips, program, limit))
    loops = [part for part in hlo.parts(counted) if part.role]
    numbers: dict[str, Any] = {"kernels": counted.total}
    if steps := [part.total for part in loops if part.role == "steps"]:
        numbers["kernels_per_env_step"] = round(sum(steps) / limit, 1)
    if program == "learn":
        numbers["kernels_per_learner_call"] = round(counted.total / updates, 1)
    for iteration in (part for part in loops if part.role == "iterations"):
        learning = [part.total for part in iteration.inner if part.role == "updates" or part.kind == "choice"]
        numbers["kernels_per_learner_call"] = round(max(learning, default=0) / updates, 1)
        numbers["kernels_per_iteration"] = iteration.once + iteration.check
    assumed = [f"{part.trips} {part.role}: {part.op_name}" for part in loops]
    return numbers | {"assumed_trips": assumed, "loops": list(counted.lines())}


def assumed_trips(program: str, episode_limit: int, loop: hlo.Part, around: Sequence[hlo.Part]) -> tuple[str, int]:
    """Returns the role of a loop of dynamic length and the number of its trips in the longest case.

    A scope that matches `AT_MOST` says it. The others are known by their places: the outermost loop of ``train`` is
    over iterations, and counts once; a loop in it outside of branches, or the outermost of ``evaluate``, plays an
    episode; all others are over the time steps of a batch, in blocks if there is an inner loop of known length.
    """
    noted = AT_MOST.search(loop.op_name.rsplit("/body/", 1)[-1])
    outer = [part.role for part in around if part.role]
    in_branch = any(part.kind == "choice" for part in around)
    if program == "train" and not outer and not in_branch:
        return "iterations", 1
    plays = not in_branch and outer == {"train": ["iterations"], "evaluate": []}.get(program)
    if noted:
        return noted[1], int(noted[2])
    if plays:
        return "steps", episode_limit
    block = max((part.trips or 1 for part in loop.inner if part.kind == "loop"), default=1)
    return "blocks", math.ceil((episode_limit + 1) / block)


def largest_replay_array(trainer: Trainer, state: TrainState) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the part of the stored episodes that one device has."""
    leaf = max(jax.tree.leaves(state.replay), key=lambda leaf: leaf.size * leaf.dtype.itemsize)
    return jax.ShapeDtypeStruct(trainer.sharding.shard_shape(leaf.shape), leaf.dtype)


def buffer_numbers(buffers: list[hlo.Buffer], replay: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Returns the largest temporaries, and those that are as large as the replay: copies that shouldn't be there."""
    copies = [buffer for buffer in buffers if replay.size in (buffer.num_elements, buffer.num_bytes)]
    return {
        "largest_temporaries": [buffer._asdict() for buffer in buffers[:MOST_BUFFERS]],
        "replay_copies": [buffer._asdict() for buffer in copies],
    }


def header() -> dict[str, Any]:
    """Returns the facts on which the numbers depend."""
    packages = {name: version for names in PACKAGES.values() for name in names if (version := version_of(name))}
    return {
        "name": "compiled",
        "command": shlex.join(["python", "-m", "experiments.accelerators", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions() | packages,
    }


def commit() -> str:
    """Returns the commit of the checkout, with ``-dirty`` where files differ from it; empty where there is none."""
    asked = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def summary(row: Row) -> str:
    """Returns a line about one compilation."""
    seeds = "1 seed" if row["num_seeds"] == 1 else f"{row['num_seeds']} seeds"
    end = f"compiled in {row['compile_seconds']:.0f} s" if "compile_seconds" in row else f"refused: {row['reason']}"
    return f"{row['target']}, {row['algo']}, {seeds}, {row['program']}: {end}"


def cells(row: Row) -> Row:
    """Returns a line of the table; sizes are in megabytes (10^6 bytes)."""

    def megabytes(name: str) -> str:
        return f"{row[name] / 1e6:,.1f}" if name in row else ""

    def number(name: str) -> str:
        return f"{row[name]:,.0f}" if name in row else ""

    return {
        "target": row["target"],
        "algorithm": row["algo"],
        "seeds": row["num_seeds"],
        "program": row["program"],
        "compile s": number("compile_seconds"),
        "CPU s": number("compile_cpu_seconds"),
        "code MB": megabytes("code_bytes"),
        "arguments MB": megabytes("argument_bytes"),
        "temporaries MB": megabytes("temporary_bytes"),
        "MB/seed": megabytes("total_bytes_per_seed"),
        "fits": "yes" if row["fits"] else "no",
        "kernels/step": number("kernels_per_env_step"),
        "/learner call": number("kernels_per_learner_call"),
        "/iteration": number("kernels_per_iteration"),
        "replay copies": "" if "replay_copies" not in row else len(row["replay_copies"]),
    }


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yields copies of the replay, the largest temporaries, and the assumptions about loops of dynamic length."""
    for row in rows:
        name = f"{row['target']}, {row['algo']}, {row['num_seeds']}, {row['program']}"
        for buffer in row.get("replay_copies", ()):
            yield f"{name}: a temporary as large as the replay: {described(buffer)}"
        for buffer in row.get("largest_temporaries", ()):
            if buffer["size"] >= NOTABLE_BYTES:
                yield f"{name}: {described(buffer)}"
    for assumed in dict.fromkeys(text for row in rows for text in row.get("assumed_trips", ())):
        yield f"counted as {assumed}"


def described(buffer: dict[str, Any]) -> str:
    """Returns the size, shape and name of a temporary."""
    return f"{buffer['size'] / 1e6:.1f} MB {buffer['shape']} {(buffer['op_name'] or buffer['name'])[-80:]}"


if __name__ == "__main__":
    main()
