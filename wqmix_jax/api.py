"""Training and playing from Python: no command line, and no files other than those of a run."""

import dataclasses
import operator
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.algos.base import Algorithm
from wqmix_jax.callbacks import Callbacks
from wqmix_jax.config import MAX_SEED, RunConfig, run_config
from wqmix_jax.envs.base import Environment
from wqmix_jax.envs.checks import check_environment
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build, checked
from wqmix_jax.records.metrics import load_header
from wqmix_jax.records.run_dir import failed_members
from wqmix_jax.runs.initial import Initial, read_initial, with_arrays
from wqmix_jax.runs.memory import compile_within_memory, memory_faults_in_one_line
from wqmix_jax.runs.progress import Display, make_optional_display
from wqmix_jax.runs.saved_policies import (
    BEST,
    LAST,
    GreedyPolicy,
    finite_members,
    policy_file,
    read_labels,
    read_policies,
)
from wqmix_jax.runs.trust import NOTHING_NAMED, Named, open_config
from wqmix_jax.training.compile_cache import use_compilation_cache
from wqmix_jax.training.compiled_loop import Trainer, TrainState, abstract_state, make_trainer, train_sharding
from wqmix_jax.training.host_loop import Loop, advance, begin, is_finished, sound_steps
from wqmix_jax.training.members import Member, make_members, member_name


