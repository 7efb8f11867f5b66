"""The command line: ``python -m wqmix_jax.evaluate run_dir=RUN_DIR [episodes=100] [render=out.gif] [key=value ..]``.

For agents that PyMARL trained, ``pymarl=FOLDER [env=predator_prey]`` stands in the place of ``run_dir``. Plays greedy
episodes, prints what came of them with confidence intervals, and draws one of them. Whatever is wrong with the options
or the checkpoint is told in one line on stderr, with exit code 2, before anything is compiled.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.api import RunPolicies, open_policies, playable, policies_of_file
from wqmix_jax.cli.command import command
from wqmix_jax.cli.overrides import as_text, parse_overrides
from wqmix_jax.cli.parser import OneLineParser
from wqmix_jax.config import PROGRAMS, CacheSetting
from wqmix_jax.envs.base import Environment, Viewer
from wqmix_jax.envs.checks import check_environment
from wqmix_jax.errors import ConfigError, RunError, refuse
from wqmix_jax.interop import pymarl
from wqmix_jax.networks.functional import compute_in
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.options import CONFIG_DIR, PositiveInt, add_import_paths, build, checked, options
from wqmix_jax.records.atomic import atomic
from wqmix_jax.records.metrics import load_header
from wqmix_jax.records.run_dir import refuse_other_games
from wqmix_jax.records.statistics import CONFIDENCE, mean_estimate, standard_deviation
from wqmix_jax.runs.memory import memory_faults_in_one_line
from wqmix_jax.runs.saved_policies import GREEDY, GreedyPolicy, play_episode
from wqmix_jax.runs.trust import Named
from wqmix_jax.train import INHERITS_ITSELF, tell_replaced, users_first
from wqmix_jax.training.compile_cache import cache_faults_in_one_line, use_compilation_cache
from wqmix_jax.training.devices import refuse_missing_backend, share_gpu
from wqmix_jax.training.rollout import Figures, greedy_episodes
from wqmix_jax.types import PRNGKey, PyTree

_HELP = """\
Plays greedy episodes of trained agents: means with 95% confidence intervals, and a picture if asked for.

The intervals of a seed are Student's over its episodes, cut to what is possible; of win rates they are Wilson's. Those
over several seeds take into account how much the seeds and their episodes differ (wqmix_jax.statistics.mean_estimate
has the formula). Seeds that failed are left out of the means over seeds; parameters that are not finite are not played.

  python -m wqmix_jax.evaluate run_dir=RUN_DIR [episodes=100] [policy=best] [render=out.gif]
  python -m wqmix_jax.evaluate policy_file=FILE algo=NAME [env=NAME] [KEY=VALUE ..]
  python -m wqmix_jax.evaluate pymarl=FOLDER [env=NAME] [env.KEY=VALUE ..]

--config-dir DIR   adds the folder of your own algorithms and environments

The options and their defaults:

"""


@options
class EvaluateOptions:
    """What is played, beside the environment.

    Attributes:
        run_dir: the folder of a run.
        policy: which of its policies: those of the best evaluations since learning began, or of the last checkpoint.
        policy_file: a file of policies alone, played by the algorithm and environment of this command.
        pymarl: the folder of a PyMARL checkpoint.
        episodes: greedy episodes of each member.
        seed: of the episodes' randomness.
        render: where a picture of one more episode goes, a GIF.
        member: whose episode is drawn, counted from 0 in the order of ``run.json``.
        overwrite: whether the picture may replace a file.
        matmul_precision: what `jax.default_matmul_precision` is set to.
        compilation_cache: see `CacheSetting`.
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
    args = _parser().parse_args(arguments)
    share_gpu()  # with a run that still trains
    try:
        add_import_paths(args.config_dir)
        with memory_faults_in_one_line():
            for line in _evaluate(as_text(args.overrides), args.config_dir):
                print(line, flush=True)
    except (ConfigError, pymarl.PyMARLError) as error:
        refuse(str(error))
    except RunError as error:  # of a simulator that can't be played on
        refuse(str(error), error.exit_code)


def _evaluate(overrides: Sequence[str], config_dir: str | None) -> Iterator[str]:
    """The lines that are printed."""
    _refuse_foreign(overrides)
    values = _compose(overrides, config_dir)
    for group in ("env", "algo"):
        if group not in values:
            raise ConfigError(
                f"{group} is missing: an evaluate.yaml in --config-dir replaces the built-in one as a whole"
            )
    env_values, algo_values = values.pop("env"), values.pop("algo")
    chosen = _options(values)
    use_compilation_cache(chosen.compilation_cache)
    refuse_missing_backend()
    if chosen.run_dir is not None:
        opened = open_policies(chosen.run_dir, which=chosen.policy, named=_named(overrides, config_dir))
    elif chosen.policy_file is not None:
        env, algo = build("env", env_values), build("algo", algo_values)
        arithmetic = {"matmul_precision": chosen.matmul_precision, "compute_dtype": "float32"}
        opened = policies_of_file(Path(chosen.policy_file), env, algo, arithmetic)
    else:
        env = build("env", env_values)
        opened = RunPolicies(env, ("",), {"": _pymarl_policy(env, algo_values, chosen)}, {})
    if chosen.member >= len(opened.names):
        raise ConfigError(f"member={chosen.member} is not allowed: choose one of 0 to {len(opened.names) - 1}")
    viewer, drawn = None, opened.names[chosen.member]
    if chosen.render is not None:
        viewer, drawn = _viewer(opened.env, chosen, Path(chosen.render)), playable(opened, chosen.member)
    yield from _described(opened, chosen)
    yield from evaluate_policies(opened, chosen)
    if viewer is not None:
        policy = opened.policies[drawn]
        yield _film(opened.env, policy, viewer, chosen, f"seed {drawn}, " if drawn else "")


