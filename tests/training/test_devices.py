"""Seeds are spread evenly, and only what the user has left open is decided."""

import os
import subprocess
import sys

import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.running import ROOT
from wqmix_jax import evaluate
from wqmix_jax.cli import sweeps
from wqmix_jax.training import devices
from wqmix_jax.training.devices import seed_sharding


@pytest.mark.parametrize(
    ("num_seeds", "batch_size", "shape"),
    [(1, 1, None), (2, 1, (2, 1)), (3, 1, None), (10, 1, (2, 1)), (1, 32, (1, 2)), (2, 32, (2, 1)), (3, 32, (1, 2)),
     (1, 7, None), (1, 6, None)],
)  # fmt: skip
def test_as_many_devices_as_hold_equally_many_seeds_or_equal_parts_of_a_batch(
    num_seeds: int, batch_size: int, shape: tuple[int, int] | None
) -> None:
    sharding = seed_sharding(num_seeds, batch_size=batch_size)
    if shape is None:
        assert isinstance(sharding, SingleDeviceSharding)
        return
    assert isinstance(sharding, NamedSharding)
    assert sharding.spec == PartitionSpec("seeds")
    assert dict(sharding.mesh.shape) == {"seeds": shape[0], "batch": shape[1]}


@pytest.mark.parametrize(
    ("setting", "seeds", "count"),
    [
        ("", 6, 4),  # two parts of seeds, two of each batch
        ("", 8, 4),
        ("", 5, 4),
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
from wqmix_jax.training import devices
devices.num_cores = lambda: 4
print(len(devices.seed_sharding({seeds}, batch_size=32).device_set))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == count


@pytest.mark.parametrize(
    ("given", "launcher", "expected"),
    [
        ({}, "joblib", "false"),
        ({}, "submitit_local", "false"),
        ({}, "basic", None),
        ({}, "submitit_slurm", None),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "joblib", "true"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}, "joblib", None),
    ],
)
def test_runs_side_by_side_share_a_gpu_unless_the_user_has_decided(
    given: dict[str, str], launcher: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in devices._GPU_MEMORY:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    sweeps._share_gpu_if_side_by_side([f"hydra/launcher={launcher}", "+algo=vdn,iql"])
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == expected
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)


def test_evaluate_shares_a_gpu_with_a_run_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        evaluate, "_evaluate", lambda *_: seen.append(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]) or ()
    )
    for name in devices._GPU_MEMORY:
        monkeypatch.delenv(name, raising=False)
    evaluate.main(["run_dir=RUN"])
    assert seen == ["false"]
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")


def test_no_import_starts_the_backend() -> None:
    """It would be too late for `claim_cores` then, and a run would have one core."""
    paths = [
        path.relative_to(ROOT).with_suffix("")
        for folder in ("", "benchmarks", "examples")
        for path in (ROOT / "experiments" / folder).glob("*.py")
        if path.stem not in ("__init__", "torch_learner")
    ]
    names = [".".join(path.parts) for path in paths] + ["wqmix_jax.train", "wqmix_jax.evaluate", "wqmix_jax.compare"]
    statements = [f"import {name}; started('{name}')" for name in sorted(names)]
    code = "\n".join(
        [
            "from jax._src import xla_bridge",
            "started = lambda name: print(name) if xla_bridge.backends_are_initialized() else None",
            *statements,
        ]
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == ""
