"""Checkpoints of a whole run through orbax: train state, best policies, and the length of the records at that time.

A checkpoint is named by `host_loop.slowest_steps` and appears under that name only when it is complete. It is written
and read in pieces, see `checkpoint_pieces`, so a CPU never copies the replay as a whole. On a CPU, and where the host
has no room for a copy of an accelerator's state, training waits until a checkpoint is written, because the next chunk
overwrites the state. Otherwise the state is copied to the host, and other threads write it while training continues.
"""

import asyncio
import collections
import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.options import AsyncOptions, MultiprocessingOptions
from orbax.checkpoint.type_handlers import (
    NumpyHandler,
    create_type_handler_registry,
    get_json_tspec_read,
    get_json_tspec_write,
)

from wqmix_jax.config import with_newer_options
from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.records.run_dir import differing, kept_options
from wqmix_jax.runs.checkpoint_pieces import (
    BATCH_BYTES,
    PIECE_BYTES,
    Index,
    Pieces,
    assemble,
    assemble_on_host,
    buffer_bytes,
    checksum,
    piece_indices,
    piece_shape,
)
from wqmix_jax.runs.output import report
from wqmix_jax.runs.saved_policies import Policy, flat
from wqmix_jax.training.compiled_loop import Trainer, TrainRecord, TrainState, abstract_interval, abstract_state
from wqmix_jax.training.host_loop import (
    Loop,
    env_steps,
    join,
    num_pending,
    slowest_steps,
)
from wqmix_jax.training.members import Member
from wqmix_jax.types import PyTree

SCHEMA = 2
"""Version of a checkpoint's contents."""

MAX_REASON = 200
"""The most characters of another library's message."""


class Origin(NamedTuple):
    """The run that a checkpoint belongs to, and the machine that wrote it.

    Attributes:
        run: the run's random name, see `wqmix_jax.records.metrics`.
        options: the options that never change within a run, by their dotted names.
        machine: the facts that bit-equal numbers depend on: version and settings of jax, kind and number of devices.
    """

    run: str
    options: dict[str, Any]
    machine: dict[str, Any]


