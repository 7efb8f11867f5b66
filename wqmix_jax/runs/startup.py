"""The facts that are printed before a run starts, and the runs that are refused then."""

import contextlib
import glob
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from wqmix_jax.config import PROGRAMS, RunConfig
from wqmix_jax.envs.host.farama import imported_module, is_known, module_file, module_option
from wqmix_jax.errors import ConfigError, install_extra
from wqmix_jax.records.run_dir import read_config
from wqmix_jax.training.compiled_loop import Trainer
from wqmix_jax.training.devices import num_cores


def command_to_continue(
    run_dir: Path, config_dir: str | os.PathLike[str] | None = None, *, command: str = "train"
) -> str:
    """Returns a hint with the command that continues a run, to be pasted into a shell in the current folder.

    Args:
        run_dir: the run's folder.
        config_dir: the folder of the user's yamls and modules that it was started with.
        command: the command that started it.
    """
    repeated = [f"{name}={_as_option(value)}" for name, value in _programs(run_dir).items()]
    return f"to continue: {shell_command(command, [f'resume={_as_option(str(run_dir))}', *repeated], config_dir)}"


def shell_command(command: str, arguments: Sequence[str], config_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns a command of this package, to be pasted into a shell in the current folder.

    Args:
        command: its name, ``train`` for example.
        arguments: its arguments.
        config_dir: the folder of the user's yamls and modules.
    """
    parts = [_python(), "-m", f"wqmix_jax.{command}"]
    if config_dir is not None:
        parts += ["--config-dir", _from_here(Path(config_dir))]
    return shlex.join([*parts, *arguments])


def _programs(run_dir: Path) -> dict[str, str]:
    """Returns the options that must be repeated when the run is resumed, see `wqmix_jax.runs.trust`."""
    values: dict[str, Any] = {"env": {}}
    with contextlib.suppress(ConfigError):
        values = read_config(run_dir)
    env = values["env"]
    programs = {f"env.{name}": env.get(name) for name in PROGRAMS if name not in ("name", "module")}
    if programs["env.worker_python"] == sys.executable:
        del programs["env.worker_python"]
    module = imported_module(env) if "worker_python" in env and "name" in env else None
    if module is not None and not is_known(module) and module_file(module) is None:
        programs[f"env.{module_option(env)}"] = module
    cache = values.get("compilation_cache")
    programs["compilation_cache"] = cache if isinstance(cache, str) else None
    return {name: str(value) for name, value in programs.items() if value is not None}


def _python() -> str:
    """Returns the running interpreter as a shell in the current folder finds it."""
    found = shutil.which("python")
    if not sys.executable or (found is not None and Path(found).absolute().parent == Path(sys.executable).parent):
        return "python"
    return _from_here(Path(sys.executable))


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _as_option(path: str) -> str:
    """Returns a path as an option's value; `overrides.as_text` lists what must be escaped."""
    path = re.sub(r"(\\*)\$\{", r"\1\1\\${", path)
    return f"./{path}" if path == "null" or path.startswith(("'", '"', "~")) else path


def refuse_full_disk(run_dir: Path, checkpoint_bytes: int) -> None:
    """Refuses a run, before anything starts, whose disk has no room for a single checkpoint.

    Args:
        run_dir: the run's folder, which need not exist yet.
        checkpoint_bytes: the most that a checkpoint takes.

    Raises:
        ConfigError: if there is too little room.
    """
    free = _free_bytes(run_dir)
    if free < checkpoint_bytes:
        sizes = f"a checkpoint may take {megabytes(checkpoint_bytes)}, and {megabytes(free)} are free there"
        raise ConfigError(f"run_dir={run_dir} is not allowed: {sizes}")


def checkpoint_lines(config: RunConfig, run_dir: Path, checkpoint_bytes: int) -> Iterator[str]:
    """Yields a line about the size of checkpoints, and a warning if the disk may have too little room."""
    free, kept = _free_bytes(run_dir), config.checkpoint.keep
    size = f"every {config.checkpoint.every:,} steps, at most {megabytes(checkpoint_bytes)} each, {kept} kept"
    yield f"checkpoints: {size}; {megabytes(free)} are free on the disk"
    if free < (kept + 1) * checkpoint_bytes:
        needed = f"{kept} checkpoint{'s' if kept > 1 else ''} plus the one being written"
        yield f"warning: there may not be room for {needed}; lower checkpoint.keep"


def _free_bytes(run_dir: Path) -> int:
    """Returns the free bytes of the disk where ``run_dir`` is or will be."""
    path = run_dir.absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free


def device_lines(trainer: Trainer) -> Iterator[str]:
    """Yields the devices that train, and what to install if one is idle."""
    devices = jax.local_devices()
    kind = f"{num_cores()} cores" if devices[0].platform == "cpu" else devices[0].device_kind
    used = len(trainer.sharding.device_set)
    spread = f", training on {used} of {len(devices)} devices" if len(devices) > 1 else ""
    yield f"device: {devices[0].platform} ({kind}){spread}"
    if devices[0].platform != "cpu":
        return
    if shutil.which("nvidia-smi") or os.path.exists("/dev/nvidiactl"):
        yield f"An NVIDIA GPU is present but unused: {install_extra('cuda')} makes JAX use it."
    elif glob.glob("/dev/accel[0-9]*") or os.environ.get("TPU_NAME"):
        yield f"A TPU is present but unused: {install_extra('tpu')} makes JAX use it."


def plan_lines(config: RunConfig, trainer: Trainer, num_members: int) -> Iterator[str]:
    """Yields the plan of a run: seeds, steps, sizes of replays, evaluations and the learner's pace.

    Args:
        config: the options.
        trainer: the trainer, not compiled yet.
        num_members: the number of trainings on this host.
    """
    yield from config.env.external.lines(num_members, config.num_envs)
    first, last = config.seeds[0], config.seeds[-1]
    seeds = f"seed {first}" if first == last else f"seeds {first}..{last}"
    yield f"{seeds}, {config.total_env_steps:,} environment steps each"
    if (config.hosts or 1) > 1:
        yield f"host {config.host} of {config.hosts}, {config.num_seeds} seeds in all; hosts=1 trains them all here"
    for name, swept in config.sweep.items():
        yield f"algo.{name}: every seed with each of {', '.join(map(str, swept))}"
    total = trainer.replay_bytes * num_members
    yield f"replay: {megabytes(trainer.replay_bytes)} per seed, {megabytes(total)} in total"
    steps = trainer.eval_iterations * config.steps_per_iteration
    iterations = "1 iteration" if trainer.eval_iterations == 1 else f"{trainer.eval_iterations:,} iterations"
    yield f"evaluation: every {iterations} ({steps:,} environment steps of full episodes)"
    episodes = "full episode" if config.num_envs == 1 else f"{config.num_envs} full episodes"
    yield (
        f"learner steps per environment step: {config.learner_steps_per_env_step:.4g} "
        f"({config.updates_per_iteration} per {episodes} of {config.env.spec.episode_limit} steps)"
    )


def megabytes(num_bytes: float) -> str:
    """Returns a number of bytes as a text in MB."""
    return f"{num_bytes / 1e6:,.1f} MB"
