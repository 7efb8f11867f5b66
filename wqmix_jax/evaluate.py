"""Plays trained agents: ``python -m wqmix_jax.evaluate run_dir=RUN_DIR [episodes=100] [render=out.gif]``.

For agents that PyMARL trained, ``pymarl=FOLDER [env=predator_prey]`` takes the place of ``run_dir``. Plays greedy
episodes, prints means with confidence intervals, and draws one episode. Whatever is wrong with the options or the
checkpoint is printed as one line on stderr, with exit code 2, before anything is compiled.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from pydantic import Field

from wqmix_jax.api import RunPolicies, open_policies, playable, policies_of_file
from wqmix_jax.cli.command import command
from wqmix_jax.cli.help import with_options
from wqmix_jax.cli.overrides import compose_evaluation
from wqmix_jax.cli.parser import overrides_parser
from wqmix_jax.cli.syntax import as_text, parse_overrides
from wqmix_jax.config import PROGRAMS, CacheSetting
from wqmix_jax.envs.base import Environment, Viewer
from wqmix_jax.envs.checks import check_environment
from wqmix_jax.errors import ConfigError
from wqmix_jax.interop import pymarl
from wqmix_jax.options import PositiveInt, add_import_paths, build, checked, options
from wqmix_jax.records.metrics import load_header
from wqmix_jax.records.run_dir import refuse_other_games
from wqmix_jax.records.statistics import CONFIDENCE, mean_estimate, standard_deviation
from wqmix_jax.runs.memory import memory_faults_in_one_line
from wqmix_jax.runs.playing import film_episode, play_policies
from wqmix_jax.runs.saved_policies import GreedyPolicy
from wqmix_jax.runs.trust import Named
from wqmix_jax.training.compile_cache import use_compilation_cache
from wqmix_jax.training.devices import refuse_missing_backend, share_gpu

_HELP = """\
Plays greedy episodes of trained agents: means with 95% confidence intervals, and a picture if asked for.

The intervals of a seed are Student's over its episodes, cut to what is possible; of win rates they are Wilson's. Those
over several seeds take into account how much the seeds and their episodes differ (wqmix_jax.records.statistics has the
formula in mean_estimate). Seeds that failed are left out of the means over seeds; parameters that are not finite are
not played.

  python -m wqmix_jax.evaluate run_dir=RUN_DIR [episodes=100] [policy=best] [render=out.gif]
  python -m wqmix_jax.evaluate policy_file=FILE algo=NAME [env=NAME] [KEY=VALUE ..]
  python -m wqmix_jax.evaluate pymarl=FOLDER [env=NAME] [env.KEY=VALUE ..]

--config-dir DIR   adds the folder of your own algorithms and environments

The options and their defaults:

