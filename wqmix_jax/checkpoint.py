"""Checkpoints of a whole run through orbax: the train state, and how far the records were written.

A checkpoint is named by the slowest seed's environment steps and appears under that name only when it is complete.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from wqmix_jax.config import ConfigError
from wqmix_jax.loop import Loop, abstract_interval, abstract_state, env_steps, join, num_pending
from wqmix_jax.trainer import Trainer, TrainRecord, TrainState
from wqmix_jax.types import PyTree

SCHEMA = 1
"""Version of what a checkpoint holds."""


class Restored(NamedTuple):
    """A run as a checkpoint holds it.

    Attributes:
        loop: where it stood.
        metrics_bytes: how long ``metrics.jsonl`` was then.
        wall_seconds: wall-clock seconds of the run until then.
    """

    loop: Loop
    metrics_bytes: int
    wall_seconds: float


class Checkpoints:
    """The checkpoints of one run: two items each, ``arrays`` (the train state and the pending records) and ``host``."""

    def __init__(self, directory: Path, trainer: Trainer, seeds: Sequence[int], *, keep: int) -> None:
        """Opens the folder, made where absent, for runs of ``trainer`` with ``seeds``; the latest ``keep`` are kept."""
        self._seeds = tuple(seeds)
        self._sharding = trainer.sharding
        self._state = abstract_state(trainer, seeds)
        self._interval = abstract_interval(trainer, seeds)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
            item_handlers={"arrays": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()},
        )

    def save(self, loop: Loop, *, metrics_bytes: int, wall_seconds: float) -> None:
        """Writes a checkpoint and returns when it is complete; does nothing where the latest is of the same step."""
        step = int(env_steps(loop).min())
        if step == self._manager.latest_step():
            return
        host = {
            "schema": SCHEMA,
            "seeds": list(loop.seeds),
            "env_steps": env_steps(loop).tolist(),
            "total_env_steps": np.array(loop.state.total_env_steps).tolist(),
            "evaluated_at": loop.evaluated_at.tolist(),
            "num_pending": num_pending(loop),
            "seconds": loop.seconds,
            "metrics_bytes": metrics_bytes,
            "wall_seconds": wall_seconds,
        }
        arrays = {**_flat("state", _raw_keys(loop.state)), **_flat("pending", self._padded(loop))}
        self._manager.save(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave(host))
        )

    def restore(self, total_env_steps: int) -> Restored | None:
        """Reads the checkpoint from which a run to ``total_env_steps`` goes on, and removes those after it.

        That is the latest, unless a seed rests in it that a longer run would have trained on: then the latest before
        any seed came to rest, where it is still there, for the numbers of a run that was never cut.

        Returns:
            The run, with its new total, or None if there is no checkpoint.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        hosts = {step: self._host(step) for step in steps}
        exact = (step for step in steps if not _rests(hosts[step], total_env_steps))
        step = next(exact, steps[0])
        restored = self._read(step, hosts[step], total_env_steps)
        for later in steps[: steps.index(step)]:
            self._manager.delete(later)
        return restored

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _host(self, step: int) -> dict[str, Any]:
        host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        if host["schema"] != SCHEMA or host["seeds"] != list(self._seeds):
            found = f"schema {host['schema']} and seeds {host['seeds']}"
            raise ConfigError(
                f"{self._manager.directory / str(step)} holds {found}, but schema {SCHEMA} and seeds "
                f"{list(self._seeds)} are needed"
            )
        return host

    def _read(self, step: int, host: dict[str, Any], total_env_steps: int) -> Restored:
        abstract = {**_flat("state", jax.eval_shape(_raw_keys, self._state)), **_flat("pending", self._interval)}
        self._check_fits(step, abstract)
        on_device = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding_of(name))
            for name, leaf in abstract.items()
        }
        arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(on_device)))[
            "arrays"
        ]
        state = _typed_keys(_unflat("state", arrays, self._state))
        padded = _unflat("pending", arrays, self._interval)
        pending = jax.tree.map(lambda leaf: np.array(leaf)[: host["num_pending"]], padded)
        loop = Loop(
            state=state._replace(total_env_steps=jnp.full_like(state.total_env_steps, total_env_steps)),
            seeds=self._seeds,
            pending=(pending,) if host["num_pending"] else (),
            evaluated_at=np.array(host["evaluated_at"]),
            seconds=host["seconds"],
        )
        return Restored(loop, host["metrics_bytes"], host["wall_seconds"])

    def _sharding_of(self, name: str) -> Sharding:
        """The pending records, whose seeds are the second axis, are only on their way to the host."""
        return self._sharding if name.startswith("state.") else SingleDeviceSharding(jax.local_devices()[0])

    def _check_fits(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> None:
        saved = self._manager.item_metadata(step)["arrays"]
        for name in sorted(abstract.keys() | saved.keys()):
            here, there = abstract.get(name), saved.get(name)
            if here is None or there is None or (here.shape, here.dtype) != (tuple(there.shape), there.dtype):
                path = self._manager.directory / str(step)
                raise ConfigError(f"{path} doesn't fit the run: {name} is {_shape(there)} there, {_shape(here)} here")

    def _padded(self, loop: Loop) -> TrainRecord:
        """The pending records, zeros up to a whole interval, so that checkpoints of a run are alike in shape."""
        empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._interval)
        if not loop.pending:
            return empty
        count = num_pending(loop)
        return jax.tree.map(lambda rows, zeros: np.concatenate([rows, zeros[count:]]), join(loop.pending), empty)


def _rests(host: dict[str, Any], total_env_steps: int) -> bool:
    """Whether some seed trains no more in this checkpoint although a run to ``total_env_steps`` would."""
    ended = zip(host["env_steps"], host["total_env_steps"], strict=True)
    return any(steps >= total and steps < total_env_steps for steps, total in ended)


def _raw_keys(state: TrainState) -> TrainState:
    """Typed keys as the integers they consist of."""
    return state._replace(keys=jax.tree.map(jax.random.key_data, state.keys))


def _typed_keys(state: TrainState) -> TrainState:
    """The inverse of `_raw_keys`."""
    return state._replace(
        keys=jax.tree.map(lambda data: jax.random.wrap_key_data(data, impl="threefry2x32"), state.keys)
    )


def _flat(prefix: str, tree: PyTree) -> dict[str, Any]:
    """Leaves by their paths: ``prefix.learner.params.agent..``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf for path, leaf in leaves}


def _unflat(prefix: str, leaves: dict[str, Any], like: PyTree) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _flat(prefix, like)])


def _shape(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
