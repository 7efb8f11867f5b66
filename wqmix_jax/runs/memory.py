"""The memory that a run needs, read from its compiled programs before anything is allocated.

If the backward passes of all seeds don't fit simultaneously, the seeds learn in groups, one after another. A TPU's
compiler refuses a program that doesn't fit; that leads to more groups too.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from wqmix_jax.config import RunConfig
from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.runs.checkpoint_pieces import buffer_bytes
from wqmix_jax.runs.startup import megabytes
from wqmix_jax.training.compiled_loop import Compilation, Trainer, abstract_state, compile_trainer, make_trainer
from wqmix_jax.training.devices import GPUS, device_memory
from wqmix_jax.training.members import Member

MAX_REASON = 200
"""Characters of JAX's message that are shown."""

_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|ALLOC_FAILED|failed to (create|allocate).*(handle|memory)", re.IGNORECASE
)
"""JAX's messages about a full device; cuBLAS and cuDNN can't make their handles then."""

_SMALL_MEMORY = re.compile(r"memory space (vmem|smem|sflag)", re.IGNORECASE)
"""A TPU's memories next to its processor, which a kernel fills, however many seeds there are."""

USABLE_SHARE = 0.95
"""The share of an accelerator's memory that is planned with; the rest is for gaps between arrays, which no array fits.

A compiled program has one block for all its temporaries, so many small gaps are of no use to it."""

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class MemoryPlan(NamedTuple):
    """The bytes that programs need in one memory: the machine's for a CPU, one device's otherwise.

    Attributes:
        members: the number of trainings that share it.
        state: their train states, replays included.
        temporaries: intermediate arrays of the programs, and their records.
        least_temporaries: those of the programs that don't learn, the same in any number of groups.
        code: the compiled programs, where they are in this memory and the compiler reports their sizes.
        checkpoint: the most that writing or reading a checkpoint takes in addition to the states.
        limit: the available bytes; None if unknown.
    """

    members: int
    state: int
    temporaries: int
    least_temporaries: int
    code: int
    checkpoint: int
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes of states, temporaries, code and checkpoint."""
        return self.state + self.temporaries + self.code + self.checkpoint

    @property
    def fits(self) -> bool:
        """True if the sum is available, or if that is unknown."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        parts = f"{megabytes(self.state)} of states and replay buffers, {megabytes(self.temporaries)} of temporaries"
        parts += f", {megabytes(self.code)} of code" if self.code else ""
        parts += f", {megabytes(self.checkpoint)} for checkpoints" if self.checkpoint else ""
        there = "" if self.limit is None else f"; {megabytes(self.limit)} available"
        each = megabytes(self.total / self.members)
        return f"memory: {each} per seed, {megabytes(self.total)} in all ({parts}){there}"


def refuse_small_memory(trainer: Trainer, members: Sequence[Member]) -> None:
    """Refuses seeds whose train states alone would not fit, before anything compiles.

    Raises:
        ConfigError: if the train states need more than the available memory.
    """
    num_bytes, limit = _state_bytes(trainer, members), memory_limit(trainer)
    if limit is not None and num_bytes > limit:
        needed, available = megabytes(num_bytes), megabytes(limit)
        reason = f"their states and replay buffers need {needed}, but only {available} is available"
        raise ConfigError(f"training {len(members)} seeds in one run is not allowed: {reason}")


def compile_within_memory(
    config: RunConfig, trainer: Trainer, members: Sequence[Member], *, fresh: bool = True
) -> tuple[Trainer, Compilation, list[str]]:
    """Compiles a trainer, in as few groups of seeds as fit into the memory.

    Args:
        config: the options of ``trainer``, from which it is made again with more `Trainer.memory_groups`.
        trainer: the trainer.
        members: as many as will train.
        fresh: see `compile_trainer`.

    Returns:
        The compiled trainer, facts about its compilation, and lines that say how much memory it needs.

    Raises:
        RunError: if the seeds don't fit one by one either.
    """
    num_seeds, compilation = _seeds_per_device(trainer, members), Compilation(0.0, from_cache=True)
    while True:
        compiled, more, refusal = _compile(trainer, members, fresh=fresh)
        plan, compilation = None if compiled is None else memory_plan(compiled, members), compilation + more
        if compiled is not None and plan is not None and plan.fits:
            return compiled, compilation, list(_lines(compiled, members, plan))
        groups = _more_groups(plan, trainer.memory_groups, num_seeds)
        if groups is None:
            raise RunError(f"too little memory, train fewer seeds: {refusal if plan is None else plan}")
        trainer = make_trainer(config, sharding=trainer.sharding, memory_groups=groups)


