"""Devices that share the seeds of a run exchange nothing: each has its part of the memory and its own loop."""

import subprocess
import sys
from typing import Any

import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding

from tests.environments import Clock, tiny_run, tiny_wqmix
from tests.running import ROOT
from tests.topologies import collectives, tpu_devices
from wqmix_jax.training.compiled_loop import Trainer, compile_trainer, make_trainer
from wqmix_jax.training.devices import seed_sharding
from wqmix_jax.training.members import make_members

NUM_SEEDS, NUM_DEVICES = 64, 8


def compiled_for(devices: list[Any]) -> Trainer:
    """Compiles a small run of 64 seeds, spread over the devices."""
    algo = tiny_wqmix(batch_size=4, buffer_size=4096)  # so that replays are most of the state
    config, members = tiny_run(algo, Clock(episode_limit=8, ends_from=4)), make_members(algo, range(NUM_SEEDS), {})
    sharding = seed_sharding(NUM_SEEDS, batch_size=algo.batch_size, devices=devices)
    return compile_trainer(make_trainer(config, sharding=sharding), members)[0]


def refuse_exchange(devices: list[Any]) -> None:
    """Asserts that eight devices need an eighth of what one needs, and exchange nothing."""
    one, spread = compiled_for(devices[:1]), compiled_for(devices)
    assert isinstance(one.sharding, SingleDeviceSharding)
    assert isinstance(spread.sharding, NamedSharding)
    assert dict(spread.sharding.mesh.shape) == {"seeds": NUM_DEVICES, "batch": 1}
    programs: Any = [
        (one.train, spread.train),
        (one.evaluate, spread.evaluate),
        (one.init_program, spread.init_program),
    ]
    assert [collectives(program) for _, program in programs] == [set()] * 3
    all_bytes, part = (program.memory_analysis().argument_size_in_bytes for program in programs[0])
    assert part == pytest.approx(all_bytes / NUM_DEVICES, rel=0.1)


def test_an_exchange_is_seen() -> None:
    code = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.topologies import collectives
sharding = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))
numbers = jax.ShapeDtypeStruct((4,), "float32", sharding=sharding)
print(collectives(jax.jit(lambda x: x.sum()).lower(numbers).compile()))
"""
    assert run(code) == "{'all-reduce'}"


def test_eight_devices_of_a_cpu_exchange_nothing() -> None:
    code = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
from tests.training.test_topologies import refuse_exchange
refuse_exchange(jax.devices())
"""
    run(code)


@pytest.mark.slow
def test_eight_tpus_exchange_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_exchange(tpu_devices("v5e:2x4", monkeypatch))


@pytest.mark.slow
def test_a_batch_is_never_shared_by_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = tpu_devices("v5e:2x4", monkeypatch)
    assert isinstance(seed_sharding(1, batch_size=32, devices=devices), SingleDeviceSharding)
    sharding = seed_sharding(12, batch_size=32, devices=devices)
    assert isinstance(sharding, NamedSharding)
    assert dict(sharding.mesh.shape) == {"seeds": 6, "batch": 1}


def run(code: str) -> str:
    """Runs a program in a process with a number of devices that it chooses; returns the line that it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
