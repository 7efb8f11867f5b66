"""The arguments of ``wqmix_jax.train``: hydra's flags and overrides."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from wqmix_jax.cli.checks import check_overrides, refuse_incomplete
from wqmix_jax.cli.help import train_help
from wqmix_jax.cli.overrides import compose_run, errors_in_one_line, prepare, unknown_keys_refused, users_first
from wqmix_jax.errors import ConfigError, refuse
from wqmix_jax.options import CONFIG_DIR, add_import_paths

_REFUSED_FLAGS = ("config_path", "config_name", "experimental_rerun")
"""Hydra's flags that would compose, or unpickle, other files than the package's yamls and those of ``--config-dir``."""


class Arguments(NamedTuple):
    """A parsed command line.

    Attributes:
        overrides: the ``key=value`` texts, prepared for hydra and checked.
        flags: all other texts.
        config_dir: the folder with the user's yamls.
        multirun: True for a sweep: several values of an option make several runs.
        is_help: True for ``--help``.
        shows_only: True if something is printed and nothing runs: ``--help``, ``--cfg``, ``--info`` and the like.
    """

    overrides: list[str]
    flags: list[str]
    config_dir: str | None
    multirun: bool
    is_help: bool
    shows_only: bool


def read_arguments(texts: Sequence[str]) -> Arguments:
    """Parses and checks the command line; lets classes be imported from the current folder and ``--config-dir``.

    Raises:
        ConfigError: if an argument is not allowed.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises its errors as they are, for `errors_in_one_line`
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    prepared = prepare(texts)
    parsed = parser.parse_intermixed_args(prepared)
    flags = list(prepared)
    for text in parsed.overrides:
        flags.remove(text)
    _refuse_flags(parsed)
    add_import_paths(parsed.config_dir)
    refuse_incomplete(parsed.config_dir)
    multirun = parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides
    shown = (parsed.help, parsed.hydra_help, parsed.cfg, parsed.info, parsed.shell_completion)
    overrides = parsed.overrides
    if not any(shown):
        overrides = check_overrides(overrides, parsed.config_dir, multirun=multirun)
    return Arguments(overrides, flags, parsed.config_dir, multirun, parsed.help, any(shown))


def _refuse_flags(parsed: argparse.Namespace) -> None:
    for name in _REFUSED_FLAGS:
        if getattr(parsed, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is not allowed: --config-dir DIR adds yamls, resume=RUN_DIR continues a run")
    modes = ("multirun", "run", "cfg", "info", "shell_completion")
    first, *others = [f"--{name.replace('_', '-')}" for name in modes if getattr(parsed, name)] or [""]
    if others:
        raise ConfigError(f"{others[0]} is not allowed with {first}: choose one of them")
    if parsed.resolve and not (parsed.cfg or parsed.help):
        raise ConfigError("--resolve is not allowed without --cfg: it resolves the values that --cfg prints")


def show(arguments: Arguments) -> None:
    """Prints the help, or what else the flags ask for.

    Raises:
        ConfigError: if the options can't be composed.
    """
    if arguments.is_help:
        composed = compose_run(arguments.overrides, arguments.config_dir)
        print(train_help(composed.values, arguments.config_dir))
    else:
        call_hydra(arguments, _nothing)


def _nothing(composed: DictConfig) -> None:
    """The task of a command that only prints."""


def call_hydra(arguments: Arguments, task: Callable[[DictConfig], None]) -> None:
    """Lets hydra parse the arguments itself, and print something or call ``task`` for each run of a sweep.

    Raises:
        ConfigError: if the options can't be composed.
    """
    overrides, config_dir = arguments.overrides, arguments.config_dir
    sys.argv = [sys.argv[0], *arguments.flags, *overrides]  # argparse refuses overrides between flags
    run = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")(task)
    with users_first(config_dir), errors_in_one_line(), unknown_keys_refused(overrides, config_dir):
        run()