def train_seeds(
    config: RunConfig | Mapping[str, Any],
    seeds: Sequence[int],
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains all ``seeds`` in one compiled call until each has played ``config.total_env_steps`` environment steps.

    The run's callbacks (``config.callbacks``) see every evaluation, and may end training earlier.

    Args:
        config: the result of `wqmix_jax.load_config`, or nested mappings as in a run folder's ``config.yaml``, whose
            classes are imported from anywhere: don't pass those of a run that you don't trust. Its ``seed``,
            ``num_seeds`` and ``host`` are ignored, and so are all options about files, except ``init_from``.
        seeds: different integers from 0 to 2**31 - 1. A seed draws the same random numbers whichever seeds train with
            it, but how many they are, and on how many devices or CPU cores, changes the order of floating-point sums.
            Such differences start as rounding errors and grow, so that two curves of one seed may drift apart.
        callback: called with each new record.
        progress: whether progress is shown on stderr: as a bar, or as a line now and then if a bar can't be drawn. By
            default it is shown on a terminal and in a notebook.

    Returns:
        The final train state, leaves ``[S, ..]`` in the order of ``seeds`` (with ``config.sweep`` all seeds with the
        first values, then all with the second, and so on), and all records: the same dicts as the lines of
        [`metrics.jsonl`](running.md#metricsjsonl).

    Raises:
        ConfigError: if an option or a seed is not allowed, or the environment doesn't fit its spec.
        RunError: if an environment outside of JAX fails too often, or the memory is too small.
    """
    config = config if isinstance(config, RunConfig) else run_config(config)
    members = make_members(config.algo, _checked(seeds), config.sweep)
    return train_members(config, members, callback=callback, progress=progress)


@memory_faults_in_one_line()
def train_members(
    config: RunConfig,
    members: tuple[Member, ...],
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains as `train_seeds`, but members that are given: any seeds with any values of traced options.

    Args:
        config: the options; its ``sweep`` is ignored too.
        members: different members with values of the same options.
        callback: as in `train_seeds`.
        progress: as in `train_seeds`.

    Returns:
        What `train_seeds` returns, in the order of ``members``.

    Raises:
        ConfigError: if an option is not allowed, or the environment doesn't fit its spec.
        RunError: if an environment outside of JAX fails too often, or the memory is too small.
    """
    use_compilation_cache(config.compilation_cache)
    sharding = train_sharding(config, len(members))  # claims the cores before the check may start JAX's backend
    check_environment(config.env)

    trainer = make_trainer(config, sharding=sharding)
    initial = None
    if config.init_from is not None:
        initial = read_initial(config, members, abstract_state(trainer, members).learner)

    with make_optional_display(config.total_env_steps, shown=progress) as display:
        display.note("compiling")
        trainer, compilation, _ = compile_within_memory(config, trainer, members)
        display.note(str(compilation))
        return _trained(config, trainer, members, initial, callback, display)


def _trained(
    config: RunConfig,
    trainer: Trainer,
    members: tuple[Member, ...],
    initial: Initial | None,
    callback: Callable[[dict[str, Any]], None] | None,
    display: Display,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains to the end and returns the state and all records."""
    records: list[dict[str, Any]] = []
    callbacks = Callbacks(config)

    def take(loop: Loop, lines: list[dict[str, Any]]) -> None:
        for line in callbacks.see(loop, lines) if lines else ():
            records.append(line)
            if callback is not None:
                callback(line)
        display.update(sound_steps(loop), lines)

    with config.env.external.running([member.seed for member in members]):
        prepare = None if initial is None else lambda state: with_arrays(state, initial.arrays)
        loop, lines = begin(trainer, members, prepare=prepare)
        while True:
            if (failure := trainer.failure()) is not None:
                raise failure
            take(loop, lines)
            if is_finished(loop) or callbacks.stopped is not None:
                return loop.state, records
            loop, lines = advance(trainer, loop)


class RunPolicies(NamedTuple):
    """The policies of all members of a run.

    Attributes:
        env: the environment that they were trained in.
        names: the names of all members (`members.member_name`), in the order of ``run.json``.
        policies: the policies with finite parameters, by their members' names.
        failed: the environment step at which a member's loss or parameters stopped being finite, by its name.
    """

    env: Environment
    names: tuple[str, ...]
    policies: dict[str, GreedyPolicy]
    failed: dict[str, int]


def load_policy(
    run_dir: str | os.PathLike[str],
    *,
    member: int = 0,
    which: Literal["best", "last"] = "best",
    config: RunConfig | None = None,
    config_dir: str | os.PathLike[str] | None = None,
    worker_python: str | None = None,
    simulator: str | None = None,
    name: str | None = None,
    module: str | None = None,
) -> GreedyPolicy:
    """Loads the greedy policy of one member of a run.

    Args:
        run_dir: the run's folder; with ``config`` it may also be a file of policies.
        member: the number of the member, from 0 in the order of ``run.json``: the seeds, and in a sweep all seeds for
            each of its values.
        which: the policy of the best evaluation since learning began (``env_steps`` is 0 if there was none yet), or of
            the last checkpoint.
        config: the algorithm and environment. With it, the folder's ``config.yaml`` is not read; without it, that file
            names the classes, see `wqmix_jax.runs.trust`.
        config_dir: a folder from which their modules may be imported, as ``--config-dir``.
        worker_python: the interpreter of the workers, which must be repeated if the run names one.
        simulator: the run's ``env.simulator``, which must be repeated if it is neither in the current folder nor in
            ``config_dir``.
        name: the run's ``env.name``, which must be repeated if it is a module of a task of PettingZoo that is neither
            in the current folder nor in a well-known package.
        module: the same of ``env.module``, which registers a task of Gymnasium.

    Returns:
        The policy.

    Raises:
        ConfigError: if there is no such policy, if it doesn't fit ``config``, if its parameters are not finite, or if
            the folder names code that may not be executed.
    """
    if config is None:
        opened = open_policies(run_dir, which=which, named=Named(config_dir, worker_python, simulator, name, module))
    else:
        path = Path(run_dir)
        path = policy_file(path, which) if path.is_dir() else path
        arithmetic = {"matmul_precision": config.matmul_precision, "compute_dtype": config.compute_dtype}
        opened = policies_of_file(path, config.env, config.algo, arithmetic)
    if not 0 <= member < len(opened.names):
        raise ConfigError(f"member={member} is not allowed: {run_dir} has members 0 to {len(opened.names) - 1}")
    return opened.policies[playable(opened, member)]


def load_policies(
    run_dir: str | os.PathLike[str],
    *,
    which: Literal["best", "last"] = "best",
    config_dir: str | os.PathLike[str] | None = None,
    worker_python: str | None = None,
    simulator: str | None = None,
    name: str | None = None,
    module: str | None = None,
    named: Named | None = None,
) -> tuple[Environment, dict[str, GreedyPolicy]]:
    """Loads the environment of a run and the greedy policies of all its members.

    A policy whose parameters are not finite is left out, with a warning.

    Args:
        run_dir: the run's folder.
        which: the policies of the best evaluations since learning began, or of the last checkpoint.
        config_dir: as in `load_policy`.
        worker_python: as in `load_policy`.
        simulator: as in `load_policy`.
        name: as in `load_policy`.
        module: as in `load_policy`.
        named: the last five as one value; the five are ignored if it is given.

    Returns:
        The environment, and a dict from a member's name (``"0"``; in a sweep ``"0-alpha0.1"``) to its policy.

    Raises:
        ConfigError: if the folder holds no such policies, or none with finite parameters, if it names code that may not
            be executed, or if the environment doesn't fit its spec.
    """
    opened = open_policies(
        run_dir, which=which, named=named or Named(config_dir, worker_python, simulator, name, module)
    )
    for member in opened.names:
        if member not in opened.policies:
            warnings.warn(f"{run_dir}: seed {member} is left out: its parameters are not finite", stacklevel=2)
    return opened.env, opened.policies


def open_policies(
    run_dir: str | os.PathLike[str], *, which: Literal["best", "last"] = "best", named: Named = NOTHING_NAMED
) -> RunPolicies:
    """Reads all policies of a run; each acts with its member's values of swept options.

    Args:
        run_dir: the run's folder.
        which: the policies of the best evaluations, or of the last checkpoint.
        named: the places and programs from which the folder may have code executed.

    Raises:
        ConfigError: if the folder holds no such policies, or none with finite parameters, if it names code that may not
            be executed, or if the environment doesn't fit its spec.
    """
    folder = Path(run_dir)
    values, path = open_config(folder, named), policy_file(folder, which)
    env, algo = build("env", values["env"]), build("algo", values["algo"])
    arithmetic = {name: values[name] for name in ("matmul_precision", "compute_dtype")}
    opened = policies_of_file(path, env, algo, arithmetic, labels=load_header(folder)["members"])
    return opened._replace(failed={name: line["env_steps"] for name, line in failed_members(folder).items()})


def policies_of_file(
    path: Path,
    env: Environment,
    algo: Algorithm,
    arithmetic: Mapping[str, str],
    *,
    labels: Sequence[Mapping[str, Any]] | None = None,
) -> RunPolicies:
    """Reads the policies in a run's ``policies/best.npz`` or ``last.npz``, and nothing else of the run.

    Args:
        path: the file.
        env: the environment that its shapes must fit.
        algo: the algorithm that its shapes must fit; each policy acts with its member's values of swept options.
        arithmetic: ``matmul_precision`` and ``compute_dtype``, see `GreedyPolicy`.
        labels: the members' labels; by default those in the file.

    Raises:
        ConfigError: if it can't be read, has other shapes, or holds no policy with finite parameters, or if the
            environment doesn't fit its spec.
    """
    check_environment(env)
    spec = env.spec  # outside of `eval_shape`: an environment may cache what it makes
    like = jax.eval_shape(lambda: algo.acting_params(algo.init(jax.random.key(0), spec)))
    stored = read_policies(path, like)
    labels = read_labels(path) if labels is None else labels
    if len(labels) != len(stored.env_steps):
        raise ConfigError(f"{path} doesn't fit: it holds {len(stored.env_steps)} members, run.json has {len(labels)}")
    finite, names = finite_members(stored.params), tuple(map(member_name, labels))
    if not finite.any():
        other = LAST if path.stem == BEST else BEST
        raise ConfigError(f"{path} can't be played: no seed has finite parameters; try policy={other}")
    params = jax.tree.map(jnp.asarray, stored.params)
    policies = {
        names[index]: GreedyPolicy(
            _with_swept(algo, labels[index]),
            jax.tree.map(operator.itemgetter(index), params),
            spec,
            **arithmetic,
            env_steps=int(stored.env_steps[index]),
        )
        for index in np.flatnonzero(finite).tolist()
    }
    return RunPolicies(env, names, policies, failed={})


def _with_swept(algo: Algorithm, member: Mapping[str, Any]) -> Algorithm:
    """Returns the algorithm with a member's values of swept options, which its labels hold."""
    swept = {name.removeprefix("algo."): value for name, value in member.items() if name != "seed"}
    if not swept:
        return algo
    values = {field.name: getattr(algo, field.name) for field in dataclasses.fields(algo) if field.init}  # type: ignore[arg-type]
    return checked(type(algo), {**values, **swept}, prefix="algo.")


def playable(opened: RunPolicies, member: int) -> str:
    """Returns the name of a member, counted from 0.

    Raises:
        ConfigError: if its parameters are not finite.
    """
    name = opened.names[member]
    if name not in opened.policies:
        raise ConfigError(f"member={member} is not allowed: the parameters of seed {name} are not finite")
    return name


def trained_policy(config: RunConfig, state: TrainState, *, member: int = 0) -> GreedyPolicy:
    """Returns the greedy policy of one member after `train_seeds`.

    Args:
        config: the options that were passed to `train_seeds`.
        state: the state that it returned.
        member: the number of the member, counted from 0.

    Returns:
        The policy.

    Raises:
        ConfigError: if there is no such member, or its parameters are not finite.
    """
    num_members = len(state.failed)
    if not 0 <= member < num_members:
        raise ConfigError(f"member={member} is not allowed: choose one of 0 to {num_members - 1}")
    params = jax.tree.map(operator.itemgetter(member), config.algo.acting_params(state.learner.params))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise ConfigError(f"member={member} is not allowed: its parameters are not finite")
    swept = {name: getattr(state.hp, name)[member].item() for name in config.sweep}
    algo, env_steps = dataclasses.replace(config.algo, **swept), int(state.counters.env_steps[member])
    return GreedyPolicy(algo, params, config.env.spec, config.matmul_precision, config.compute_dtype, env_steps)


def _checked(seeds: Sequence[int]) -> list[int]:
    try:
        listed = [operator.index(seed) for seed in seeds]
    except TypeError:
        listed = []
    if not listed or len(set(listed)) < len(listed) or min(listed) < 0 or max(listed) > MAX_SEED:
        raise ConfigError(f"seeds={seeds} is not allowed: different integers from 0 to {MAX_SEED} are needed")
    return listed
