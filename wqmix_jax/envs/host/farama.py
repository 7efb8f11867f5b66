"""Tasks of PettingZoo and Gymnasium as environments; ``farama_adapters.py`` is their part in the workers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic

from wqmix_jax.envs.host.bridge import BridgedEnvironment
from wqmix_jax.options import PositiveInt, options

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_REGISTERED_BY = {"Foraging": "lbforaging", "rware": "rware"}
"""The modules that register tasks, by the first word of the tasks' names."""

KNOWN_PACKAGES = ("pettingzoo", "mpe2", "lbforaging", "rware")
"""Installed packages whose modules a run's folder may name, see `wqmix_jax.runs.trust`."""


@options
class FaramaEnvironment(BridgedEnvironment):
    """The base of tasks that use the spaces of Gymnasium.

    Attributes:
        name: the task.
        options: arguments of the environment's constructor.
        reward: the team's reward: the ``sum`` or ``mean`` of the agents' rewards, or that of the ``first`` agent that
            has one, where all agents get the same.
        state: ``env``: the result of the environment's ``state()``; ``observations``: those of all agents, joined;
            ``auto``: the former if the environment has it and it is no image (one axis at most), otherwise the latter.
        episode_limit: steps; the environment's own limit when absent.
        continuing_episode: whether an episode at the time limit counts as truncated, so that targets bootstrap;
            otherwise it counts as terminated.
    """

    name: str
    options: dict[str, Any]
    reward: Literal["sum", "mean", "first"]
    state: Literal["auto", "env", "observations"]
    episode_limit: PositiveInt | None
    continuing_episode: bool

    _adapter: ClassVar[str]

    @property
    def played(self) -> tuple[str, dict[str, Any]]:
        """See `BridgedEnvironment.played`."""
        module = imported_module(vars(self))
        file = None if module is None else module_file(module)
        named = ("name", "options", "reward", "state", "episode_limit", "continuing_episode")
        arguments = {name: getattr(self, name) for name in named}
        adapter = f"{Path(__file__).with_name('farama_adapters.py')}:{self._adapter}"
        return adapter, {**arguments, "folder": None if file is None else str(Path.cwd())}


@options
class PettingZoo(FaramaEnvironment):
    """A task with PettingZoo's parallel interface: MPE, SISL, Butterfly and others.

    Attributes:
        name: the module, which has a function ``parallel_env``.
        options: arguments of ``parallel_env``.
    """

    _adapter = "PettingZoo"

    @pydantic.field_validator("name")
    @classmethod
    def _is_a_module(cls, name: str) -> str:
        return _checked_module(name, "mpe2.simple_spread_v3")


@options
class Gymnasium(FaramaEnvironment):
    """A task for several agents that is registered with Gymnasium: level-based foraging, robot warehouse and others.

    Attributes:
        name: the name under which it is registered.
        module: the module that registers it when imported. When absent, that of level-based foraging and robot
            warehouse; none for other tasks.
    """

    module: str | None

    _adapter = "Gymnasium"

    @property
    def played(self) -> tuple[str, dict[str, Any]]:
        """See `BridgedEnvironment.played`."""
        adapter, arguments = super().played
        return adapter, {**arguments, "module": imported_module(vars(self))}

    @pydantic.field_validator("name")
    @classmethod
    def _names_no_module(cls, name: str) -> str:
        if ":" in name:
            raise ValueError("write the part before the colon as env.module, and the rest as env.name")
        return name

    @pydantic.field_validator("module")
    @classmethod
    def _is_a_module(cls, module: str | None) -> str | None:
        return None if module is None else _checked_module(module, "lbforaging")


def imported_module(values: Mapping[str, Any]) -> str | None:
    """Returns the module that workers import for a task, None if they import none.

    Args:
        values: the options of a `PettingZoo` or `Gymnasium`, of which ``module`` and ``name`` are read.
    """
    name = str(values.get("name"))
    if "module" not in values:
        return name
    return _REGISTERED_BY.get(name.partition("-")[0]) if values["module"] is None else str(values["module"])


def module_option(values: Mapping[str, Any]) -> str:
    """Returns the option that names the module of `imported_module`."""
    return "module" if "module" in values else "name"


def is_known(module: str) -> bool:
    """Returns True for a module of `KNOWN_PACKAGES`."""
    return module.partition(".")[0] in KNOWN_PACKAGES


def module_file(module: str) -> Path | None:
    """Returns the file of a module's outermost package in the current folder, None if there is no such file."""
    top = module.partition(".")[0]
    files = (Path.cwd() / f"{top}.py", Path.cwd() / top / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def is_module_name(module: str) -> bool:
    """Returns True for identifiers with dots between them."""
    return _MODULE.fullmatch(module) is not None


def _checked_module(module: str, example: str) -> str:
    if not is_module_name(module):
        raise ValueError(f"write the name of a module, {example} for example")
    return module
