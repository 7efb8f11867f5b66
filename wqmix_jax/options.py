"""Declares, builds and checks groups of options; errors are one line."""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from wqmix_jax.errors import ConfigError
from wqmix_jax.foreign_names import translated

_PACKAGE = Path(__file__).parent

CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The yamls: inside an installed wheel, or next to the package in a checkout."""

MOVED = {
    "wqmix_jax.td": "wqmix_jax.ops.td",
    "wqmix_jax.weighting": "wqmix_jax.ops.weighting",
    "wqmix_jax.exploration": "wqmix_jax.ops.action_selection",
    "wqmix_jax.policies": "wqmix_jax.ops.action_selection",
    "wqmix_jax.trainer": "wqmix_jax.training.compiled_loop",
    "wqmix_jax.logger": "wqmix_jax.records.metrics",
    "wqmix_jax.statistics": "wqmix_jax.records.statistics",
    "wqmix_jax.policy": "wqmix_jax.runs.saved_policies",
}
"""Today's modules by names that users' modules may still import."""

T = TypeVar("T")

PositiveInt = Annotated[int, Field(gt=0)]
"""The type of an option that is an integer above 0."""

CONTRACTS = {
    "algo": "wqmix_jax.algos.base.Algorithm",
    "env": "wqmix_jax.envs.base.Environment",
    "callbacks": "wqmix_jax.callbacks.Callback",
}
"""The parent classes of a run's parts, named like a ``_target_`` because they import this module."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Declares a class of options: a frozen, keyword-only dataclass, strictly typed, unknown keys refused."""
    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(cls)  # type: ignore[return-value]


def whole(value: Any) -> Any:
    """Returns an integer for a float that is one, ``1e6`` say, and any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def add_import_paths(config_dir: str | os.PathLike[str] | None) -> None:
    """Lets a ``_target_`` name a module in the current folder, in ``config_dir`` or next to it; they come last.

    Raises:
        ConfigError: if there is no such folder.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not allowed: there is no such folder")
    folders = [Path.cwd()] if config_dir is None else [Path.cwd(), Path(config_dir), Path(config_dir).absolute().parent]
    for folder in map(str, (folder.resolve() for folder in folders)):
        if folder not in sys.path:
            sys.path.append(folder)


def build(name: str, values: Mapping[str, Any]) -> Any:
    """Builds the object of the class that ``values["_target_"]`` names from the other values.

    The class is checked before anything is constructed.

    Args:
        name: a key of `CONTRACTS`, or of one part in its list (``callbacks.0``); keys in messages are prefixed with it.
        values: the class in ``_target_``, and its options as plain data; no ``_target_`` inside them is built.

    Raises:
        ConfigError: if the class can't be found, doesn't subclass the contract, or refuses a value.
    """
    fields = plain_values(values, f"{name}.")
    return checked(part_class(name, fields.pop("_target_", None)), fields, prefix=f"{name}.")


def part_class(name: str, target: str | None) -> type:
    """Returns `target_class`, which must subclass its contract.

    Args:
        name: as in `build`.
        target: the class, ``MODULE.CLASS``.

    Raises:
        ConfigError: if the class can't be found, or isn't a subclass.
    """
    cls, contract = target_class(name, target), CONTRACTS[name.partition(".")[0]]
    if not issubclass(cls, pkgutil.resolve_name(contract)):
        raise ConfigError(f"{name}._target_={target!r} is not allowed: it is not a subclass of {contract}")
    return cls


def target_class(name: str, target: str | None) -> type:
    """Returns the class that ``NAME._target_`` names.

    Raises:
        ConfigError: if it can't be found, its module can't be imported, or it is no class.
    """
    if target is None:
        raise ConfigError(f"{name}._target_ is missing: it names the class of these options")
    try:
        _import_module_of(target)
        found = pkgutil.resolve_name(target)
    except Exception as error:  # a user's module may raise anything
        absent = isinstance(error, ModuleNotFoundError) and _is_part(error.name, target)
        moved = MOVED.get(getattr(error, "name", None) or "")
        where = (
            "; start in the folder of the module, or name that folder with --config-dir" if absent else _where(error)
        )
        where = f"; import {moved} instead" if moved is not None else where
        raise ConfigError(f"{name}._target_={target!r} can't be imported: {error}{where}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{name}._target_={target!r} is not allowed: it is no class")
    return found


def _import_module_of(target: str) -> None:
    """Imports the module of a class: `pkgutil.resolve_name` hides the errors of one in a package."""
    module = target.partition(":")[0] if ":" in target else target.rpartition(".")[0]
    try:
        importlib.import_module(module or target)
    except ModuleNotFoundError as error:
        if not _is_part(error.name, module):  # otherwise it may be a class, or is really absent
            raise


def _is_part(module: str | None, target: str) -> bool:
    return target == module or target.startswith((f"{module}.", f"{module}:"))


def _where(error: Exception) -> str:
    """Returns the line of the module that raised it; nothing if the error says so itself or is not the module's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError) or "importlib" in last.filename or last.filename == pkgutil.__file__:
        return ""
    return f" ({type(error).__name__} in {last.filename}, line {last.lineno})"


def section(cls: type) -> Any:
    """Returns a function that builds ``cls`` from its group's name and values."""
    return lambda name, values: checked(cls, values, prefix=f"{name}.")


