"""Time and size of a checkpoint: ``python -m experiments.checkpoint_cost [--seeds 1 8 16]``.

OW-QMIX on predator-prey with the paper's sizes; every array is full of random bytes, the worst case for compression.
Prints one JSON line per number of seeds, each measured in a separate process. ``save_extra_megabytes`` and
``restore_extra_megabytes`` are the peak memory of the process during the operation, without the train state (Linux
only).
"""

import gc
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from wqmix_jax import load_config
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count
from wqmix_jax.runs.checkpoints import Checkpoints, Origin
from wqmix_jax.runs.saved_policies import no_policy
from wqmix_jax.training.compiled_loop import abstract_interval, abstract_state, make_trainer
from wqmix_jax.training.host_loop import Loop
from wqmix_jax.training.members import make_members

STATUS = Path("/proc/self/status")


@command
def main() -> None:
    """Measures each number of seeds, and prints the numbers."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--seeds", type=count, nargs="+", default=[1, 8, 16])
    for num_seeds in parser.parse_args().seeds:
        with (
            tempfile.TemporaryDirectory(dir=".") as folder,
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            print(json.dumps(pool.submit(measure, num_seeds, Path(folder)).result()), flush=True)


class PeakMemory:
    """The growth of this process's memory inside a ``with`` block, at its peak.

    Attributes:
        megabytes: the growth; 0 if the system doesn't report it.
    """

    megabytes = 0.0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if STATUS.is_file():
            (STATUS.parent / "clear_refs").write_text("5")  # resets the peak
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if STATUS.is_file():
            self.megabytes = round((resident("VmHWM") - self._before) / 1e6, 1)


def resident(name: str) -> int:
    """Returns a field of the process's memory status in bytes."""
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def random_array(leaf: Any) -> jax.Array:
    """Returns an array of random bytes with the shape and dtype of ``leaf``."""
    rng = np.random.default_rng(0)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jnp.asarray(rng.integers(0, 2**32, (*leaf.shape, 2), np.uint32)), impl="threefry2x32"
        )
    if leaf.dtype == bool:
        return jnp.zeros(leaf.shape, bool)
    return jnp.asarray(np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape))


def measure(num_seeds: int, folder: Path) -> dict[str, float]:
    """Saves and restores one checkpoint in ``folder``, and returns times, sizes and peak memory."""
    config = load_config("+algo=ow_qmix", f"num_seeds={num_seeds}")
    trainer = make_trainer(config, sharding=SingleDeviceSharding(jax.local_devices()[0]))
    members = make_members(config.algo, config.seeds, {})
    state = jax.tree.map(random_array, abstract_state(trainer, members))
    best = no_policy(config.algo.acting_params(state.learner.params))
    loop = Loop(state, members, (), np.zeros(num_seeds, np.int32), 0.0)
    origin = Origin("measured", {}, {})
    checkpoints = Checkpoints(folder, trainer, members, abstract_interval(trainer, members), best, origin, keep=1)
    with PeakMemory() as saving:
        started = time.perf_counter()
        checkpoints.save(loop, best, callbacks={}, metrics_bytes=0, wall_seconds=0.0)
        blocked = time.perf_counter() - started
        checkpoints.wait()
        saved = time.perf_counter() - started
    with PeakMemory() as restoring:
        started = time.perf_counter()
        restored = checkpoints.restore(config.total_env_steps)
        assert restored is not None
        jax.block_until_ready(restored.loop.state)
        seconds = time.perf_counter() - started
    np.testing.assert_array_equal(restored.loop.state.replay.experience, state.replay.experience)
    checkpoints.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "num_seeds": num_seeds,
        "megabytes": round(checkpoints.num_bytes / 1e6, 1),
        "megabytes_on_disk": round(size / 1e6, 1),
        "save_seconds_training_waits": round(blocked, 3),
        "save_seconds_until_on_disk": round(saved, 3),
        "restore_seconds": round(seconds, 3),
        "save_extra_megabytes": saving.megabytes,
        "restore_extra_megabytes": round(restoring.megabytes - checkpoints.num_bytes / 1e6, 1),
    }


if __name__ == "__main__":
    main()
