"""The run's own options with their ranges, and how any group of options is built or refused.

Values live in the yamls alone; types and ranges stand beside what they describe: a run's options here, those of an
algorithm or environment in the class that its yaml names with ``_target_``. Such a class is declared with `options`,
which makes it a frozen dataclass whose fields pydantic checks when it is built.
"""

import contextlib
import copy
import dataclasses
import difflib
import importlib
import os
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, dataclass_transform

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from wqmix_jax.foreign_names import translated

_PACKAGE = Path(__file__).parent
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The yamls: inside an installed wheel, or beside the package in a checkout."""

T = TypeVar("T")

IntPair = Annotated[tuple[int, int], Field(strict=False)]
"""Two integers; a yaml list of two is taken as well."""

PositiveInt = Annotated[int, Field(gt=0)]


def _cache_setting(value: Any) -> Any:
    if not isinstance(value, bool | str) or value in ("", "on", "off", "none", "null", "yes", "no"):
        raise ValueError("choose true, false or a folder")
    return value


CacheSetting = Annotated[Any, pydantic.AfterValidator(_cache_setting)]
"""Where compiled programs are kept: in the user's cache folder if true, in the named folder, or nowhere if false."""

MAX_SEED = 2**31 - 1

MAX_NUM_SEEDS = 100_000
"""Of one run; whether as many fit into the memory is found out only once all of them are listed."""

CONTRACTS = {"algo": "wqmix_jax.algos.base.Algorithm", "env": "wqmix_jax.envs.base.Environment"}
"""What the classes of a run's parts subclass, named as their ``_target_`` are: both import this module."""

PROGRAMS = ("worker_python", "simulator")
"""Options of ``env`` that name a program, see `wqmix_jax.trust`."""

RESUMABLE = ("total_env_steps", "distributed", "compilation_cache", "checkpoint", "logger")
"""Options that may differ when a run is resumed."""


class ConfigError(ValueError):
    """A refused configuration; the message is one line that names the key, the value and what is allowed."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Declares a class of options: a frozen, keyword-only dataclass, strictly typed, unknown keys refused."""
    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=strict)(cls)  # type: ignore[return-value]


@options
class CheckpointOptions:
    """When and what is saved under ``RUN_DIR/checkpoints``.

    Attributes:
        every: environment steps (of the slowest seed) between two checkpoints of the whole train state.
        keep: how many of the latest are kept.
    """

    every: PositiveInt
    keep: PositiveInt


@options
class LoggerOptions:
    """Where records go beside ``metrics.jsonl``.

    Attributes:
        wandb: Weights & Biases mode.
        project: its project name.
        group: its group name; after the run's folder when absent.
        progress: whether a live progress bar is drawn on a terminal.
    """

    wandb: Literal["disabled", "offline", "online"]
    project: str
    group: str | None
    progress: bool


