"""The options of a run: descriptions, types, ranges, and how they are built from nested mappings.

Default values are in the yamls alone. Descriptions, types and ranges are in a class: `RunConfig` for the run itself,
for an algorithm or environment the class that its yaml names with ``_target_``. Such a class is declared with
`options`, which makes it a frozen dataclass whose fields pydantic checks when it is built.
"""

import functools
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from omegaconf import OmegaConf
from pydantic import Field

from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR, PositiveInt, build, checked, options, plain_values, section


def _cache_setting(value: Any) -> Any:
    if not isinstance(value, bool | str) or value in ("", "on", "off", "none", "null", "yes", "no"):
        raise ValueError("choose true, false or a folder")
    return value


CacheSetting = Annotated[Any, pydantic.AfterValidator(_cache_setting)]
"""True, false or a folder, see ``RunConfig.compilation_cache``."""

MAX_SEED = 2**31 - 1

MAX_NUM_SEEDS = 100_000
"""The most seeds of one run: all of them are listed before it is known how many fit into the memory."""

PROGRAMS = ("worker_python", "simulator", "name", "module")
"""Options of ``env`` that may name a program or a module of workers, see `wqmix_jax.runs.trust`."""

RESUMABLE = ("total_env_steps", "distributed", "compilation_cache", "checkpoint", "logger", "callbacks")
"""Options that may differ when a run is resumed."""


@options
class CheckpointOptions:
    """Checkpoints of the whole train state under ``RUN_DIR/checkpoints``.

    Attributes:
        every: environment steps (of the slowest seed) between two checkpoints.
        keep: number of the latest checkpoints that are kept.
    """

    every: PositiveInt
    keep: PositiveInt


@options
class LoggerOptions:
    """Records in addition to ``metrics.jsonl``.

    Attributes:
        wandb: mode of Weights & Biases: ``disabled``, ``offline`` or ``online``.
        project: its project name.
        group: its group name; ``null``: the name of the run's folder.
        tensorboard: writes event files to ``RUN_DIR/tensorboard``, a TensorBoard run per seed; needs the extra
            ``tensorboard``.
        csv: writes ``RUN_DIR/metrics.csv``, one row per record.
        progress: draws a progress bar on a terminal.
    """

    wandb: Literal["disabled", "offline", "online"]
    project: str
    group: str | None
    tensorboard: bool
    csv: bool
    progress: bool


@options
class RunConfig:
    """The options of a run.

    Attributes:
        algo: the algorithm, built from its yaml.
        env: the environment, built from its yaml.
        num_seeds: number of seeds that train in one call, ``seed .. seed + num_seeds - 1``, on all hosts together.
        seed: the first seed.
        sweep: values of options of ``algo`` by their names: with ``sweep.alpha=[0.1,0.5]`` every seed trains with each
            value of ``algo.alpha``, in the same call.
        hosts: number of hosts over which the seeds are split; ``null``: over the tasks of an srun step, otherwise 1;
            ``slurm``: over these and the elements of SLURM's job array.
        host: number of this host, from 0; ``null``: the number of the task.
        distributed: starts `jax.distributed` first, which numbers the hosts; TPU pods need it.
        num_envs: environments per seed, each of which plays one episode per iteration.
        updates_per_iteration: learner steps per iteration, once ``batch_size`` episodes are stored.
        total_env_steps: environment steps after which a seed is finished.
        eval_interval: environment steps between evaluations, counted in iterations of full episodes.
        eval_episodes: greedy episodes of one evaluation.
        chunk_iterations: the most iterations of one compiled call; never changes a number.
        matmul_precision: precision in which an accelerator multiplies float32 matrices: ``float32``;
            ``tensorfloat32``, three bfloat16 products on a TPU; or ``bfloat16``, one on a TPU. On a GPU both are
            TensorFloat-32. Without effect on a CPU.
        compute_dtype: type of the matrices that nets multiply, ``float32`` or ``bfloat16``; everything else, the
            parameters included, is float32. With ``bfloat16``, ``matmul_precision`` has nearly no effect.
        compilation_cache: compiled programs are kept in the user's cache folder (``true``), in the named folder, or
            nowhere (``false``).
        run_dir: the run's folder; ``null``: a dated folder under ``outputs``.
        resume: the folder of a run to continue.
        init_from: the folder of another run, from whose last checkpoint each seed takes its first parameters;
            ``null``: they are drawn.
        init_from_nets: the nets that are taken, by their names, ``[agent]`` for example; ``null``: all that both runs
            have.
        init_from_seed: the seed of that run whose parameters all seeds take; ``null``: each takes those of the
            same seed, or of the only one.
        init_from_policy: ``best`` or ``last``: takes the nets that act from that run's ``policies`` instead.
        init_from_optimizer: also takes the state of the optimiser for these nets; otherwise it starts afresh.
        callbacks: classes that see each evaluation, see `wqmix_jax.callbacks.Callback`: ``MODULE.CLASS``, or
            ``{_target_: MODULE.CLASS, NAME: VALUE}``.
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
    init_from: str | None
    init_from_nets: Annotated[list[str], Field(min_length=1)] | None
    init_from_seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None
    init_from_policy: Literal["best", "last"] | None
    init_from_optimizer: bool
    callbacks: list[Any]
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
        _refuse_unused_choices(self)
        if getattr(self.algo, "is_on_policy", False):
            _refuse_other_episodes(self)
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

    @property
    def steps_per_iteration(self) -> int:
        """The most environment steps of one seed's iteration."""
        return self.num_envs * self.env.spec.episode_limit

    @property
    def learner_steps_per_env_step(self) -> float:
        """Learner steps per environment step, for full episodes and once enough of them are stored."""
        return self.updates_per_iteration / self.steps_per_iteration