def _refuse_foreign(overrides: Sequence[str]) -> None:
    """Options of what a run or a checkpoint brings along itself.

    Raises:
        ConfigError: if one was given.
    """
    parsed = _parsed(overrides)
    played = {override.key_or_group for override in parsed if override.value() is not None}
    of_run = "run_dir" in played
    for text, override in zip(overrides, parsed, strict=True):
        is_program = override.key_or_group in [f"env.{name}" for name in PROGRAMS]
        if of_run and re.split("[./]", override.key_or_group)[0] in ("env", "algo") and not is_program:
            raise ConfigError(f"{text} is not allowed with run_dir: a run's own algorithm and environment play")
        if override.key_or_group == "policy" and "policy_file" in played:
            raise ConfigError(f"{text} is not allowed with policy_file: the file holds one policy of each seed")
        if override.key_or_group == "algo" and "policy_file" not in played:
            raise ConfigError(f"{text} is not allowed: the agents of a run or of a PyMARL checkpoint play")
    if "policy_file" in played and not of_run and "algo" not in played:
        raise ConfigError("algo is missing: with policy_file write algo=NAME, the algorithm that trained the policy")


def _named(overrides: Sequence[str], config_dir: str | None) -> Named:
    """The places and programs that this command names, see `wqmix_jax.runs.trust`."""
    given = {override.key_or_group: override.value() for override in _parsed(overrides)}
    programs = {name: None if (value := given.get(f"env.{name}")) is None else str(value) for name in PROGRAMS}
    return Named(config_dir, **programs)


def _options(values: Mapping[str, Any]) -> EvaluateOptions:
    """The checked options.

    Raises:
        ConfigError: if one is not allowed.
    """
    sources = ("run_dir", "policy_file", "pymarl")
    played = [name for name in sources if values[name] is not None]
    if len(played) > 1:
        raise ConfigError(f"{played[1]} is not allowed with {played[0]}: each says whose agents play")
    if not played:
        others = "pymarl=FOLDER, that of a PyMARL checkpoint, or policy_file=FILE algo=NAME"
        raise ConfigError(f"run_dir is missing: write run_dir=RUN_DIR, or {others}")
    return checked(EvaluateOptions, values, prefix="")


def _pymarl_policy(env: Environment, algo_values: Mapping[str, Any], chosen: EvaluateOptions) -> GreedyPolicy:
    folder = chosen.pymarl or ""
    if not Path(folder).is_dir():
        raise ConfigError(f"pymarl={folder} is not allowed: there is no such folder")
    algo = build("algo", {**algo_values, "hidden_dim": pymarl.hidden_dim(folder)})
    check_environment(env)
    spec = env.spec  # outside the trace, in case the environment keeps what it makes on first use
    like = jax.eval_shape(lambda: algo.init(jax.random.key(0), spec))
    params = pymarl.load_checkpoint(folder, like, nets=["agent"])
    return GreedyPolicy(algo, params, spec, chosen.matmul_precision)


def _described(opened: RunPolicies, chosen: EvaluateOptions) -> Iterator[str]:
    """Describes what is played: which policies, how long they were trained, and how many episodes."""
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
    """Warnings where a run was trained in another version of the game than the one that is played here."""
    there = load_header(run_dir).get("simulator", {})
    try:
        yield from refuse_other_games({run_dir: there, "this installation": env.external.versions()})
    except ConfigError as error:
        yield f"warning: {error}: this may be another game than the one of the training"


def evaluate_policies(opened: RunPolicies, chosen: EvaluateOptions) -> Iterator[str]:
    """One line per member and figure, then, where several seeds trained alike, one per figure over their means.

    Members that failed are not part of these means.
    """
    samples: dict[str, dict[str, list[np.ndarray]]] = {}
    env, precision = opened.env, chosen.matmul_precision
    played = play_policies(env, opened.policies, episodes=chosen.episodes, seed=chosen.seed, matmul_precision=precision)
    for name, figures in played:
        seed, _, swept = name.partition("-")
        for what, values in figures.items():
            yield _line(f"seed {name}: " if seed else "", env, what, [values])
            if name not in opened.failed:
                samples.setdefault(swept, {}).setdefault(what, []).append(values)
    for swept, of_swept in samples.items():
        for what, values in of_swept.items():
            if len(values) > 1:
                yield _line(f"{len(values)} seeds{f', {swept}' if swept else ''}: ", env, what, values)


