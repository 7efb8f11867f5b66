"""Accelerators for which programs can be compiled without having them: names, descriptions, memory, topologies."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wqmix_jax.errors import ConfigError, install_extra
from wqmix_jax.training.devices import BATCH_AXIS, SEED_AXIS

FOLDER = Path(__file__).parent / "targets"
"""A file of facts about TPUs, and one file per GPU with the description that XLA's compiler takes."""

PACKAGES = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin")}
"""The packages of each platform, one of which must be installed."""


class Target(NamedTuple):
    """A kind of device.

    Attributes:
        name: as on the command line.
        platform: ``tpu`` or ``cuda``.
        topology: how many devices there are and how they are connected, in the platform's notation.
        options: further arguments of `topologies.get_topology_desc`.
        memory_bytes: of one device, for programs and arrays.
        is_spread: whether the seeds are spread over all devices, rather than on the first.
    """

    name: str
    platform: str
    topology: str
    options: dict[str, Any]
    memory_bytes: int
    is_spread: bool


def find_target(name: str) -> Target:
    """Returns the target of a name: ``tpu:KIND[:TOPOLOGY]``, ``cuda:GPU[:DEVICES]`` or ``cuda:FILE[:DEVICES]``.

    Raises:
        ConfigError: if there is none, or if its description can't be read.
    """
    platform, _, rest = name.partition(":")
    kinds = yaml.safe_load((FOLDER / "tpus.yaml").read_text())
    kind, _, where = rest.partition(":")
    if platform == "tpu" and kind in kinds and re.fullmatch(r"(\d+x)+\d+|", where):
        facts = kinds[kind]
        topology = f"{kind}:{where or facts['topology']}"
        return Target(name, platform, topology, facts["options"], facts["memory_bytes"], bool(where))
    if platform == "cuda" and rest:
        return _find_gpu(name, rest)
    gpus = ", ".join(path.stem for path in sorted(FOLDER.glob("*.txtpb")))
    allowed = f"tpu:KIND or tpu:KIND:TOPOLOGY (2x4, say) with KIND one of {', '.join(kinds)}"
    raise ConfigError(f"target={name} is not allowed: write {allowed}, or cuda:GPU with GPU one of {gpus} or a file")


def _find_gpu(name: str, rest: str) -> Target:
    where, _, number = rest.rpartition(":") if re.search(r":\d+$", rest) else (rest, "", "1")
    known = FOLDER / f"{where}.txtpb"
    path = known if known.is_file() else Path(where)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        gpus = ", ".join(path.stem for path in sorted(FOLDER.glob("*.txtpb")))
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"target={name} is not allowed: {path}: {reason}; choose one of {gpus}, or a file") from None
    memory = re.search(r"\bdevice_memory_size:\s*(\d+)", text)
    if memory is None:
        raise ConfigError(f"target={name} is not allowed: {path} lacks device_memory_size, a GPU's bytes of memory")
    topology = f"1x1x{number}"
    return Target(name, "cuda", topology, {"target_config": text, "topology": topology}, int(memory[1]), number != "1")


def refuse_missing_extra(target: Target) -> None:
    """Refuses a target whose compiler isn't installed.

    Raises:
        ConfigError: if it isn't.
    """
    if not any(map(version_of, PACKAGES[target.platform])):
        needed = " or ".join(PACKAGES[target.platform])
        install = install_extra(target.platform)
        raise ConfigError(f"target={target.name} is not allowed: {needed} is missing; {install} installs it")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def sharding_of(target: Target, num_seeds: int) -> Sharding:
    """Returns the devices that train: the first alone, or as many as get equally many seeds each.

    Raises:
        ConfigError: if the compiler knows no such devices.
    """
    try:
        topology = topologies.get_topology_desc(
            platform=target.platform, topology_name=target.topology, **target.options
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:  # of jax, whose own errors are RuntimeErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"target={target.name} is not allowed: {reason[:300]}") from None
    devices = topology.devices if target.is_spread else topology.devices[:1]
    number = max(number for number in range(1, len(devices) + 1) if num_seeds % number == 0)
    if number == 1:
        return SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices[:number]).reshape(number, 1), (SEED_AXIS, BATCH_AXIS))
    return NamedSharding(mesh, PartitionSpec(SEED_AXIS))