class Restored(NamedTuple):
    """A run as a checkpoint holds it.

    Attributes:
        loop: the state of training.
        best: the best policies so far.
        metrics_bytes: the size of ``metrics.jsonl`` when the checkpoint was written.
        wall_seconds: wall-clock seconds of the run until then.
        callbacks: the states of the callbacks by their names.
    """

    loop: Loop
    best: Policy
    metrics_bytes: int
    wall_seconds: float
    callbacks: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, two items each: ``arrays`` (state, pending records, best policies) and ``host``.

    Attributes:
        num_bytes: the most bytes that the arrays of one checkpoint take; on disk they are compressed.
    """

    def __init__(
        self,
        directory: Path,
        trainer: Trainer,
        members: tuple[Member, ...],
        interval: TrainRecord,
        best: Policy,
        origin: Origin,
        *,
        keep: int,
        memory_left: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Opens the folder, and makes it if there is none.

        Args:
            directory: the folder.
            trainer: the run's trainer.
            members: the members.
            interval: the shapes of the records of an evaluation interval, see `abstract_interval`.
            best: a policy with the shapes of this run.
            origin: the run and this machine.
            keep: how many of the latest checkpoints are kept.
            memory_left: returns the free bytes of the host's memory, or None if unknown.
        """
        self._members, self._origin, self._sharding = members, origin, trainer.sharding
        self._state = abstract_state(trainer, members)
        self._interval, self._best = interval, best
        self._abstract = _named(_raw_shapes(self._state), interval, best)
        self._memory_left = memory_left
        self.num_bytes = _num_bytes(self._abstract)
        _hush_orbax()
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._manager = _manager(self._directory, keep)
        self._latest = self._manager.latest_step()

    def save(
        self, loop: Loop, best: Policy, *, metrics_bytes: int, wall_seconds: float, callbacks: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint or starts writing it; does nothing if the latest has the same step.

        Args:
            loop: the state of training.
            best: the best policies so far.
            metrics_bytes: the size of ``metrics.jsonl``.
            wall_seconds: wall-clock seconds of the run so far.
            callbacks: the states of the callbacks by their names, plain data.

        Raises:
            RunError: if there is no room for it, or the previous one could not be written.
        """
        step = slowest_steps(loop)
        if step == self._latest:
            return
        self.wait()
        self._check_room()
        named = _named(_raw_keys(loop.state), self._padded(loop), best)
        waits = not self._has_room_for_copies()
        arrays = {name: Pieces(leaf) for name, leaf in named.items()}
        if not waits:
            arrays = {name: Pieces(assemble_on_host(pieces, pieces)) for name, pieces in arrays.items()}
        host = {
            "schema": SCHEMA,
            **self._origin._asdict(),
            "members": [member.labels for member in loop.members],
            "env_steps": env_steps(loop).tolist(),
            "failed": np.array(loop.state.failed).tolist(),
            "total_env_steps": np.array(loop.state.total_env_steps).tolist(),
            "evaluated_at": loop.evaluated_at.tolist(),
            "num_pending": num_pending(loop),
            "seconds": loop.seconds,
            "metrics_bytes": metrics_bytes,
            "wall_seconds": wall_seconds,
            "callbacks": callbacks,
            "crc32": _checksum(arrays),
        }
        with self._writing():
            self._manager.save(
                step, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), host=ocp.args.JsonSave(host))
            )
        self._latest = step
        if waits:  # the next chunk overwrites the arrays
            self.wait()

    def check(self) -> None:
        """Looks for a checkpoint that could not be written.

        Raises:
            RunError: if a checkpoint could not be written.
        """
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is on the disk.

        Raises:
            RunError: if it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, total_env_steps: int) -> Restored | None:
        """Reads the checkpoint from which a run to ``total_env_steps`` continues, and removes those after it.

        Usually this is the latest. It is an earlier one if the longer run would train a seed further that has stopped
        in the latest: then the last one in which no seed has stopped, if it was kept, so that the result equals that of
        an uninterrupted run, unless something is scheduled over ``total_env_steps``. A checkpoint that can't be read,
        doesn't fit, or belongs to another run is reported and moved aside, and another one is used.

        Returns:
            The run, with its new total, or None if there is no checkpoint.

        Raises:
            ConfigError: if a checkpoint was made with other options, or none can be used; nothing was removed then.
            RunError: if the memory is too small to read a checkpoint.
        """
        hosts: dict[int, dict[str, Any]] = {}
        unusable: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            with _noting(unusable, step):
                hosts[step] = self._host(step)
        # Episodes differ in length, so seeds reach their total in different iterations. One that has reached it is
        # frozen while the others train on, and when the last one stops, an evaluation cuts the current interval short.
        # A run with the larger total from the start would have done neither: from a checkpoint with a frozen seed,
        # that seed would lag behind the others, and all later evaluations would be shifted. So the checkpoints without
        # a frozen seed come first, the latest of them before the others; `Session._save_if_due` writes one just before
        # any seed may stop. One with a frozen seed is used only if nothing else is left.
        for step in sorted(hosts, key=lambda step: (_has_stopped_seeds(hosts[step], total_env_steps), -step)):
            with _noting(unusable, step):
                restored = self._read(step, hosts[step], total_env_steps)
            if step in unusable:
                continue
            self._move_aside(unusable)
            for later in (later for later in hosts if later > step and later not in unusable):
                self._manager.delete(later)
            self._latest = step
            self._warn_of_another_machine(hosts[step])
            return restored
        if unusable:
            reasons = "; ".join(f"{self._directory / str(step)} can't be used: {why}" for step, why in unusable.items())
            raise ConfigError(f"{reasons}; a new run_dir=FOLDER starts over, and the records can still be read")
        return None

    def close(self) -> None:
        """Waits for the checkpoint that is being written, and releases the folder.

        Raises:
            RunError: if it could not be written.
        """
        with self._writing():
            self._manager.close()

    def _host(self, step: int) -> dict[str, Any]:
        """Reads the item ``host`` of a checkpoint.

        Raises:
            ConfigError: if its schema or its options are not those of this run.
            ValueError: if it belongs to another run.
        """
        host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        path = self._directory / str(step)
        if host["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {host['schema']}; this version of wqmix_jax reads schema {SCHEMA}")
        here = self._origin.options
        # Options newer than the checkpoint count as their defaults.
        names = {"algo": ("_target_", "returns"), "env": ("_target_",)}
        classes = {
            group: {name: here[f"{group}.{name}"] for name in known if f"{group}.{name}" in here}
            for group, known in names.items()
        }
        newer = {name: value for name, value in kept_options(with_newer_options(classes)).items() if name in here}
        there = {**newer, **host["options"]}
        for name in sorted(differing(there, here)):
            values = f"{name}={there.get(name)!r}, but the run's config.yaml has {here.get(name)!r}"
            raise ConfigError(f"{path} was made with {values}")
        if host["run"] != self._origin.run:
            raise ValueError(f"it is of another run ({host['run']}, and this is {self._origin.run})")
        return host

    def _read(self, step: int, host: dict[str, Any], total_env_steps: int) -> Restored:
        self._check_fits(step)
        stored = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore()))["arrays"]
        arrays, crc = self._assembled(stored)
        if crc != host["crc32"]:
            raise ValueError("its arrays are not those that were saved (crc32)")
        state = _typed_keys(jax.device_put(_unflat("state", arrays, self._state), self._sharding))
        padded = _unflat("pending", arrays, self._interval)
        pending = jax.tree.map(lambda leaf: leaf[: host["num_pending"]], padded)
        loop = Loop(
            state=state._replace(total_env_steps=jnp.full_like(state.total_env_steps, total_env_steps)),
            members=self._members,
            pending=(pending,) if host["num_pending"] else (),
            evaluated_at=np.array(host["evaluated_at"]),
            seconds=host["seconds"],
        )
        best = _unflat("best", arrays, self._best)
        callbacks = host.get("callbacks", {})  # absent in checkpoints older than callbacks
        return Restored(loop, best, host["metrics_bytes"], host["wall_seconds"], callbacks)

    def _assembled(self, stored: "Mapping[str, _Stored]") -> tuple[dict[str, Any], int]:
        """Returns all arrays, those of the state on their devices, and their checksum."""
        crc = 0

        def checked(pieces: "_Stored") -> Iterator[tuple[Index, np.ndarray]]:
            nonlocal crc
            for index, piece in pieces:
                crc = checksum(piece, crc)
                yield index, piece

        arrays = {}
        for name in sorted(stored):
            pieces, like = checked(stored[name]), self._abstract[name]
            on_device = name.startswith("state.")
            arrays[name] = assemble(pieces, like) if on_device else assemble_on_host(pieces, stored[name])
        return arrays, crc

    def _check_fits(self, step: int) -> None:
        saved = self._manager.item_metadata(step)["arrays"]
        for name in sorted(self._abstract.keys() | saved.keys()):
            here, there = self._abstract.get(name), saved.get(name)
            if here is None or there is None or _kind(name, here) != _kind(name, there):
                raise ValueError(f"it doesn't fit the run: {name} is {_shape(there)} there, {_shape(here)} here")

    def _move_aside(self, unusable: Mapping[int, str]) -> None:
        for step, reason in unusable.items():
            aside = self._directory.with_name(f"unusable_checkpoint_{step}")
            if aside.exists():
                shutil.rmtree(aside)
            (self._directory / str(step)).rename(aside)
            report(f"warning: {self._directory / str(step)} can't be used: {reason}; it is {aside} now")
        if unusable:
            self._manager.reload()

    def _warn_of_another_machine(self, host: Mapping[str, Any]) -> None:
        for name, here in self._origin.machine.items():
            if (there := host["machine"].get(name, here)) != here:  # absent in checkpoints older than the fact
                change = f"{name} is {here}, and was {there} when the checkpoint was made"
                report(f"warning: {change}; the numbers will not be equal to the last bit")

    def _has_room_for_copies(self) -> bool:
        """Returns True if the state is on an accelerator, and the host's memory can take a copy of it."""
        if next(iter(self._sharding.device_set)).platform == "cpu":
            return False
        left = self._memory_left()
        return left is None or left > self.num_bytes + buffer_bytes(self.num_bytes)

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < self.num_bytes:
            raise RunError(self._message(f"one may take {self.num_bytes:,} bytes, and {free:,} are free"))

    def _message(self, reason: str) -> str:
        latest = self._manager.latest_step()
        kept = "there is none before it" if latest is None else f"the last good one is {self._directory / str(latest)}"
        return f"no checkpoint could be written to {self._directory}: {reason}; {kept}"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns any exception into a `RunError`: orbax raises those of its threads at any of its calls."""
        try:
            yield
        except Exception as error:
            raise RunError(self._message(_reason(error))) from error

    def _padded(self, loop: Loop) -> TrainRecord:
        """Pads the pending records with zeros to a whole interval, so that a run's checkpoints have equal shapes."""
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._interval)
        if not loop.pending:
            return empty
        count = num_pending(loop)
        return jax.tree.map(lambda rows, zeros: np.concatenate([rows, zeros[count:]]), join(loop.pending), empty)


