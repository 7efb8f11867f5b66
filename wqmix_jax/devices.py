"""Which devices train: seeds never need to talk, so they are spread over the devices in equal parts."""

import contextlib
import os

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

SEED_AXIS = "seeds"
"""The mesh axis that the leading axis ``S`` of a train state is spread over."""


def seed_sharding(num_seeds: int) -> Sharding:
    """Spreads ``num_seeds`` over as many of this process's devices as hold equally many each.

    On a CPU that is a device per core where the count allows it: XLA runs the body of a loop on one core, so seeds side
    by side use the machine better. It can only be arranged before JAX starts its backend; later, one device trains all.
    """
    claim_cores(num_seeds)
    devices = jax.local_devices()
    count = _most_equal_parts(num_seeds, len(devices))
    if count == 1:
        return SingleDeviceSharding(devices[0])
    return NamedSharding(jax.sharding.Mesh(np.array(devices[:count]), SEED_AXIS), PartitionSpec(SEED_AXIS))


def claim_cores(num_seeds: int) -> None:
    """Makes the CPU as many devices as seeds go evenly on its cores; leaves alone what the user has set.

    It has no effect once JAX's backend runs, which the import of some environments starts.
    """
    if jax.config.values["jax_num_cpu_devices"] > 0 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # the backend runs already
        jax.config.update("jax_num_cpu_devices", _most_equal_parts(num_seeds, num_cores()))


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _most_equal_parts(num_seeds: int, most: int) -> int:
    return max(parts for parts in range(1, max(1, most) + 1) if num_seeds % parts == 0)