def _line(of: str, env: Environment, what: str, samples: Sequence[np.ndarray]) -> str:
    bounds = {"episode_length": (1, env.spec.episode_limit), "win_rate": (0, 1)}.get(what, (-math.inf, math.inf))
    mean, low, high = mean_estimate(samples, bounds=bounds, is_share=what == "win_rate")
    interval = "" if math.isnan(low) else f"{CONFIDENCE:.0%} interval {low:.2f} to {high:.2f}, "
    deviation = f"standard deviation {standard_deviation(samples):.2f}"
    return f"{of}{what.removeprefix('episode_')} {mean:.2f} ({interval}{deviation})"


def play_policies(
    env: Environment, policies: Mapping[str, GreedyPolicy], *, episodes: int, seed: int, matmul_precision: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Plays greedy episodes with each of a run's policies; compiled once for all of them.

    Args:
        env: where.
        policies: of one run, by their names.
        episodes: of each.
        seed: of the episodes' randomness, the same for all.
        matmul_precision: what `jax.default_matmul_precision` is set to.

    Yields:
        The policy's name, and its figures ``[episodes]`` by their names in the records.

    Raises:
        RunError: if the environment failed in all episodes of a policy.
    """
    algo, compute_dtype = next((policy.algo, policy.compute_dtype) for policy in policies.values())
    key = jax.random.key(seed, impl="threefry2x32")
    env.external.sharding()  # refuses where the host can't be called

    @jax.jit
    def play(params: PyTree, hp: PyTree, ctx: Context, keys: PRNGKey) -> Figures:
        with pinned_draws(), jax.default_matmul_precision(matmul_precision), compute_in(compute_dtype):
            return greedy_episodes(env, algo, params, hp, ctx, keys, num_episodes=episodes)

    for name, policy in policies.items():
        hp = hyperparams(policy.algo)  # with the member's own values of swept options
        one_seed = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (policy.params, hp, GREEDY, key))
        with env.external.running([seed]), cache_faults_in_one_line():
            played = jax.tree.map(lambda leaf: np.asarray(leaf)[0], play(*one_seed))
        if not played.whole.any():
            of = f" of seed {name}" if name else ""
            raise RunError(f"all {episodes} episodes{of} failed in the simulator: the warnings above say why")
        figures = {"episode_return": played.episode_return, "episode_length": played.episode_length, **played.metrics}
        yield name, {what: values[played.whole] for what, values in figures.items()}


def _viewer(env: Environment, chosen: EvaluateOptions, path: Path) -> Viewer:
    """What draws the episode.

    Raises:
        ConfigError: if nothing can, or not there.
    """
    told = f"render={chosen.render} is not allowed: "
    if path.suffix.lower() != ".gif":
        raise ConfigError(f"{told}pictures are animated GIFs, render={path.with_suffix('.gif')}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(told + ("it is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    if path.exists() and not chosen.overwrite:
        raise ConfigError(f"{told}the file is there already; overwrite=true replaces it")
    viewer = env.viewer()
    if viewer is None:
        raise ConfigError(f"{told}nothing draws {type(env).__name__}; predator_prey and smax can be drawn")
    return viewer


def _film(env: Environment, policy: GreedyPolicy, viewer: Viewer, chosen: EvaluateOptions, of: str) -> str:
    """Writes the picture and returns a line about it."""
    path = Path(chosen.render or "")
    key = jax.random.key(chosen.seed, impl="threefry2x32")
    moments = play_episode(env, policy, key)
    with atomic(path) as temporary:
        viewer.film(moments, str(temporary))
    return f"drawn: {path} ({of}return {moments[-1].episode_return:.2f}, {len(moments) - 1} steps)"


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m wqmix_jax.evaluate")
    own = (CONFIG_DIR / "evaluate.yaml").read_text().partition("run_dir:")
    parser.format_help = lambda: _HELP + "".join(f"  {line}\n" for line in "".join(own[1:]).splitlines())
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir")
    return parser


def _parsed(overrides: Sequence[str]) -> list[Override]:
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} can't be read: options are written key=value, as in run_dir=outputs/first")
    return parse_overrides(overrides)


def _compose(overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """What ``configs/evaluate.yaml`` and the overrides say; unknown keys are added, for their schema to refuse."""
    plain = [text.removeprefix("+") if text.startswith("+algo=") else text for text in overrides]
    forced = [text if text.startswith(("env=", "algo=", "+", "~")) else f"++{text}" for text in plain]
    of_run = any(override.key_or_group == "run_dir" for override in _parsed(overrides))
    try:
        with users_first(config_dir), hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra.compose("evaluate", forced)
            if not of_run:  # whose own algorithm and environment play
                tell_replaced("evaluate", forced, config_dir)
            return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except MissingConfigException as error:
        known = ", ".join(name for name in error.options or () if not name.startswith("_"))
        raise ConfigError(
            f"{str(error.missing_cfg_file).replace('/', '=')} is not allowed: choose one of {known}"
        ) from None
    except RecursionError:
        raise ConfigError(INHERITS_ITSELF) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


if __name__ == "__main__":
    main()
