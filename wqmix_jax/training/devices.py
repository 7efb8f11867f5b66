"""The devices that train: seeds never exchange anything, so they are spread over the devices in equal parts.

A CPU has a device per core, since XLA runs the body of a loop on one core. If there are more cores than seeds, several
cores share a seed, and each learns from a part of its batches.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wqmix_jax.errors import ConfigError

SEED_AXIS, BATCH_AXIS = "seeds", "batch"
"""The mesh axes: the leading axis ``S`` of a train state is spread over the first and is whole along the second."""

GPUS = ("gpu", "cuda", "rocm")
"""JAX's names of the platform of a GPU."""

_GPU_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",  # its newer name
    "XLA_PYTHON_CLIENT_ALLOCATOR",
}
"""Variables by which a user decides how JAX takes a GPU's memory."""

TPU_MEMORY = {
    kind: int(gibibytes * 2**30)
    for kinds, gibibytes in [
        (("TPU v2",), 7.48),
        (("TPU v3",), 15.48),
        (("TPU v4",), 30.75),
        (("TPU v5 lite", "TPU v5e"), 15.75),
        (("TPU v5", "TPU v5p"), 95.74),
        (("TPU v6 lite", "TPU v6e"), 31.25),
    ]
    for kind in kinds
}
"""Bytes that a program may use on a device, by its kind: the memory of a chip, or of a core where a device is one (v2
and v3), less what a TPU keeps for itself. These are the limits that libtpu 0.0.42 names when it refuses a program; for
v4 that of a chip whose cores are one device, as on Cloud TPU."""

MIN_PART = 4
"""Episodes, or rows that episodes share; a batch is not cut into smaller parts."""


def seed_sharding(num_seeds: int, *, batch_size: int = 1, devices: Sequence[Any] | None = None) -> Sharding:
    """Spreads ``num_seeds`` over as many devices as possible, with equally many seeds on each.

    Args:
        num_seeds: how many train in one call.
        batch_size: episodes of a learner step, where devices of a CPU may share them; 1 where they may not.
        devices: the devices, for example those of a topology that is only compiled for; this process's if absent.
    """
    if devices is None:
        claim_cores()
        devices = jax.local_devices()
    # As many devices as possible, and as few as possible of them per seed: sharing a batch costs a sum over devices in
    # every learner step, spreading seeds costs nothing.
    most = batch_size // MIN_PART if devices[0].platform == "cpu" else 1
    seed_parts, batch_parts = max(
        (
            (seeds, parts)
            for seeds in _divisors(num_seeds, len(devices))
            for parts in _divisors(batch_size, min(max(most, 1), len(devices) // seeds))
        ),
        key=lambda shape: (shape[0] * shape[1], shape[0]),
    )
    if seed_parts * batch_parts == 1:
        return SingleDeviceSharding(devices[0])
    mesh = np.array(devices[: seed_parts * batch_parts]).reshape(seed_parts, batch_parts)
    return NamedSharding(jax.sharding.Mesh(mesh, (SEED_AXIS, BATCH_AXIS)), PartitionSpec(SEED_AXIS))


def claim_cores() -> None:
    """Makes the CPU as many devices as it has cores; leaves alone what the user has set.

    It has no effect once JAX's backend runs, which the import of some environments starts.
    """
    if jax.config.values["jax_num_cpu_devices"] > 0 or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # the backend runs already
        jax.config.update("jax_num_cpu_devices", num_cores())


def device_memory(device: Any) -> int | None:
    """Returns the bytes of an accelerator's memory that JAX may use, arrays that are there included; None if unknown.

    Args:
        device: a device of this machine, or one of a topology that is only compiled for, which has no statistics.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if "bytes_limit" in (stats := device.memory_stats() or {}):
            return stats["bytes_limit"]
    return TPU_MEMORY.get(device.device_kind)


def jax_precision(matmul_precision: str, platform: str) -> str:
    """Returns the `jax.default_matmul_precision` that gives an option ``matmul_precision`` its effect on a platform.

    JAX's ``tensorfloat32`` is three bfloat16 passes on a TPU, but leaves XLA's own kernels for GPUs in float32. There
    JAX's ``bfloat16``, the lowest precision, is TensorFloat-32.
    """
    return "bfloat16" if platform in GPUS and matmul_precision == "tensorfloat32" else matmul_precision


def asked_platforms() -> str | None:
    """Returns the platforms that ``JAX_PLATFORMS`` or a program's own setting names; None if neither does."""
    return jax.config.values["jax_platforms"] or None


def backend_failure() -> str | None:
    """Says why JAX can't start the devices that it should use; None where it can, or where nothing imported it."""
    try:
        jax.local_devices()
    except (AssertionError, RuntimeError) as error:  # a bare assertion where a platform's plugin isn't installed
        asked = asked_platforms()
        reason = (
            str(error).partition(" (set JAX_PLATFORMS=")[0] or "no such device is found, or JAX's build for it isn't"
        )
        which = f"JAX_PLATFORMS={asked} can't be used here" if asked else "JAX can't start its devices"
        return f"{which}: {reason}; JAX_PLATFORMS=cpu uses the CPU"
    return None


def share_gpu() -> None:
    """Lets other processes use the same GPU: memory is taken when it is needed, where the user has decided nothing.

    By default JAX takes three quarters of a GPU's memory when it starts. It has no effect once JAX's backend runs.
    """
    if not _GPU_MEMORY.intersection(os.environ):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, most + 1) if number % divisor == 0]


def refuse_missing_backend() -> None:
    """Refuses a platform that was asked for and can't be used here.

    It must come before an environment is built, which may compute on it, and after `jax.distributed` is started.

    Raises:
        ConfigError: if JAX can't start the platform that ``JAX_PLATFORMS`` names.
    """
    if asked_platforms() and (reason := backend_failure()) is not None:
        raise ConfigError(reason)