def _refuse_unused_choices(config: RunConfig) -> None:
    """Refuses options of ``init_from`` without it, and an optimiser from a file that holds none."""
    for name in ("init_from_nets", "init_from_seed", "init_from_policy", "init_from_optimizer"):
        value = getattr(config, name)
        if value is not None and value is not False and config.init_from is None:
            raise ValueError(f"{name}={value} is not allowed without init_from=RUN_DIR")
    if config.init_from_optimizer and config.init_from_policy is not None:
        holds_none = f"not with init_from_policy={config.init_from_policy}, a file without an optimiser"
        raise ValueError(f"init_from_optimizer=True is not allowed: {holds_none}")


def _refuse_other_episodes(config: RunConfig) -> None:
    """Refuses batches of an on-policy algorithm that aren't equal parts of the episodes just played."""
    algo, num_envs, updates = config.algo, config.num_envs, config.updates_per_iteration
    reason = f"{type(algo).__name__} learns from the num_envs={num_envs} episodes just played"
    if algo.buffer_size != num_envs:
        raise ValueError(f"algo.buffer_size={algo.buffer_size} is not allowed: {reason}, and keeps no others")
    if num_envs % algo.batch_size:
        raise ValueError(f"algo.batch_size={algo.batch_size} is not allowed: {reason}, in equal parts of them")
    if updates % (parts := num_envs // algo.batch_size):
        whole = f"a pass over them is {parts} batches of algo.batch_size={algo.batch_size}, and passes are whole"
        raise ValueError(f"updates_per_iteration={updates} is not allowed: {reason}; {whole}")
    if getattr(algo, "prioritised", False):
        raise ValueError(f"algo.prioritised=True is not allowed: {reason}, each as often as the others")


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Builds a run from nested mappings, as ``config.yaml`` of a run folder holds them.

    Raises:
        ConfigError: at the first key that is unknown, missing or out of its range.
    """
    plain = plain_values(values)
    _refuse_key_of_a_group(plain)
    parts = {"algo": build, "env": build, "checkpoint": section(CheckpointOptions), "logger": section(LoggerOptions)}
    for name, make in parts.items():
        if not isinstance(plain.get(name), Mapping):
            raise ConfigError(f"{name}={plain.get(name)!r} is not allowed: a group of options is needed")
        plain[name] = make(name, plain[name])
    if isinstance(plain.get("callbacks"), list):
        plain["callbacks"] = [_built_callback(*each) for each in enumerate(plain["callbacks"])]
    config = checked(RunConfig, plain, prefix="")
    for name, swept in config.sweep.items():
        swept[:] = [getattr(build("algo", {**values["algo"], name: value}), name) for value in swept]
        if len(set(swept)) < len(swept):
            raise ConfigError(f"sweep.{name}={swept} is not allowed: different values are needed")
    return config


def _built_callback(index: int, value: Any) -> Any:
    """Builds one callback.

    Args:
        index: its place in the list, for messages.
        value: its class, ``MODULE.CLASS``, or a mapping with the class in ``_target_`` and its options.
    """
    values = {"_target_": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        written = "write MODULE.CLASS, or {_target_: MODULE.CLASS, NAME: VALUE}"
        raise ConfigError(f"callbacks.{index}={value!r} is not allowed: {written}")
    return build(f"callbacks.{index}", values)


def with_checked_numbers(values: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Writes numbers as their options hold them: an integer for the ``1e6`` of an option that takes integers.

    Args:
        values: nested mappings.
        config: the run that `run_config` built from them.
    """
    return {name: _as_checked(value, getattr(config, name, value)) for name, value in values.items()}


def _as_checked(value: Any, checked: Any) -> Any:
    if isinstance(value, Mapping):
        get = checked.get if isinstance(checked, Mapping) else lambda name, default: getattr(checked, name, default)
        return {name: _as_checked(inner, get(name, inner)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(checked, (list, tuple)) and len(value) == len(checked):
        return [_as_checked(*pair) for pair in zip(value, checked, strict=True)]
    is_same = type(value) in (int, float) and type(checked) in (int, float) and value == checked
    return checked if is_same else value


def _refuse_key_of_a_group(plain: Mapping[str, Any]) -> None:
    """Refuses an option without the name of its group, ``lr`` for ``algo.lr``."""
    for name in sorted(plain.keys() - RunConfig.__dataclass_fields__.keys()):  # type: ignore[attr-defined]
        for group in ("algo", "env", "checkpoint", "logger"):
            if name in (plain.get(group) or {}):
                raise ConfigError(f"{name} is unknown: did you mean {group}.{name}?")


def _slice_of_host(num_seeds: int, hosts: int | None, host: int | None) -> slice:
    hosts, host = hosts or 1, host or 0
    return slice(num_seeds * host // hosts, num_seeds * (host + 1) // hosts)


def load_group(group: str, option: str) -> dict[str, Any]:
    """Returns the plain values of ``configs/GROUP/OPTION.yaml`` and of the yamls of its group that it inherits."""
    own = plain_values(OmegaConf.load(CONFIG_DIR / group / f"{option}.yaml"))
    inherited = [load_group(group, parent) for parent in own.pop("defaults", []) if not parent.startswith("/")]
    return functools.reduce(operator.or_, [*inherited, own])


def names(group: str, config_dir: str | os.PathLike[str] | None = None) -> str:
    """Lists the choices of ``algo``, ``env`` or ``preset``: the names of the yamls of the package and of the user."""
    folders = [CONFIG_DIR] if config_dir is None else [CONFIG_DIR, Path(config_dir)]
    stems = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return ", ".join(sorted(stem for stem in stems if not stem.startswith("_")))


def with_newer_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the options that recorded ones lack because they are newer, with their defaults.

    Args:
        values: nested mappings, as ``config.yaml`` of a run folder holds them. An algorithm that isn't of this package
            gets the options of all algorithms, and those of a `TDLearner` or an `ActorCritic` if it has one of them; an
            environment that isn't gets none.
    """
    defaults = run_defaults()
    for group in ("algo", "env"):
        defaults[group] = _defaults_of(group, values[group])
    filled = {**defaults, **values}
    nested = (name for name in defaults if isinstance(defaults[name], dict) and isinstance(filled[name], Mapping))
    return filled | {name: {**defaults[name], **filled[name]} for name in nested if name != "sweep"}


def _defaults_of(group: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a class's options; of an algorithm's, those that it shares with others.

    Options that only its class has are as old as it is, and yamls of one class differ in them. Nothing is imported.
    """
    stems = [path.stem for path in sorted((CONFIG_DIR / group).glob("[!_]*.yaml"))]
    own = next((stem for stem in stems if load_group(group, stem)["_target_"] == recorded.get("_target_")), None)
    if group == "env":
        return {} if own is None else load_group(group, own)
    if own is not None:
        return _shared_values(own)
    kinds = {"returns": "_td", "q_star_dim": "_agent"}
    found = [load_group("algo", shared) for name, shared in kinds.items() if name in recorded]
    return functools.reduce(operator.or_, found, load_group("algo", "_base"))


def _shared_values(option: str) -> dict[str, Any]:
    """Returns the values that an algorithm's yaml inherits from those that several share, ``_NAME.yaml``."""
    if option.startswith("_"):
        return load_group("algo", option)
    parents = plain_values(OmegaConf.load(CONFIG_DIR / "algo" / f"{option}.yaml")).get("defaults", [])
    own = (parent for parent in parents if not parent.startswith("/"))
    return functools.reduce(operator.or_, map(_shared_values, own), {})


def run_defaults() -> dict[str, Any]:
    """Returns the default options of a run, without its algorithm and environment."""
    values = OmegaConf.load(CONFIG_DIR / "train.yaml")
    return plain_values({name: value for name, value in values.items() if name not in ("defaults", "hydra")})