@options
class RunConfig:
    """A whole run.

    Attributes:
        algo: the algorithm, built from its yaml.
        env: the environment, built from its yaml.
        num_seeds: how many seeds train, ``seed .. seed + num_seeds - 1``, on all hosts together.
        seed: the first seed.
        sweep: values of traced options of ``algo`` by their names; all seeds train with every combination, in one call.
        hosts: over how many hosts the seeds are spread; the number of tasks of an srun step, or 1, when absent.
        host: which of them this is, from 0; the number of this task when absent.
        distributed: whether `jax.distributed` is started first, which then numbers the hosts.
        num_envs: environments per seed that collect one episode each per iteration.
        updates_per_iteration: learner steps per iteration, once ``batch_size`` episodes are stored.
        total_env_steps: environment steps after which a seed is finished.
        eval_interval: environment steps between evaluations, counted in iterations of full episodes.
        eval_episodes: greedy episodes of one evaluation.
        chunk_iterations: the most iterations of one compiled call; never changes a number.
        matmul_precision: what `jax.default_matmul_precision` is set to; without effect on a CPU.
        compute_dtype: of the matrices that nets multiply; all else, the parameters too, is float32.
        compilation_cache: see `CacheSetting`.
        run_dir: the run's folder; a dated one under ``outputs`` when absent.
        resume: a run's folder to continue.
        checkpoint: see `CheckpointOptions`.
        logger: see `LoggerOptions`.
    """

    algo: Any
    env: Any
    num_seeds: Annotated[int, Field(gt=0, le=MAX_NUM_SEEDS)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]]
    hosts: PositiveInt | None
    host: Annotated[int, Field(ge=0)] | None
    distributed: bool
    num_envs: PositiveInt
    updates_per_iteration: PositiveInt
    total_env_steps: Annotated[int, Field(gt=0, lt=2**31)]
    eval_interval: PositiveInt
    eval_episodes: PositiveInt
    chunk_iterations: PositiveInt
    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"]
    compute_dtype: Literal["float32", "bfloat16"]
    compilation_cache: CacheSetting
    run_dir: str | None
    resume: str | None
    checkpoint: CheckpointOptions
    logger: LoggerOptions

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.seed + self.num_seeds > MAX_SEED + 1:
            raise ValueError(f"seed={self.seed} is not allowed: {self.num_seeds} seeds from there pass {MAX_SEED}")
        if (self.host or 0) >= (self.hosts or 1):
            raise ValueError(f"host={self.host} is not allowed: hosts={self.hosts} are counted from 0")
        if (self.hosts or 1) > self.num_seeds:
            raise ValueError(f"hosts={self.hosts} is not allowed: there are only num_seeds={self.num_seeds}")
        buffer_size = getattr(self.algo, "buffer_size", self.num_envs)
        if self.num_envs > buffer_size:
            raise ValueError(
                f"num_envs={self.num_envs} is not allowed: at most algo.buffer_size={buffer_size} episodes fit"
            )
        return self

    @property
    def seeds(self) -> range:
        """The seeds that train here: those of this host."""
        return range(self.seed, self.seed + self.num_seeds)[_slice_of_host(self.num_seeds, self.hosts, self.host)]


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Builds a run from nested mappings, as ``config.yaml`` of a run folder holds them.

    Raises:
        ConfigError: at the first key that is unknown, missing or out of its range.
    """
    plain = _plain(values)
    _refuse_key_of_a_group(plain)
    parts = {"algo": build, "env": build, "checkpoint": _section(CheckpointOptions), "logger": _section(LoggerOptions)}
    for name, make in parts.items():
        if not isinstance(plain.get(name), Mapping):
            raise ConfigError(f"{name}={plain.get(name)!r} is not allowed: a group of options is needed")
        plain[name] = make(name, plain[name])
    config = checked(RunConfig, plain, prefix="")
    for name, swept in config.sweep.items():
        swept[:] = [getattr(build("algo", {**values["algo"], name: value}), name) for value in swept]
        if len(set(swept)) < len(swept):
            raise ConfigError(f"sweep.{name}={swept} is not allowed: different values are needed")
    return config


def with_checked_numbers(values: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Writes numbers as their options hold them: an integer for the ``1e6`` of an option that takes integers.

    Args:
        values: nested mappings.
        config: the run that `run_config` built from them.
    """
    return {name: _as_checked(value, getattr(config, name, value)) for name, value in values.items()}


