"""A run's folder, the facts that are printed before it starts, and its summary.

``config.yaml`` holds the resolved options, ``metrics.jsonl`` the records (see `wqmix_jax.records.metrics`),
``summary.json`` the results of the run, ``learning_curve.png`` its picture, and
``checkpoints`` the states from which a resumed run continues.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import wqmix_jax
from wqmix_jax.config import RESUMABLE, RunConfig, run_defaults
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import refuse_what_is_not_data
from wqmix_jax.records.metrics import HEADER_FILE, METRICS_FILE, load_header, load_metrics, read_mapping
from wqmix_jax.training.compiled_loop import Trainer
from wqmix_jax.training.members import labels_of, member_name

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

CONFIG_FILE, SUMMARY_FILE, CHECKPOINT_DIR = "config.yaml", "summary.json", "checkpoints"


_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "chex", "flashbax", "jumanji", "jaxmarl", "orbax-checkpoint", "numpy",
    "hydra-core", "wandb",
)  # fmt: skip


_OF_A_PART = ("seed", "num_seeds", "hosts", "host")


_OF_A_MACHINE = ("env.worker_python",)


MAX_NAMED = 8
"""Runs that a message lists at most."""


VERSION = "version of "
"""Before a simulator's name, where its version stands beside options."""


UNKNOWN = "unknown"
"""A version that is not recorded."""


RECORDED_LATER = ("jaxmarl", "jumanji")
"""Games whose versions older runs don't record, so that a missing one is not a different one."""


def new_run_dir(run_dir: str | None, *, algo: str, env: str | None, option: str = "run_dir") -> Path:
    """The folder of a new run, not made yet: ``run_dir``, named by ``option``, or a dated one under ``outputs``.

    Raises:
        ConfigError: if there is already something in it.
    """
    if run_dir is None:
        names = "_".join(name for name in (algo, env) if name is not None)
        return Path("outputs") / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{names}"
    path = Path(run_dir)
    if not run_dir:
        raise ConfigError(f"{option}= is not allowed: it names no folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{option}={run_dir} is not allowed: it is a file")
    if path.is_dir() and any(path.iterdir()):
        hint = f"; resume={run_dir} continues a run" if option == "run_dir" else ""
        raise ConfigError(f"{option}={run_dir} is not allowed: it isn't empty{hint}")
    return path


def make_run_dir(run_dir: Path, *, numbered: bool = False) -> Path:
    """Makes the folder and those above it.

    Args:
        run_dir: the folder.
        numbered: whether it must be a new one; of several processes that want the same, all but one get a number.

    Returns:
        The folder, with its number.

    Raises:
        ConfigError: where that is not possible.
    """
    try:
        if numbered:
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            return next(path for path in _numbered(run_dir) if _is_made(path))
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} can't be made: {error.strerror}") from None
    return run_dir


