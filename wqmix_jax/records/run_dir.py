"""A run's folder: making, locking, finding and reading it, and comparing the options of several runs.

``run.json`` identifies the run and its members, ``config.yaml`` holds the resolved options, ``metrics.jsonl`` the
records (see `wqmix_jax.records.metrics`), ``summary.json`` the results, ``learning_curve.png`` their picture,
``policies`` the parameters that act, ``initial.npz`` the first ones if they are those of another run, and
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
from wqmix_jax.config import RESUMABLE, RunConfig, with_newer_options
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import refuse_what_is_not_data
from wqmix_jax.records.atomic import write_whole
from wqmix_jax.records.metrics import HEADER_FILE, METRICS_FILE, load_header, load_metrics, read_mapping
from wqmix_jax.training.compiled_loop import Trainer
from wqmix_jax.training.host_loop import Line
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

_PART_OPTIONS = ("seed", "num_seeds", "hosts", "host")
"""Options in which the parts of one run differ."""

_MACHINE_OPTIONS = ("env.worker_python",)
"""Options that only describe the machine."""

MAX_NAMED = 8
"""The most runs that a message lists."""

VERSION = "version of "
"""Prefix of a simulator's name where its version is listed with options."""

UNKNOWN = "unknown"
"""A version that is not recorded."""

RECORDED_LATER = ("jaxmarl", "jumanji")
"""Games whose versions older runs don't record, so that a missing version doesn't mean a different game."""


def new_run_dir(run_dir: str | None, *, algo: str, env: str | None, option: str = "run_dir") -> Path:
    """Returns the folder of a new run without making it: ``run_dir``, or a dated one under ``outputs``.

    Args:
        run_dir: the folder that was asked for, if any.
        algo: the algorithm's name, for the dated folder.
        env: the environment's name, for the dated folder.
        option: the option that named ``run_dir``, for messages.

    Raises:
        ConfigError: if the folder isn't empty, or can't be one.
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
        numbered: whether it must be new; if several processes ask for the same folder, all but one get a number.

    Returns:
        The folder, with its number.

    Raises:
        ConfigError: if it can't be made.
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
    """Makes the folder; returns False if it exists already."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def held(run_dir: Path, file_name: str = METRICS_FILE) -> Iterator[None]:
    """Locks the run: no other process can train it until the block ends.

    Does nothing if the platform or the file system has no locks.

    Args:
        run_dir: the folder of the run.
        file_name: the file in it that is locked.

    Raises:
        ConfigError: if another process trains it.
    """
    path = run_dir / file_name
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
    """Reads the nested mappings of a run's ``config.yaml``.

    Options that are newer than the run get their defaults, see `with_newer_options`.

    Args:
        run_dir: the run's folder.
        option: the option that named the folder, for messages.

    Raises:
        ConfigError: if the folder holds no run, or the file is damaged.
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
    return with_newer_options(values)  # type: ignore[arg-type]


def _no_run(path: Path, option: str) -> str:
    """Explains why a path isn't a run's folder: it is inside one, or holds several."""
    run = next((folder for folder in path.parents if (folder / CONFIG_FILE).is_file()), None)
    if run is not None:
        return f"it is inside the folder of a run; write {option}={run}"
    if not path.is_dir():
        return "it is a file" if path.exists() else "there is no such folder"
    inside = sorted(found.parent for found in path.glob(f"*/{CONFIG_FILE}"))
    if inside:
        return (
            f"it holds the runs {', '.join(folder.name for folder in inside[:MAX_NAMED])}; write {option}={inside[0]}"
        )
    return f"there is no {CONFIG_FILE} in it"


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Reads ``summary.json``; returns an empty mapping if there is none yet.

    Raises:
        ConfigError: if it is damaged.
    """
    path = run_dir / SUMMARY_FILE
    return read_mapping(path) if path.is_file() else {}


def failed_members(run_dir: Path) -> dict[str, Line]:
    """Returns the members of a run that failed by their names: their labels, and the counters when they failed.

    Raises:
        ConfigError: if ``summary.json`` is damaged.
    """
    return {member_name(labels_of(line)): line for line in read_summary(run_dir).get("failed", [])}


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Returns the folders of runs among ``folders`` and inside them, in their order.

    Raises:
        ConfigError: if one of ``folders`` holds no run.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.rglob(HEADER_FILE))
        if not inside:
            run = next((above for above in folder.parents if (above / HEADER_FILE).is_file()), None)
            reason = f"it is inside the run {run}" if run else f"there is no run in it ({HEADER_FILE})"
            raise ConfigError(f"{folder} is not allowed: {reason}")
        found += inside
    return list(dict.fromkeys(found))


def kept_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that can't be changed when a run is resumed, by their dotted names."""
    free = (*RESUMABLE, "run_dir", "resume", "chunk_iterations")
    return _dotted({name: value for name, value in values.items() if name not in free})


def shared_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that runs of different seeds share if they belong together, by dotted names."""
    options = kept_options({name: value for name, value in values.items() if name not in _PART_OPTIONS})
    shared = {name: value for name, value in options.items() if name not in _MACHINE_OPTIONS}
    return {**shared, "total_env_steps": values["total_env_steps"]}


def differing(*settings: Mapping[str, Any]) -> list[str]:
    """Returns the options whose values are not the same in all ``settings``, in the order of their first appearance.

    An option that is missing counts as None, because older versions of this project don't record newer options.
    """
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def simulator_versions(header: Mapping[str, Any]) -> dict[str, str]:
    """Returns the versions of the simulators that a run was trained in, named as in a list of options."""
    return {VERSION + name: version for name, version in header.get("simulator", {}).items()}


def library_version(header: Mapping[str, Any]) -> dict[str, str]:
    """Returns the version of this library that a run was started with, named as in a list of options."""
    return {VERSION + "wqmix_jax": header["version"]}


def refuse_other_games(games: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Refuses runs of different versions of a game.

    Args:
        games: the versions of each run's game (``simulator`` in its header) by the run's folder; the key ``this
            installation`` may hold the installed versions.

    Returns:
        A warning for each run that doesn't record a version because it was made before versions were recorded.

    Raises:
        ConfigError: if two versions differ.
    """
    warnings = []
    for name in sorted({name for game in games.values() for name in game}):
        silent = [run for run, game in games.items() if name not in game and name in RECORDED_LATER]
        found = {run: game.get(name, UNKNOWN) for run, game in games.items() if run not in silent}
        first = next(iter(found))
        for other, version in found.items():
            if version != found[first]:
                raise ConfigError(f"{first} has {name}={found[first]}, and {other} has {name}={version}")
        other = f"and {first} has {name}={found[first]}: these may be different games"
        warnings += [f"warning: {run} doesn't record its version of {name}, {other}" for run in silent]
    return warnings


def refuse_common_seeds(runs: Iterable[Path]) -> None:
    """Refuses runs that have a member in common.

    Raises:
        ConfigError: if two runs have a member in common.
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
        **config.env.external.facts(),
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
    """Returns the versions of Python, this project and the packages that its numbers depend on."""
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
