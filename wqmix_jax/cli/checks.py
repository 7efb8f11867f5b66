"""Checks of overrides that hydra would accept, or refuse less clearly: chosen groups, several values, ``resume``."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from wqmix_jax.cli.syntax import parse_overrides
from wqmix_jax.config import PROGRAMS, RESUMABLE, names
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR
from wqmix_jax.runs.hosts import SLURM

GROUPS = ("algo", "env")
"""The groups from which every run chooses a yaml."""

_REPEATED_PROGRAMS = tuple(f"env.{name}" for name in PROGRAMS)
"""Options that may be repeated with ``resume``: the folder alone is not trusted with them, see `runs.trust`."""


def check_overrides(
    overrides: Sequence[str], config_dir: str | os.PathLike[str] | None, *, multirun: bool = False
) -> list[str]:
    """Checks how the algorithm, the environment and the preset are chosen, and what is given with ``resume``.

    Args:
        overrides: as on the command line.
        config_dir: a folder with the user's yamls.
        multirun: True if several values of an option make several runs.

    Returns:
        The overrides to compose: all but those that only repeat the options of the run that is resumed.

    Raises:
        ConfigError: if an override is not allowed.
    """
    parsed = parse_overrides(overrides)
    by_key = {override.key_or_group: override for override in parsed}
    if "hydra.searchpath" in by_key:  # it would put the folder after the package's
        given = by_key["hydra.searchpath"].input_line
        raise ConfigError(f"{given} is not allowed: --config-dir DIR adds the yamls of a folder")
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        if key in by_key:
            raise ConfigError(f"{by_key[key].input_line} is not allowed: write run_dir=FOLDER")
    if "resume" in by_key and by_key["resume"].value() is not None:
        repeated = _check_resume(parsed, multirun)
        return [text for text in overrides if text not in repeated]
    _check_preset(by_key.get("preset"), config_dir)
    if multirun:
        _check_hosts_of_sweep(by_key)
    else:
        _check_single_values(parsed)
    _check_env(by_key.get("env"), config_dir, multirun)
    _check_algo([override for override in parsed if override.key_or_group == "algo"], config_dir, multirun)
    return list(overrides)


def refuse_incomplete(config_dir: str | os.PathLike[str] | None) -> None:
    """Refuses a user's ``train.yaml`` that lacks some of the built-in keys.

    Raises:
        ConfigError: if the file lacks a key, or can't be read.
    """
    own = Path(config_dir or "", "train.yaml")
    if config_dir is None or not own.is_file():
        return
    try:
        found, built_in = (yaml.safe_load(path.read_text()) for path in (own, CONFIG_DIR / "train.yaml"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{own} can't be read: {' '.join(str(error).split())}") from None
    missing = [name for name in built_in if not isinstance(found, dict) or name not in found]
    if missing:
        raise ConfigError(f"{own} lacks {', '.join(missing)}: it replaces the built-in train.yaml as a whole")


def _check_preset(preset: Override | None, config_dir: str | os.PathLike[str] | None) -> None:
    if preset is not None and (not preset.is_add() or preset.is_force_add() or preset.value() is None):
        listed = names("preset", config_dir)
        raise ConfigError(f"{preset.input_line} is not allowed: write +preset=NAME, NAME one of {listed}")


def _check_hosts_of_sweep(by_key: Mapping[str, Override]) -> None:
    """Refuses to split the runs of a sweep over hosts that number themselves."""
    if "distributed" in by_key and by_key["distributed"].value() is not False:
        raise ConfigError(f"{by_key['distributed'].input_line} is not allowed with -m: connected hosts train one run")
    if "hosts" in by_key and by_key["hosts"].value() == SLURM:
        raise ConfigError(f"hosts={SLURM} is not allowed with -m: each run of a sweep trains all its seeds")


def refuse_settings_of_hydra(overrides: Sequence[str]) -> None:
    """Refuses hydra's own settings for a single run, where they would have no effect.

    Raises:
        ConfigError: if one is among them.
    """
    for override in parse_overrides(overrides):
        if re.match(r"hydra[./]", override.key_or_group) and override.key_or_group not in (
            "hydra.job.name",
            "hydra.mode",
        ):
            raise ConfigError(f"{override.input_line} is not allowed without -m: hydra's settings are those of a sweep")


def _check_single_values(parsed: Sequence[Override]) -> None:
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and swept[0].key_or_group not in GROUPS:
        several = "several values make several runs with -m, and a list is written [A,B]"
        raise ConfigError(f"{swept[0].input_line} is not allowed: {several}")


def _check_env(env: Override | None, config_dir: str | os.PathLike[str] | None, multirun: bool) -> None:
    if env is None:
        return
    if env.is_sweep_override() and not multirun:
        raise ConfigError(f"{env.input_line} is not allowed: several environments make several runs with -m")
    if env.is_add() or not _is_choice(env, multirun):
        raise ConfigError(f"{env.input_line} is not allowed: write env=NAME, NAME one of {names('env', config_dir)}")


def _check_algo(given: Sequence[Override], config_dir: str | os.PathLike[str] | None, multirun: bool) -> None:
    listed = names("algo", config_dir)
    if not given:
        raise ConfigError(f"an algorithm is missing: write +algo=NAME, NAME one of {listed}")
    if len(given) > 1:
        chosen = ", ".join(str(override.input_line) for override in given)
        several = "-m +algo=NAME,NAME runs several one after the other"
        raise ConfigError(f"{chosen} is not allowed: an algorithm is chosen once; {several}")
    [algo] = given
    if algo.is_add() and not algo.is_force_add() and _is_choice(algo, multirun):
        return
    if algo.is_sweep_override() and not multirun:
        raise ConfigError(f"{algo.input_line} is not allowed: several algorithms make several runs with -m")
    name = algo.value() if isinstance(algo.value(), str) else "NAME"
    raise ConfigError(f"{algo.input_line} is not allowed: write +algo={name} (NAME is one of {listed})")


def _is_choice(override: Override, multirun: bool) -> bool:
    return isinstance(override.value(), str) or (multirun and override.is_sweep_override())


def _check_resume(parsed: Sequence[Override], multirun: bool) -> list[str]:
    """Refuses options that differ from those in the run's ``config.yaml``, and returns those that repeat them."""
    [resume] = [override for override in parsed if override.key_or_group == "resume"][-1:]
    if multirun or resume.is_sweep_override():
        raise ConfigError(f"{resume.input_line} is not allowed: runs are resumed one at a time, without -m")
    if resume.value() == "":
        raise ConfigError("resume= is not allowed: it names no folder")
    own, repeated = None, []
    for override in parsed:
        key = override.key_or_group
        may_change = (*RESUMABLE, "resume", "hydra")
        if key.split(".")[0] in may_change or key.startswith("hydra/") or key in _REPEATED_PROGRAMS:
            continue
        own = _options_of_run(Path(str(resume.value()))) if own is None else own
        if override.is_delete() or key not in own or override.value() != own[key]:
            has = f"it has {key}={own[key]}, and " if key in own else ""
            kept = f"{has}a run keeps its options, except {', '.join(RESUMABLE)}"
            raise ConfigError(f"{override.input_line} is not allowed with resume={resume.value()}: {kept}")
        repeated.append(str(override.input_line))
    return repeated


def _options_of_run(run_dir: Path) -> dict[str, Any]:
    """Reads the options of a run by their dotted names, and the names of its algorithm and environment."""
    from wqmix_jax.records.metrics import load_header
    from wqmix_jax.records.run_dir import kept_options, read_config

    values, header = read_config(run_dir), load_header(run_dir)
    named = {group: header[group] for group in GROUPS} | {"chunk_iterations": values["chunk_iterations"]}
    return kept_options(values) | named