def _is_made(path: Path) -> bool:
    """Whether the folder was made now; False where it was there."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from training the run until this one is through, however it ends.

    Where the platform or the file system has no locks, nothing is kept.

    Raises:
        ConfigError: if another process is at it.
    """
    path = run_dir / METRICS_FILE
    try:
        file = open(path, "r+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"resume={run_dir} is not allowed: another process is training this run") from None
            except OSError:  # no locks on this file system
                pass
        yield


def save_config(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Writes ``config.yaml``: ``values`` as nested mappings, every default and ``_target_`` included."""
    write_whole(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(dict(values))))


def read_config(run_dir: Path, *, option: str = "resume") -> dict[str, Any]:
    """The nested mappings of a run's ``config.yaml``.

    Options that are newer than the run have their defaults, except those of algorithms and environments.

    Args:
        run_dir: the run's folder.
        option: by which it was named.

    Raises:
        ConfigError: if the folder is not a run's, or the file is damaged.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{option}={run_dir} is not allowed: {_no_run(run_dir, option)}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it holds no options")
    try:
        refuse_what_is_not_data(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for group in ("algo", "env"):
        if not isinstance(values.get(group), dict):
            raise ConfigError(f"{path} is damaged: it has no options of {group}")
    return {**run_defaults(), **values}  # type: ignore[dict-item]


def _no_run(path: Path, option: str) -> str:
    """Explains a path that isn't a run's folder: something inside one, or a folder of several."""
    of_run = next((folder for folder in path.parents if (folder / CONFIG_FILE).is_file()), None)
    if of_run is not None:
        return f"it is inside the folder of a run; write {option}={of_run}"
    if not path.is_dir():
        return "it is a file" if path.exists() else "there is no such folder"
    inside = sorted(found.parent for found in path.glob(f"*/{CONFIG_FILE}"))
    if inside:
        return (
            f"it holds the runs {', '.join(folder.name for folder in inside[:MAX_NAMED])}; write {option}={inside[0]}"
        )
    return f"there is no {CONFIG_FILE} in it"


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What ``summary.json`` says so far; nothing where there is none yet.

    Raises:
        ConfigError: if it is damaged.
    """
    path = run_dir / SUMMARY_FILE
    return read_mapping(path) if path.is_file() else {}


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The folders of runs among ``folders`` and inside them, in their order.

    Raises:
        ConfigError: if one holds none.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.rglob(HEADER_FILE))
        if not inside:
            of_run = next((above for above in folder.parents if (above / HEADER_FILE).is_file()), None)
            found_there = f"it is inside the run {of_run}" if of_run else f"there is no run in it ({HEADER_FILE})"
            raise ConfigError(f"{folder} is not allowed: {found_there}")
        found += inside
    return list(dict.fromkeys(found))


def kept_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that can't be changed when it is resumed, by their dotted names."""
    free = (*RESUMABLE, "run_dir", "resume", "chunk_iterations")
    return _dotted({name: value for name, value in values.items() if name not in free})


def shared_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """All that runs of different seeds have in common when they belong together, by dotted names."""
    options = kept_options({name: value for name, value in values.items() if name not in _OF_A_PART})
    shared = {name: value for name, value in options.items() if name not in _OF_A_MACHINE}
    return {**shared, "total_env_steps": values["total_env_steps"]}


def simulator_versions(header: Mapping[str, Any]) -> dict[str, str]:
    """The versions of the simulators that a run was trained in, named as they stand beside options."""
    return {VERSION + name: version for name, version in header.get("simulator", {}).items()}


def library_version(header: Mapping[str, Any]) -> dict[str, str]:
    """The version of this library that a run was begun with, named as it appears next to options."""
    return {VERSION + "wqmix_jax": header["version"]}


def refuse_other_games(games: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Refuses runs of different versions of a game.

    Args:
        games: the versions of each run's game, as its header has them, and of what is installed, by who has them.

    Returns:
        A warning for each run that doesn't record a version because it was made before versions were recorded.

    Raises:
        ConfigError: if two versions differ.
    """
    warnings = []
    for name in sorted({name for game in games.values() for name in game}):
        silent = [of for of, game in games.items() if name not in game and name in RECORDED_LATER]
        found = {of: game.get(name, UNKNOWN) for of, game in games.items() if of not in silent}
        first = next(iter(found))
        for other, version in found.items():
            if version != found[first]:
                raise ConfigError(f"{first} has {name}={found[first]}, and {other} has {name}={version}")
        told = f"and {first} has {name}={found[first]}: these may be different games"
        warnings += [f"warning: {of} doesn't record its version of {name}, {told}" for of in silent]
    return warnings


def refuse_common_seeds(runs: Iterable[Path]) -> None:
    """Refuses runs that have a member in common.

    Raises:
        ConfigError: if so.
    """
    found: dict[str, Path] = {}
    for run in runs:
        for name in map(member_name, load_header(run)["members"]):
            if name in found:
                raise ConfigError(f"seed {name} is in both {found[name]} and {run}")
            found[name] = run


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        inner = _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        flat |= inner
    return flat


def save_summary(run_dir: Path, config: RunConfig, trainer: Trainer, **facts: Any) -> None:
    """Writes ``summary.json``: ``facts``, versions, the device and each member's last evaluation."""
    summary = {
        **facts,
        **config.env.host.facts(),
        "final": {member_name(labels_of(line)): line for line in load_metrics(run_dir, kind="eval")},
        "replay_bytes_per_seed": trainer.replay_bytes,
        "learner_steps_per_env_step": config.learner_steps_per_env_step,
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.local_devices()[0].device_kind,
            "count": len(trainer.sharding.device_set),
            "cpu_cores": os.cpu_count(),
        },
        "versions": versions(),
    }
    write_whole(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of Python, this project and the packages that its numbers depend on."""
    found = {"python": platform.python_version(), "wqmix_jax": wqmix_jax.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}_{number}")
        number += 1


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one piece: a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
