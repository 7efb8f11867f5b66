"""Seeds are spread evenly, and only what the user has left open is decided."""

import subprocess
import sys

import pytest
from jax.sharding import NamedSharding, PartitionSpec

from wqmix_jax.devices import seed_sharding


@pytest.mark.parametrize(("num_seeds", "count"), [(1, 1), (2, 2), (3, 1), (10, 2)])
def test_as_many_devices_as_hold_equally_many_seeds(num_seeds: int, count: int) -> None:
    sharding = seed_sharding(num_seeds)
    assert len(sharding.device_set) == count
    if count > 1:
        assert isinstance(sharding, NamedSharding)
        assert sharding.spec == PartitionSpec("seeds")


@pytest.mark.parametrize(
    ("setting", "seeds", "count"),
    [
        ("", 6, 3),
        ("", 5, 1),
        ("", 1, 1),
        ("jax.config.update('jax_num_cpu_devices', 2)", 6, 2),
        ("os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'", 6, 2),
        ("jax.devices()", 6, 1),  # too late
    ],
)
def test_a_cpu_becomes_a_device_per_core(setting: str, seeds: int, count: int) -> None:
    code = f"""
import os
os.environ.pop("XLA_FLAGS", None)
import jax
{setting}
from wqmix_jax import devices
devices.num_cores = lambda: 4
print(len(devices.seed_sharding({seeds}).device_set))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == count