def plain_values(values: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a copy in dicts and lists, nothing evaluated.

    Raises:
        ConfigError: at the first value that is not plain data.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(values))
    except OmegaConfBaseException as error:
        where = f"{prefix}{error.full_key}: " if error.full_key else ""
        raise ConfigError(where + str(error).splitlines()[0]) from None
    refuse_what_is_not_data(plain, prefix.rstrip("."))
    return dict(plain)  # type: ignore[arg-type]


def refuse_what_is_not_data(value: Any, name: str = "") -> None:
    """Accepts strings, numbers, booleans, None, and lists and mappings of them.

    Args:
        value: what to check.
        name: its dotted name, for the message.

    Raises:
        ConfigError: at anything else, and at a string with ``${..}``, an interpolation that OmegaConf would evaluate.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_what_is_not_data(key, name)
            refuse_what_is_not_data(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_what_is_not_data(inner, name)
    elif not isinstance(value, str | int | float | None):
        raise ConfigError(f"{name}={value!r} is not allowed: options are plain data")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{name}={value!r} is not allowed: only the yamls of a new run may refer to other values")


def checked(cls: type[T], values: Mapping[str, Any], *, prefix: str) -> T:
    """Builds an object of a class declared with `options`.

    Args:
        cls: the class.
        values: its options.
        prefix: precedes their names in messages, ``env.`` for example.

    Raises:
        ConfigError: if an option is unknown, missing or not allowed.
    """
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        integers = _with_integers(values, error.errors())
        if integers is not None:
            return checked(cls, integers, prefix=prefix)
        raise ConfigError(_one_line(_worst(error.errors()), cls, prefix)) from None
    except TypeError as error:  # a user's plain dataclass
        raise ConfigError(f"{prefix.rstrip('.')}: {error}") from None


def _with_integers(values: Mapping[str, Any], errors: Sequence[Any]) -> dict[str, Any] | None:
    """Returns the values with integers for the whole floats that were refused; None if there are none."""
    refused = [error for error in errors if error["type"] == "int_type" and type(error["input"]) is float]
    changed = {
        name: copy.deepcopy(value) if isinstance(value, dict | list) else value for name, value in values.items()
    }
    found = False
    for error in refused:
        inside: Any = changed
        *outer, last = (part for part in error["loc"] if not isinstance(part, str) or part != "int")
        with contextlib.suppress(LookupError, TypeError):  # a place that is no key: the branch of a union, say
            for part in outer:
                inside = inside[part]
            if (integer := whole(inside[last])) is not inside[last]:
                inside[last], found = integer, True
    return changed if found else None


def _worst(errors: list[Any]) -> Any:
    """Returns an unknown key first: it may be the misspelt name of one that is missing."""
    return next((error for error in errors if error["type"] == "unexpected_keyword_argument"), errors[0])


def names_of(cls: type) -> list[str]:
    """Returns the names of the options that a class declares, without class variables."""
    return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]


def _one_line(error: Any, cls: type, prefix: str) -> str:
    key = prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        name = error["loc"][-1]
        if name in vars(cls).get("__annotations__", {}) and name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            return f"{key} is unknown: {cls.__name__} names it, but isn't declared with @options"
        return f"{key} is unknown: {_hint(key, error['input'], cls, prefix)}"
    if error["type"] in ("missing", "missing_argument"):
        if isinstance(error["loc"][-1], int):  # a list's value: pydantic names its place
            whole, _, place = key.rpartition(".")
            return f"{whole}={error['input']!r} is not allowed: it has {place} value(s), which is too few"
        return f"{key} is missing"
    allowed = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # the message of a class's own check, which starts with one of its keys
        is_key = re.split("=| is missing", allowed)[0] in names_of(cls)
        return f"{prefix}{allowed}" if is_key else allowed
    return f"{key}={error['input']!r} is not allowed: {allowed[0].lower()}{allowed[1:]}"


def _hint(key: str, value: Any, cls: type, prefix: str) -> str:
    """Suggests what an unknown key may stand for; otherwise lists the known keys."""
    known = names_of(cls)
    group, name = prefix.rstrip("."), key.removeprefix(prefix)
    foreign = translated(f"{key}.{next(iter(value))}" if isinstance(value, Mapping) and value else key)
    all_known = f"known keys are {', '.join(known)}"
    if foreign is not None and foreign.ours is not None and foreign.ours.removeprefix(prefix) in known and group:
        return f"did you mean {foreign.ours} ({foreign.library}'s {foreign.theirs})? {all_known}"
    if foreign is not None:
        return str(foreign)
    if owners := _owners(group, name):
        return f"it is an option of {', '.join(owners)}; {all_known}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{close[0]}? {all_known}" if close else all_known


def _owners(group: str, name: str) -> list[str]:
    """Returns the algorithms or environments of this package whose yamls have an option."""
    folder = CONFIG_DIR / group
    if group not in CONTRACTS:
        return []
    stems = sorted(path.stem for path in folder.glob("[!_]*.yaml"))
    return [stem for stem in stems if name in _yaml_options(folder, stem)]


def _yaml_options(folder: Path, stem: str) -> set[str]:
    """Returns the options in a yaml and in those that it inherits."""
    values: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{stem}.yaml"))
    parents = (parent for parent in map(str, values.get("defaults", [])) if not parent.startswith("/"))
    inherited = (_yaml_options(folder, parent) for parent in parents)
    return set(values).union(*inherited) - {"defaults", "_target_"}