def read_learner(directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Reads the learner in the latest checkpoint of any run, whatever its options; the folder stays as it is.

    Args:
        directory: the folder of its checkpoints.

    Returns:
        The checkpoint's path, and the arrays ``[S, ..]`` by their paths in the `LearnerState`.

    Raises:
        ConfigError: if there is no checkpoint, or it can't be read.
    """
    _hush_orbax()
    if not any(directory.glob("[0-9]*")):
        raise ConfigError(f"{directory} has no checkpoint")
    prefix = "state.learner."
    with contextlib.closing(_manager(directory.absolute(), None, read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"{directory} has no finished checkpoint")
        path = directory / str(step)
        try:
            stored = manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore()))["arrays"]
            found = {name: assemble_on_host(each, each) for name, each in stored.items() if name.startswith(prefix)}
        except Exception as error:  # damaged bytes may raise anything
            raise ConfigError(f"{path} can't be read: {_reason(error)}") from error
    return path, {name.removeprefix(prefix): leaf for name, leaf in found.items()}


def checkpoint_bytes(trainer: Trainer, members: Sequence[Member], best: Policy) -> int:
    """Returns the most bytes that the arrays of a checkpoint take, before there is a folder for them."""
    state = _raw_shapes(abstract_state(trainer, members))
    return _num_bytes(_named(state, abstract_interval(trainer, members), best))


def _num_bytes(arrays: Mapping[str, Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())


def _named(state: TrainState, pending: TrainRecord, best: Policy) -> dict[str, Any]:
    """Returns all arrays of a checkpoint by their names; those without elements are left out, which orbax refuses."""
    named = {**_flat("state", state), **_flat("pending", pending), **_flat("best", best)}
    return {name: leaf for name, leaf in named.items() if leaf.size}


def _manager(directory: Path, keep: int | None, *, read_only: bool = False) -> ocp.CheckpointManager:
    """Makes orbax's manager for this process alone, even if JAX connects it with others."""
    index = jax.process_index()
    alone = MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    handler = _InPieces(deepcopy_host_arrays=False)  # `Checkpoints.save` keeps them unchanged
    arrays = ocp.PyTreeCheckpointHandler(
        multiprocessing_options=alone, type_handler_registry=create_type_handler_registry((Pieces, handler))
    )
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            multiprocessing_options=alone,
            # Otherwise connected processes take each other's signals that a folder is there.
            async_options=AsyncOptions(create_directories_asynchronously=False),
        ),
        item_handlers={"arrays": arrays, "host": ocp.JsonCheckpointHandler(multiprocessing_options=alone)},
    )