"""


@options
class EvaluateOptions:
    """The options of this command; those of the algorithm and the environment are in their own groups.

    Attributes:
        run_dir: the folder of a run: its own algorithm and environment play.
        policy: policies of a run: ``best``, of the best evaluations since learning began, or ``last``, of the last
            checkpoint.
        policy_file: a run's ``best.npz`` or ``last.npz`` alone; ``algo=NAME``, ``env=NAME`` and their options must
            be those of the run.
        pymarl: the folder of a PyMARL checkpoint, with its ``agent.th``; ``env=NAME`` and ``env.KEY`` choose the
            environment.
        episodes: number of greedy episodes of each member of the run.
        seed: seed of the episodes' random numbers.
        render: a GIF to which one more episode is drawn.
        member: member of the run whose episode is drawn, counted from 0 in the order of ``run.json``.
        overwrite: lets the picture replace a file.
        matmul_precision: precision in which an accelerator multiplies float32 matrices: ``float32``,
            ``tensorfloat32`` or ``bfloat16``; without effect on a CPU.
        compilation_cache: compiled programs are kept in the user's cache folder (``true``), in the named folder, or
            nowhere (``false``).
    """

    run_dir: str | None
    policy: Literal["best", "last"]
    policy_file: str | None
    pymarl: str | None
    episodes: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    render: str | None
    member: Annotated[int, Field(ge=0)]
    overwrite: bool
    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"]
    compilation_cache: CacheSetting


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    help_text = functools.partial(with_options, _HELP, EvaluateOptions, "evaluate.yaml")
    args = overrides_parser("python -m wqmix_jax.evaluate", help_text).parse_args(arguments)
    share_gpu()  # with a run that still trains
    add_import_paths(args.config_dir)
    with memory_faults_in_one_line():
        for line in _evaluate(as_text(args.overrides), args.config_dir):
            print(line, flush=True)


def _evaluate(overrides: Sequence[str], config_dir: str | None) -> Iterator[str]:
    """Yields the lines to print."""
    _refuse_foreign(overrides)
    values = compose_evaluation(overrides, config_dir).values
    for group in ("env", "algo"):
        if group not in values:
            raise ConfigError(
                f"{group} is missing: an evaluate.yaml in --config-dir replaces the built-in one as a whole"
            )
    env_values, algo_values = values.pop("env"), values.pop("algo")
    chosen = _options(values)
    use_compilation_cache(chosen.compilation_cache)
    refuse_missing_backend()
    opened = _opened(chosen, env_values, algo_values, _named(overrides, config_dir))
    if chosen.member >= len(opened.names):
        raise ConfigError(f"member={chosen.member} is not allowed: choose one of 0 to {len(opened.names) - 1}")
    viewer, drawn = None, opened.names[chosen.member]
    if chosen.render is not None:
        viewer, drawn = _viewer(opened.env, chosen, Path(chosen.render)), playable(opened, chosen.member)
    yield from _described(opened, chosen)
    yield from evaluate_policies(opened, chosen)
    if viewer is not None:
        path = Path(chosen.render or "")
        moments = film_episode(opened.env, opened.policies[drawn], viewer, path, seed=chosen.seed)
        seed = f"seed {drawn}, " if drawn else ""
        yield f"drawn: {path} ({seed}return {moments[-1].episode_return:.2f}, {len(moments) - 1} steps)"


def _refuse_foreign(overrides: Sequence[str]) -> None:
    """Refuses options that a run or a checkpoint defines itself.

    Raises:
        ConfigError: if such an option was given.
    """
    parsed = _parsed(overrides)
    played = {override.key_or_group for override in parsed if override.value() is not None}
    for text, override in zip(overrides, parsed, strict=True):
        is_program = override.key_or_group in [f"env.{name}" for name in PROGRAMS]
        if "run_dir" in played and re.split("[./]", override.key_or_group)[0] in ("env", "algo") and not is_program:
            raise ConfigError(f"{text} is not allowed with run_dir: a run's own algorithm and environment play")
        if override.key_or_group == "policy" and "policy_file" in played:
            raise ConfigError(f"{text} is not allowed with policy_file: the file holds one policy of each seed")
        if override.key_or_group == "algo" and "policy_file" not in played:
            raise ConfigError(f"{text} is not allowed: the agents of a run or of a PyMARL checkpoint play")
    if "policy_file" in played and "run_dir" not in played and "algo" not in played:
        raise ConfigError("algo is missing: with policy_file write algo=NAME, the algorithm that trained the policy")


def _parsed(overrides: Sequence[str]) -> list[Any]:
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} can't be read: options are written key=value, as in run_dir=outputs/first")
    return parse_overrides(overrides)


def _named(overrides: Sequence[str], config_dir: str | None) -> Named:
    """Returns the places and programs that this command names, see `wqmix_jax.runs.trust`."""
    given = {override.key_or_group: override.value() for override in _parsed(overrides)}
    programs = {name: None if (value := given.get(f"env.{name}")) is None else str(value) for name in PROGRAMS}
    return Named(config_dir, **programs)


def _options(values: Mapping[str, Any]) -> EvaluateOptions:
    """Returns the checked options.

    Raises:
        ConfigError: if an option is not allowed.
    """
    sources = ("run_dir", "policy_file", "pymarl")
    played = [name for name in sources if values[name] is not None]
    if len(played) > 1:
        raise ConfigError(f"{played[1]} is not allowed with {played[0]}: each says whose agents play")
    if not played:
        others = "pymarl=FOLDER, that of a PyMARL checkpoint, or policy_file=FILE algo=NAME"
        raise ConfigError(f"run_dir is missing: write run_dir=RUN_DIR, or {others}")
    return checked(EvaluateOptions, values, prefix="")


def _opened(
    chosen: EvaluateOptions, env_values: Mapping[str, Any], algo_values: Mapping[str, Any], named: Named
) -> RunPolicies:
    """Opens the policies, which play in the precision that was chosen here."""
    if chosen.run_dir is not None:
        opened = open_policies(chosen.run_dir, which=chosen.policy, named=named)
    elif chosen.policy_file is not None:
        env, algo = build("env", env_values), build("algo", algo_values)
        arithmetic = {"matmul_precision": chosen.matmul_precision, "compute_dtype": "float32"}
        opened = policies_of_file(Path(chosen.policy_file), env, algo, arithmetic)
    else:
        env = build("env", env_values)
        opened = RunPolicies(env, ("",), {"": _pymarl_policy(env, algo_values, chosen)}, {})
    policies = {
        name: dataclasses.replace(policy, matmul_precision=chosen.matmul_precision)
        for name, policy in opened.policies.items()
    }
    return opened._replace(policies=policies)


def _pymarl_policy(env: Environment, algo_values: Mapping[str, Any], chosen: EvaluateOptions) -> GreedyPolicy:
    folder = chosen.pymarl or ""
    if not Path(folder).is_dir():
        raise ConfigError(f"pymarl={folder} is not allowed: there is no such folder")
    try:
        check_environment(env)
        spec = env.spec  # outside the trace, in case the environment keeps what it makes on first use
        algo = build("algo", {**algo_values, **pymarl.agent_options(folder, spec)})
        like = jax.eval_shape(lambda: algo.init(jax.random.key(0), spec))
        params = pymarl.load_checkpoint(folder, like, nets=["agent"])
    except pymarl.PyMARLError as error:
        raise ConfigError(str(error)) from None
    return GreedyPolicy(algo, params, spec, chosen.matmul_precision)


def _viewer(env: Environment, chosen: EvaluateOptions, path: Path) -> Viewer:
    """Returns the viewer that draws the episode.

    Raises:
        ConfigError: if the environment has no viewer, or the file can't be written.
    """
    refused = f"render={chosen.render} is not allowed: "
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"{refused}pictures are animated GIFs, render={path.with_suffix('.gif')}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(refused + ("it is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    if path.exists() and not chosen.overwrite:
        raise ConfigError(f"{refused}the file is there already; overwrite=true replaces it")
    viewer = env.viewer()
    if viewer is None:
        raise ConfigError(f"{refused}nothing draws {type(env).__name__}; predator_prey and smax can be drawn")
    return viewer


def _described(opened: RunPolicies, chosen: EvaluateOptions) -> Iterator[str]:
    """Yields which policies play, how long they were trained, and how many episodes they play."""
    plays = f"{chosen.episodes} greedy episode{'s' if chosen.episodes > 1 else ''}"
    if chosen.pymarl is not None:
        yield f"the agents of {chosen.pymarl} play {plays}"
        return
    if chosen.run_dir is not None:
        yield from _other_game(chosen.run_dir, opened.env)
    source = f"{chosen.policy} policies of {chosen.run_dir}" if chosen.run_dir else f"policies of {chosen.policy_file}"
    yield f"the {source} play {plays} each"
    for name in opened.names:
        policy, failed = opened.policies.get(name), opened.failed.get(name)
        words = [] if failed is None else [f"failed at {failed:,} environment steps"]
        if policy is None:
            words.append("its parameters are not finite, left out")
        else:
            words.insert(0, f"trained for {policy.env_steps:,} environment steps" if policy.env_steps else "untrained")
            words += [] if failed is None else ["left out of the means over seeds"]
        yield f"seed {name}: {', '.join(words)}"


def _other_game(run_dir: str, env: Environment) -> Iterator[str]:
    """Yields warnings if a run was trained in another version of the game than the one that is played here."""
    there = load_header(run_dir).get("simulator", {})
    try:
        yield from refuse_other_games({run_dir: there, "this installation": env.external.versions()})
    except ConfigError as error:
        yield f"warning: {error}: this may be another game than the one of the training"


def evaluate_policies(opened: RunPolicies, chosen: EvaluateOptions) -> Iterator[str]:
    """Yields one line per member and figure, then, if several seeds trained alike, one per figure over their means.

    Members that failed are not part of these means.
    """
    samples: dict[str, dict[str, list[np.ndarray]]] = {}
    env = opened.env
    for name, figures in play_policies(env, opened.policies, episodes=chosen.episodes, seed=chosen.seed):
        seed, _, swept = name.partition("-")
        for figure, values in figures.items():
            yield _line(f"seed {name}: " if seed else "", env, figure, [values])
            if name not in opened.failed:
                samples.setdefault(swept, {}).setdefault(figure, []).append(values)
    for swept, figures in samples.items():
        for figure, values in figures.items():
            if len(values) > 1:
                yield _line(f"{len(values)} seeds{f', {swept}' if swept else ''}: ", env, figure, values)


def _line(players: str, env: Environment, figure: str, samples: Sequence[np.ndarray]) -> str:
    bounds = {"episode_length": (1, env.spec.episode_limit), "win_rate": (0, 1)}.get(figure, (-math.inf, math.inf))
    mean, low, high = mean_estimate(samples, bounds=bounds, is_share=figure == "win_rate")
    interval = "" if math.isnan(low) else f"{CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}, "
    deviation = f"standard deviation {standard_deviation(samples):.2f}"
    return f"{players}{figure.removeprefix('episode_')} {mean:.2f} ({interval}{deviation})"


if __name__ == "__main__":
    main()