def _as_checked(value: Any, checked: Any) -> Any:
    if isinstance(value, Mapping):
        of = checked.get if isinstance(checked, Mapping) else lambda name, default: getattr(checked, name, default)
        return {name: _as_checked(inner, of(name, inner)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(checked, (list, tuple)) and len(value) == len(checked):
        return [_as_checked(*pair) for pair in zip(value, checked, strict=True)]
    is_same = type(value) in (int, float) and type(checked) in (int, float) and value == checked
    return checked if is_same else value


def whole(value: Any) -> Any:
    """An integer for a float that is one, ``1e6`` say; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_key_of_a_group(plain: Mapping[str, Any]) -> None:
    """An option that lacks its group's name: ``lr`` for ``algo.lr``."""
    for name in sorted(plain.keys() - RunConfig.__dataclass_fields__.keys()):  # type: ignore[attr-defined]
        for group in ("algo", "env", "checkpoint", "logger"):
            if name in (plain.get(group) or {}):
                raise ConfigError(f"{name} is unknown: did you mean {group}.{name}?")


def _slice_of_host(num_seeds: int, hosts: int | None, host: int | None) -> slice:
    hosts, host = hosts or 1, host or 0
    return slice(num_seeds * host // hosts, num_seeds * (host + 1) // hosts)


def add_import_paths(config_dir: str | os.PathLike[str] | None) -> None:
    """Lets a ``_target_`` name a module in the current folder, in ``config_dir`` or beside it; they come last.

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
        name: a key of `CONTRACTS`; keys in messages are prefixed with it.
        values: the class in ``_target_``, and its options as plain data; no ``_target_`` inside them is built.

    Raises:
        ConfigError: if the class can't be found, doesn't subclass the contract, or refuses a value.
    """
    fields = _plain(values, f"{name}.")
    return checked(part_class(name, fields.pop("_target_", None)), fields, prefix=f"{name}.")


def part_class(name: str, target: str | None) -> type:
    """`target_class`, for a class that subclasses its contract.

    Args:
        name: a key of `CONTRACTS`.
        target: the class, ``MODULE.CLASS``.

    Raises:
        ConfigError: if the class can't be found, or isn't a subclass.
    """
    cls = target_class(name, target)
    if not issubclass(cls, pkgutil.resolve_name(CONTRACTS[name])):
        raise ConfigError(f"{name}._target_={target!r} is not allowed: it is no {CONTRACTS[name]}")
    return cls


def target_class(name: str, target: str | None) -> type:
    """The class that ``NAME._target_`` names.

    Raises:
        ConfigError: if it can't be found, its module can't be imported, or it is no class.
    """
    if target is None:
        raise ConfigError(f"{name}._target_ is missing: it names the class of these options")
    try:
        _import_module_of(target)
        found = pkgutil.resolve_name(target)
    except Exception as error:  # a module of a user's own may raise anything
        absent = isinstance(error, ModuleNotFoundError) and _is_part(error.name, target)
        where = "; start where the module lies, or name its folder with --config-dir" if absent else _where(error)
        raise ConfigError(f"{name}._target_={target!r} can't be imported: {error}{where}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{name}._target_={target!r} is not allowed: it is no class")
    return found


def _import_module_of(target: str) -> None:
    """Imports the module that a class lies in: `pkgutil.resolve_name` hides what is wrong with one in a package."""
    module = target.partition(":")[0] if ":" in target else target.rpartition(".")[0]
    try:
        importlib.import_module(module or target)
    except ModuleNotFoundError as error:
        if not _is_part(error.name, module):  # otherwise it may be a class, or is really absent
            raise


def _is_part(module: str | None, target: str) -> bool:
    return target == module or target.startswith((f"{module}.", f"{module}:"))


def _where(error: Exception) -> str:
    """In which line of a module it was raised; nothing where the module isn't to blame, or the error says so itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError) or "importlib" in last.filename or last.filename == pkgutil.__file__:
        return ""
    return f" ({type(error).__name__} in {last.filename}, line {last.lineno})"


def load_group(group: str, option: str) -> dict[str, Any]:
    """The plain values of ``configs/GROUP/OPTION.yaml``, for one that inherits nothing."""
    return _plain(OmegaConf.load(CONFIG_DIR / group / f"{option}.yaml"))


def run_defaults() -> dict[str, Any]:
    """The options of a run beside its algorithm and environment, with their defaults."""
    values = OmegaConf.load(CONFIG_DIR / "train.yaml")
    return _plain({name: value for name, value in values.items() if name not in ("defaults", "hydra")})


def _section(cls: type) -> Any:
    return lambda name, values: checked(cls, values, prefix=f"{name}.")


def _plain(values: Any, prefix: str = "") -> dict[str, Any]:
    """A copy in dicts and lists, nothing evaluated.

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
    except TypeError as error:  # a plain dataclass of a user's own
        raise ConfigError(f"{prefix.rstrip('.')}: {error}") from None


def _with_integers(values: Mapping[str, Any], errors: Sequence[Any]) -> dict[str, Any] | None:
    """The values with integers for the whole floats that were refused for being floats; None where there is none."""
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
    """An unknown key first: it may be the misspelt name of one that is missing."""
    return next((error for error in errors if error["type"] == "unexpected_keyword_argument"), errors[0])


def _keys(cls: type) -> list[str]:
    """The names of its options; class variables are none."""
    return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]


def _one_line(error: Any, cls: type, prefix: str) -> str:
    key = prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        name = error["loc"][-1]
        if name in vars(cls).get("__annotations__", {}) and name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            return f"{key} is unknown: {cls.__name__} names it, but isn't declared with @options"
        return f"{key} is unknown: {_hint(key, error['input'], cls, prefix)}"
    if error["type"] in ("missing", "missing_argument"):
        if isinstance(error["loc"][-1], int):  # a list's value: pydantic names where it would stand
            whole, _, place = key.rpartition(".")
            return f"{whole}={error['input']!r} is not allowed: it has {place} value(s), which is too few"
        return f"{key} is missing"
    allowed = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # the message of a class's own check, which starts with one of its keys
        is_key = allowed.split("=")[0] in _keys(cls)
        return f"{prefix}{allowed}" if is_key else allowed
    return f"{key}={error['input']!r} is not allowed: {allowed[0].lower()}{allowed[1:]}"


def _hint(key: str, value: Any, cls: type, prefix: str) -> str:
    """Suggests what an unknown key may stand for; otherwise lists the known keys."""
    known = _keys(cls)
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
    """The algorithms or environments of this package whose yamls have an option."""
    folder = CONFIG_DIR / group
    if group not in CONTRACTS:
        return []
    stems = sorted(path.stem for path in folder.glob("[!_]*.yaml"))
    return [stem for stem in stems if name in _yaml_options(folder, stem)]


def _yaml_options(folder: Path, stem: str) -> set[str]:
    """The options in a yaml and in those that it inherits."""
    values: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{stem}.yaml"))
    inherited = (_yaml_options(folder, str(parent)) for parent in values.get("defaults", []))
    return set(values).union(*inherited) - {"defaults", "_target_"}


def install_extra(extra: str) -> str:
    """The command that installs an extra here: make's in its own environment of a checkout, otherwise pip's."""
    checkout = _PACKAGE.parent
    if (checkout / "Makefile").is_file() and Path(sys.prefix) == checkout / ".venv":
        return f"make setup EXTRAS={extra}"
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install 'wqmix_jax[{extra}]'"
