"""What a run takes of the memory, read off its compiled programs before anything is allocated.

Where the backward passes of all seeds at once would not fit, the seeds learn in groups, one after the other.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.runs.checkpoint_pieces import buffer_bytes
from wqmix_jax.runs.startup import megabytes
from wqmix_jax.training.compiled_loop import Trainer
from wqmix_jax.training.host_loop import Compilation, abstract_state, compile_trainer
from wqmix_jax.training.members import Member

MAX_REASON = 200
"""Characters of JAX's message."""

_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|ALLOC_FAILED|failed to (create|allocate).*(handle|memory)", re.IGNORECASE
)
"""JAX's messages about a full device; cuBLAS and cuDNN can't make their handles then."""

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class MemoryPlan(NamedTuple):
    """What the programs take of one memory: that of the machine for a CPU, of one device otherwise.

    Attributes:
        members: how many trainings share it.
        state: bytes of their train states, the replays among them.
        temporaries: bytes of what the programs compute on their way, and of their records.
        checkpoint: bytes that writing or reading a checkpoint takes at most, in addition to the states.
        limit: bytes that are there for it; None where nobody tells.
    """

    members: int
    state: int
    temporaries: int
    checkpoint: int
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.state + self.temporaries + self.checkpoint

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.limit is None or self.total <= self.limit

    def __str__(self) -> str:
        parts = f"{megabytes(self.state)} of states and replays, {megabytes(self.temporaries)} of temporaries"
        parts += f", {megabytes(self.checkpoint)} for checkpoints" if self.checkpoint else ""
        there = "" if self.limit is None else f"; {megabytes(self.limit)} are there"
        each = megabytes(self.total / self.members)
        return f"memory: {each} per seed, {megabytes(self.total)} in all ({parts}){there}"


def refuse_small_memory(trainer: Trainer, members: Sequence[Member]) -> None:
    """Says before anything compiles that not even the train states would fit.

    Raises:
        ConfigError: if so.
    """
    num_bytes, limit = _state_bytes(trainer, members), memory_limit(trainer)
    if limit is not None and num_bytes > limit:
        told = f"their states and replays take {megabytes(num_bytes)}, and {megabytes(limit)} are there"
        raise ConfigError(f"training {len(members)} seeds at once is not allowed: {told}")


def compile_within_memory(
    trainer: Trainer, members: Sequence[Member], regroup: Callable[[int], Trainer], *, fresh: bool = True
) -> tuple[Trainer, Compilation, list[str]]:
    """`compile_trainer`, in as few groups of seeds as fit into the memory.

    Args:
        trainer: the trainer.
        members: as many as will train.
        regroup: the same trainer with another `Trainer.learner_groups`.
        fresh: see `compile_trainer`.

    Returns:
        The compiled trainer, how it was compiled, and lines that say what it takes.

    Raises:
        RunError: where the seeds don't fit one by one either.
    """
    trainer, compilation = compile_trainer(trainer, members, fresh=fresh)
    plan = memory_plan(trainer, members)
    for groups in _numbers_of_groups(plan, _seeds_per_device(trainer, members)):
        trainer, more = compile_trainer(regroup(groups), members, fresh=fresh)
        plan, compilation = memory_plan(trainer, members), compilation + more
        if plan.fits:
            break
    if not plan.fits:
        raise RunError(f"too little memory, fewer seeds may do: {plan}")
    return trainer, compilation, list(_lines(trainer, members, plan))


@contextlib.contextmanager
def memory_faults_in_one_line() -> Iterator[None]:
    """Turns JAX's errors of a device's memory into one line that says what to do.

    Raises:
        RunError: if there is one.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        raise RunError(_out_of_memory(str(error), jax.local_devices()[0])) from error


def _out_of_memory(message: str, device: Any) -> str:
    """Several processes share a GPU where one is evaluated while another trains, or a sweep runs side by side."""
    told = f"out of memory ({message.splitlines()[0][:MAX_REASON]}); fewer seeds may do"
    preallocates = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    if device.platform not in ("gpu", "cuda", "rocm") or not preallocates:
        return told
    cause = "or another process uses the GPU, of which JAX takes 75% when it starts"
    return f"{told}, {cause}: XLA_PYTHON_CLIENT_PREALLOCATE=false for each process lets them share it"


def memory_plan(trainer: Trainer, members: Sequence[Member]) -> MemoryPlan:
    """What a compiled trainer's programs say of themselves."""
    programs: Any = (trainer.train, trainer.evaluate)  # compiled
    train, evaluate = (program.memory_analysis() for program in programs)
    beside_state = max(
        train.temp_size_in_bytes + train.output_size_in_bytes - train.alias_size_in_bytes,
        evaluate.temp_size_in_bytes + evaluate.output_size_in_bytes,
    )
    sharing = _devices_per_memory(trainer)
    num_members = len(members) if sharing > 1 else _seeds_per_device(trainer, members)
    state = sharing * train.argument_size_in_bytes
    on_host = _device(trainer).platform == "cpu"  # where checkpoints are written from
    return MemoryPlan(
        members=num_members,
        state=state,
        temporaries=sharing * beside_state,
        checkpoint=buffer_bytes(state) if on_host else 0,
        limit=memory_limit(trainer),
    )


def memory_limit(trainer: Trainer) -> int | None:
    """Bytes for arrays in the memory that a device of the trainer uses, those that lie there now included.

    A CPU's is what Linux has left for everyone, for this process (``ulimit -v``) and for its control group (version 2).
    """
    device = _device(trainer)
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    left = host_memory_left()
    return None if left is None else left + sum(array.nbytes for array in jax.live_arrays())


def host_memory_left() -> int | None:
    """Bytes that this process can still allocate on the host; None if unknown."""
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
    """The least of the process's own group and those that it is in; the files that Linux caches make way."""
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


def _numbers_of_groups(plan: MemoryPlan, num_seeds: int) -> Iterator[int]:
    """What to try where the seeds don't fit at once: what should do, as their temporaries shrink, then one by one."""
    if plan.fits or num_seeds == 1:
        return
    divisors = [number for number in range(2, num_seeds + 1) if num_seeds % number == 0]
    should_do = (number for number in divisors if plan._replace(temporaries=plan.temporaries // number).fits)
    yield from dict.fromkeys((next(should_do, num_seeds), num_seeds))


def _lines(trainer: Trainer, members: Sequence[Member], plan: MemoryPlan) -> Iterator[str]:
    yield str(plan)
    if trainer.learner_groups > 1:
        size = _seeds_per_device(trainer, members) // trainer.learner_groups
        seeds = "1 seed" if size == 1 else f"{size} seeds"
        yield f"memory: not all seeds fit at once: on each device they learn {seeds} at a time"


def _state_bytes(trainer: Trainer, members: Sequence[Member]) -> int:
    """Of the train states in one memory; devices that share a batch hold a copy each."""
    leaves = jax.tree.leaves(abstract_state(trainer, members))
    per_device = (math.prod(trainer.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return _devices_per_memory(trainer) * sum(per_device)


def _devices_per_memory(trainer: Trainer) -> int:
    """Those of a CPU all use the machine's."""
    return len(trainer.sharding.device_set) if _device(trainer).platform == "cpu" else 1


def _seeds_per_device(trainer: Trainer, members: Sequence[Member]) -> int:
    return trainer.sharding.shard_shape((len(members),))[0]


def _device(trainer: Trainer) -> Any:
    return next(iter(trainer.sharding.device_set))
