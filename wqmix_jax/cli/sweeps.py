"""Sweeps, ``-m key=A,B``: hydra's launchers start a run for each combination of values."""

import os
from collections.abc import Callable, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from wqmix_jax.cli.arguments import Arguments, call_hydra
from wqmix_jax.cli.checks import GROUPS
from wqmix_jax.cli.overrides import Composed, load_config, load_values, plain
from wqmix_jax.cli.syntax import keys_of, parse_overrides, quoted
from wqmix_jax.options import add_import_paths
from wqmix_jax.runs.hosts import refuse_step_of_tasks


def run_sweep(arguments: Arguments, task: Callable[[DictConfig], None]) -> None:
    """Calls ``task`` for each run of a sweep, maybe in processes or jobs of a cluster.

    Args:
        arguments: the command line.
        task: trains one run; `composed_by_hydra` gives it the options. It must be a function that can be pickled.

    Raises:
        ConfigError: if one of the runs is not allowed; nothing was started then.
    """
    overrides = arguments.overrides
    _share_gpu_if_side_by_side(overrides)
    refuse_step_of_tasks(os.environ)
    _check_each_run(overrides, arguments.config_dir)
    folder = make_sweep_dir(overrides)
    call_hydra(arguments._replace(overrides=[*_with_late_options(overrides), f"hydra.sweep.dir={folder}"]), task)


def composed_by_hydra(composed: DictConfig) -> tuple[Composed, str | None]:
    """Returns the options of one run of a sweep, and the folder of the user's yamls.

    Args:
        composed: the argument that hydra passes to its task.
    """
    hydra_config = HydraConfig.get()
    sources = hydra_config.runtime.config_sources
    config_dir = next((source.path for source in sources if source.provider == "command-line"), None)
    add_import_paths(config_dir)  # this may be another process
    values = {**plain(composed), "run_dir": os.path.relpath(hydra_config.runtime.output_dir)}
    given = tuple(keys_of(hydra_config.overrides.task))
    return Composed(values, dict(hydra_config.runtime.choices), given), config_dir


def make_sweep_dir(overrides: Sequence[str]) -> str:
    """Makes the folder of a sweep, a new dated one if none is given.

    Hydra would make it, too, but would report a failure as a traceback and let two sweeps of one second share one.

    Returns:
        The folder as the value of an override.

    Raises:
        ConfigError: if the folder can't be made, or isn't empty.
    """
    from wqmix_jax.records.run_dir import make_run_dir, new_run_dir

    [given] = [each for each in parse_overrides(overrides) if each.key_or_group == "run_dir"] or [None]
    if given is None or given.value() is None:
        return quoted(str(make_run_dir(new_run_dir(None, algo="sweep", env=None), numbered=True)))
    if "${" not in str(given.value()):  # hydra has yet to resolve it
        make_run_dir(new_run_dir(str(given.value()), algo="sweep", env=None))
    return str(given.input_line).partition("=")[2]


def _check_each_run(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> None:
    """Refuses a sweep before its first run if one of them is not allowed.

    For SLURM's launcher nothing is built: StarCraft II, for example, may be installed only where the runs start.
    """
    launchers = _launchers(overrides)
    check = load_values if any("submitit" in launcher for launcher in launchers) else load_config
    from wqmix_jax.training.devices import claim_cores, refuse_missing_backend

    claim_cores()  # before an environment's library starts the backend
    refuse_missing_backend()
    for batch in BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None):
        for run in batch:
            check(*run, config_dir=config_dir)


def _share_gpu_if_side_by_side(overrides: Sequence[str]) -> None:
    """Sets how JAX takes a GPU's memory before the backend starts: the launcher's processes inherit it."""
    if _launchers(overrides) & {"joblib", "submitit_local"}:
        from wqmix_jax.training.devices import share_gpu

        share_gpu()


def _launchers(overrides: Sequence[str]) -> set[str]:
    parsed = parse_overrides(overrides)
    return {str(override.value()) for override in parsed if override.key_or_group == "hydra/launcher"}


def _with_late_options(overrides: Sequence[str]) -> list[str]:
    """Lets the options of an algorithm or environment be set if several of these are swept.

    Hydra composes all that is not swept once before the first run, when no algorithm is chosen yet and its options are
    unknown. A sweep of one value is set in each run.
    """
    parsed = parse_overrides(overrides)
    swept = [each.key_or_group for each in parsed if each.is_sweep_override() and each.key_or_group in GROUPS]
    prefixes = tuple(f"{group}." for group in swept)
    late = {}
    for override in parsed:
        if override.key_or_group.startswith(prefixes) and not override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            late[override.input_line] = f"{key}=choice({value})"
    return [late.get(text, text) for text in overrides]