def _compile(
    trainer: Trainer, members: Sequence[Member], *, fresh: bool
) -> tuple[Trainer | None, Compilation, str | None]:
    """Compiles a trainer.

    Returns:
        The compiled trainer, None if the compiler refuses a program because it needs more memory than the device has;
        facts about the compilation; and the compiler's message if it refuses.
    """
    started = time.perf_counter()
    try:
        return *compile_trainer(trainer, members, fresh=fresh), None
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if not _NO_MEMORY.search(message) or _SMALL_MEMORY.search(message):
            raise
        return None, Compilation(time.perf_counter() - started, from_cache=False), _first_line(message)


def _more_groups(plan: MemoryPlan | None, groups: int, num_seeds: int) -> int | None:
    """Returns how many groups to try after ``groups`` were too few; None if no number will do.

    That is the least divisor of ``num_seeds`` that should do by the ``plan``. Without a plan, because the compiler
    refused the program, it is the least that at least halves the groups' size: compiling may take minutes.
    """
    more = [number for number in range(groups + 1, num_seeds + 1) if num_seeds % number == 0]
    if plan is None:
        return next((number for number in more if number >= 2 * groups), None)
    if not plan._replace(temporaries=plan.least_temporaries).fits:
        return None

    def should_do(number: int) -> bool:
        return plan._replace(temporaries=max(plan.temporaries * groups // number, plan.least_temporaries)).fits

    return next(filter(should_do, more), more[-1] if more else None)


@contextlib.contextmanager
def memory_faults_in_one_line() -> Iterator[None]:
    """Turns JAX's errors about a full memory into one line that says what to do.

    Raises:
        RunError: if JAX reports a full memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        raise RunError(_out_of_memory(str(error), jax.local_devices()[0])) from error


def _out_of_memory(message: str, device: Any) -> str:
    """Returns the one line; several processes may share a GPU, for example an evaluation while another run trains."""
    reason = f"out of memory ({_first_line(message)}); train fewer seeds"
    preallocates = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    if device.platform not in GPUS or not preallocates:
        return reason
    cause = "or another process uses the GPU, of which JAX takes 75% when it starts"
    return f"{reason}, {cause}: set XLA_PYTHON_CLIENT_PREALLOCATE=false for each process to share it"


def _first_line(message: str) -> str:
    return message.splitlines()[0][:MAX_REASON]


def memory_plan(trainer: Trainer, members: Sequence[Member]) -> MemoryPlan:
    """Sums up the memory analyses of a compiled trainer's programs."""
    programs: Any = [trainer.train, trainer.evaluate]  # compiled
    if isinstance(trainer.init_program, jax.stages.Compiled):  # not that of a resumed run
        programs.append(trainer.init_program)
    train, evaluate, *init = (program.memory_analysis() for program in programs)
    platform = _device(trainer).platform
    # The first program's output is the state itself.
    others = [_bytes_added(evaluate, platform)]
    others += [_bytes_added(drawn, platform) - drawn.output_size_in_bytes for drawn in init]
    sharing = _devices_per_memory(trainer)
    state = sharing * train.argument_size_in_bytes
    return MemoryPlan(
        members=len(members) if sharing > 1 else _seeds_per_device(trainer, members),
        state=state,
        temporaries=sharing * max(_bytes_added(train, platform), *others),
        least_temporaries=sharing * max(others),
        code=sum(part.generated_code_size_in_bytes for part in (train, evaluate, *init)),
        checkpoint=buffer_bytes(state) if platform == "cpu" else 0,  # a CPU's are written from this memory
        limit=memory_limit(trainer),
    )


def _bytes_added(analysis: Any, platform: str) -> int:
    """Returns the bytes that a program needs in addition to its arguments: for temporaries, and outputs of new memory.

    A TPU's compiler counts arrays that share a place several times in the size of the temporaries. It allows programs
    by their peak, and in the one that was examined, this was the end of the last array's place: 12.3 GB, not 16.6 GB.
    """
    if platform == "tpu":
        return analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def memory_limit(trainer: Trainer) -> int | None:
    """Returns the bytes for arrays in the memory of a device of the trainer, including arrays that are there now.

    On an accelerator, `USABLE_SHARE` of what JAX may use; None if unknown. On a CPU, the least that Linux has left for
    everyone, for this process (``ulimit -v``) and for its control group (version 2).
    """
    device = _device(trainer)
    if device.platform != "cpu":
        usable = device_memory(device)
        return None if usable is None else int(USABLE_SHARE * usable)
    left = host_memory_left()
    return None if left is None else left + sum(array.nbytes for array in jax.live_arrays())


def host_memory_left() -> int | None:
    """Returns the bytes that this process can still allocate on the host; None if unknown."""
    left = [size for size in (_machine_left(), _process_left(), _control_group_left()) if size is not None]
    return min(left, default=None)


def _machine_left() -> int | None:
    lines = _lines_of(PROC / "meminfo")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _process_left() -> int | None:
    limits = (line.split()[3] for line in _lines_of(PROC / "self/limits") if line.startswith("Max address space"))
    limit = next(limits, "unlimited")
    used = (int(line.split()[1]) * 1024 for line in _lines_of(PROC / "self/status") if line.startswith("VmSize:"))
    return None if limit == "unlimited" else max(0, int(limit) - next(used, 0))


def _control_group_left() -> int | None:
    """Returns the least that is left in the process's group and its parents; cached files count as free."""
    path = next((line[3:] for line in _lines_of(PROC / "self/cgroup") if line.startswith("0::")), "/")
    group, left = CGROUP / path.lstrip("/"), []
    for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(CGROUP))):
        limit, used = (_lines_of(folder / f"memory.{name}") for name in ("max", "current"))
        if limit and used and limit != ["max"]:
            sizes = dict(line.split() for line in _lines_of(folder / "memory.stat"))
            cached = sum(int(sizes.get(name, 0)) for name in ("active_file", "inactive_file", "slab_reclaimable"))
            left.append(max(0, int(limit[0]) - int(used[0]) + cached))
    return min(left, default=None)


def _lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _lines(trainer: Trainer, members: Sequence[Member], plan: MemoryPlan) -> Iterator[str]:
    yield str(plan)
    if trainer.memory_groups > 1:
        size = _seeds_per_device(trainer, members) // trainer.memory_groups
        seeds = "1 seed" if size == 1 else f"{size} seeds"
        yield f"memory: not all seeds fit simultaneously: on each device they learn {seeds} at a time"


def _state_bytes(trainer: Trainer, members: Sequence[Member]) -> int:
    """Returns the bytes of the train states in one memory; devices that share a batch hold a copy each."""
    leaves = jax.tree.leaves(abstract_state(trainer, members))
    per_device = (math.prod(trainer.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return _devices_per_memory(trainer) * sum(per_device)


def _devices_per_memory(trainer: Trainer) -> int:
    """Counts the devices that use one memory: all devices of a CPU use the machine's."""
    return len(trainer.sharding.device_set) if _device(trainer).platform == "cpu" else 1


def _seeds_per_device(trainer: Trainer, members: Sequence[Member]) -> int:
    return trainer.sharding.shard_shape((len(members),))[0]


def _device(trainer: Trainer) -> Any:
    return next(iter(trainer.sharding.device_set))