class _InPieces(NumpyHandler):
    """Writes and reads arrays as orbax does numpy's, but with a bounded number of bytes at a time.

    Each process writes its own arrays, where orbax would take them for copies and write only those of process 0.
    """

    async def _background_serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        opened = []
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            await info.await_path_creation()
            spec = get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=jax.process_index(),
                arg=arg,
            )
            spec["metadata"]["chunks"] = piece_shape(value.shape, value.dtype)
            opened.append(tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context))
        stores = await asyncio.gather(*opened)
        writes, num_bytes = [], 0
        for value, store in zip(values, stores, strict=True):
            for index, piece in value:
                writes.append(store[index].write(piece, can_reference_source_data_indefinitely=True))
                num_bytes += piece.nbytes
                if num_bytes >= BATCH_BYTES:
                    await asyncio.gather(*writes)
                    writes, num_bytes = [], 0
        await asyncio.gather(*writes)

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        """Opens the arrays; they are read when their pieces are requested."""
        opened = []
        for info in infos:
            spec = get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            opened.append(tensorstore.open(tensorstore.Spec(spec), open=True, context=info.ts_context))
        return [_Stored(store) for store in await asyncio.gather(*opened)]


class _Stored:
    """An array of a checkpoint; iterating reads its pieces.

    Attributes:
        shape: the shape of the whole array.
        dtype: its dtype.
    """

    def __init__(self, store: Any) -> None:
        self.shape, self.dtype, self._store = tuple(store.shape), store.dtype.numpy_dtype, store

    def __iter__(self) -> Iterator[tuple[Index, np.ndarray]]:
        """Yields place and content of each piece, in order; some are read ahead."""
        piece = piece_shape(self.shape, self.dtype)
        if tuple(self._store.chunk_layout.read_chunk.shape) != piece:  # earlier versions wrote arrays in one piece
            piece = self.shape
        indices = piece_indices(self.shape, piece)
        ahead = collections.deque(
            (index, self._store[index].read()) for index in itertools.islice(indices, BATCH_BYTES // PIECE_BYTES)
        )
        while ahead:
            index, reading = ahead.popleft()
            yield index, reading.result()
            ahead.extend((index, self._store[index].read()) for index in itertools.islice(indices, 1))


@functools.cache
def _hush_orbax() -> None:
    """Silences orbax, which logs each error in hundreds of lines in addition to raising it.

    After an error its threads also complain that their event loop is closed.
    """
    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def _noting(unusable: dict[int, str], step: int) -> Iterator[None]:
    """Notes why a checkpoint can't be read; refusals, which say what to do, and a lack of memory are raised."""
    try:
        yield
    except ConfigError:
        raise
    except (MemoryError, jax.errors.JaxRuntimeError) as error:  # not the checkpoint's fault
        raise RunError(f"the checkpoint of step {step} can't be read: {_reason(error)}") from error
    except Exception as error:  # damaged bytes may raise anything
        unusable[step] = _reason(error)


def _reason(error: BaseException) -> str:
    """Returns an exception's message in one line of at most `MAX_REASON` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if os.strerror(code) in text:
            return os.strerror(code)
    text = re.sub(r" \[tensorstore_spec='.*?'\]", "", text)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}.."


def _checksum(arrays: Mapping[str, Pieces]) -> int:
    """Returns the CRC-32 of all bytes, in the order of the names."""
    crc = 0
    for name in sorted(arrays):
        for _, piece in arrays[name]:
            crc = checksum(piece, crc)
    return crc


def _has_stopped_seeds(host: dict[str, Any], total_env_steps: int) -> bool:
    """Returns True if a seed has stopped in this checkpoint that a run to ``total_env_steps`` would train further."""
    ended = zip(host["env_steps"], host["total_env_steps"], host["failed"], strict=True)
    return any(steps >= total and steps < total_env_steps and not failed for steps, total, failed in ended)


def _raw_keys(state: TrainState) -> TrainState:
    """Replaces typed keys by the integers they consist of."""
    return state._replace(keys=jax.tree.map(jax.random.key_data, state.keys))


def _raw_shapes(state: TrainState) -> TrainState:
    """Returns shapes, dtypes and devices of `_raw_keys`, from those of a train state."""
    return jax.tree.map(
        lambda leaf, raw: jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding),
        state,
        jax.eval_shape(_raw_keys, state),
    )


def _typed_keys(state: TrainState) -> TrainState:
    """Inverts `_raw_keys`."""
    return state._replace(
        keys=jax.tree.map(lambda data: jax.random.wrap_key_data(data, impl="threefry2x32"), state.keys)
    )


def _flat(prefix: str, tree: PyTree) -> dict[str, Any]:
    """Returns leaves by their paths: ``prefix.learner.params.agent..``."""
    return {f"{prefix}.{name}": leaf for name, leaf in flat(tree).items()}


def _unflat(prefix: str, leaves: dict[str, Any], like: PyTree) -> PyTree:
    found = [
        leaves[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype) for name, leaf in _flat(prefix, like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _kind(name: str, leaf: Any) -> tuple[Any, ...]:
    """Returns dtype and shape, without the number of pending iterations, in which checkpoints may differ."""
    return leaf.dtype, tuple(leaf.shape)[1 if name.startswith("pending.") else 0 :]


def _shape(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
