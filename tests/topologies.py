"""Devices that are not there: the compiler knows them, so that programs for them can be compiled and read."""

import re
from typing import Any

import pytest
from jax.experimental import topologies

COLLECTIVES = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|recv|reduce-scatter|send)"
    r"(-start|-done)?\("
)


def tpu_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the devices of a TPU topology, for example ``v5e:2x4``; skips the test where no compiler is installed."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, isn't installed")
    for variable, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no process uses a TPU here
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def collectives(program: Any) -> set[str]:
    """Returns the operations of a compiled program in which devices exchange data."""
    return {found[0] for found in COLLECTIVES.findall(program.as_text())}
