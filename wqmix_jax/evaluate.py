"""The command line: ``python -m wqmix_jax.evaluate run=RUN_DIR [policy=best] [episodes=32] [seed=0]``.

For agents that PyMARL trained, ``pymarl=FOLDER [env=predator_prey]`` stands in the place of ``run`` and ``policy``.
Plays greedy episodes and prints their return and length. Whatever is wrong with the options or the checkpoint is told
in one line on stderr, with exit code 2.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import hydra
import jax
import jax.numpy as jnp
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from wqmix_jax.algos.base import Algorithm, Context, hyperparams
from wqmix_jax.config import CONFIG_DIR, ConfigError, PositiveInt, build, options
from wqmix_jax.envs.base import Environment
from wqmix_jax.evaluator import evaluate
from wqmix_jax.interop import pymarl
from wqmix_jax.logger import load_header
from wqmix_jax.members import member_name
from wqmix_jax.policy import POLICY_DIR, load_policy
from wqmix_jax.runs import read_config
from wqmix_jax.types import Array, PRNGKey, PyTree


@options
class EvaluateOptions:
    """What is played, beside the environment.

    Attributes:
        run: the folder of a run.
        policy: which of its policies, those of the best evaluations or of the last checkpoint.
        pymarl: the folder of a PyMARL checkpoint.
        episodes: greedy episodes.
        seed: of the episodes' randomness.
        matmul_precision: what `jax.default_matmul_precision` is set to.
    """

    run: str | None
    policy: Literal["best", "last"]
    pymarl: str | None
    episodes: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    try:
        played = _evaluate(_compose(sys.argv[1:] if arguments is None else arguments))
        for name, figures in played.items():
            _show(name, figures)
    except (ConfigError, pymarl.PyMARLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _show(name: str, figures: dict[str, float]) -> None:
    for what in ("return", "length"):
        mean, deviation = figures[f"episode_{what}"], figures[f"episode_{what}_std"]
        print(f"{name}{what} {mean:.2f} (standard deviation {deviation:.2f})")


def evaluate_run(run_dir: Path, chosen: EvaluateOptions) -> dict[str, dict[str, float]]:
    """The same of every member of a run, by its name.

    Raises:
        ConfigError: if the folder holds no run or no policies that fit it.
    """
    values = read_config(run_dir)
    env, algo = build("env", values["env"]), build("algo", values["algo"])
    like = jax.eval_shape(lambda: algo.acting_params(algo.init(jax.random.key(0), env.spec)))
    policy = load_policy(run_dir / POLICY_DIR / f"{chosen.policy}.npz", like)
    play = _player(env, algo, chosen)
    return {
        f"seed {member_name(label)}: ": play(jax.tree.map(lambda leaf, at=index: leaf[at], policy.params))
        for index, label in enumerate(load_header(run_dir)["members"])
    }


def evaluate_pymarl(env: Environment, algo: Algorithm, chosen: EvaluateOptions) -> dict[str, float]:
    """Means and standard deviations over the episodes, as `evaluator.evaluate` names them.

    Raises:
        PyMARLError: if the checkpoint's agent doesn't fit the algorithm and the environment.
    """
    like = jax.eval_shape(lambda: algo.init(jax.random.key(0), env.spec))
    params = pymarl.load_checkpoint(chosen.pymarl or "", like, nets=["agent"])
    return _player(env, algo, chosen)(params)


def _player(env: Environment, algo: Algorithm, chosen: EvaluateOptions) -> Callable[[PyTree], dict[str, float]]:
    """Plays the episodes with one member's parameters; compiled once for all of them."""
    hp = jax.tree.map(jnp.asarray, hyperparams(algo))
    ctx = Context(epsilon=jnp.float32(0), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
    key = jax.random.key(chosen.seed, impl="threefry2x32")
    env.host.sharding()  # refuses where the host can't be called

    @jax.jit
    def play(params: PyTree, hp: PyTree, ctx: Context, keys: PRNGKey) -> dict[str, Array]:
        with jax.default_matmul_precision(chosen.matmul_precision):
            return evaluate(env, algo, params, hp, ctx, keys, num_episodes=chosen.episodes)

    def figures(params: PyTree) -> dict[str, float]:
        one_seed = jax.tree.map(lambda leaf: leaf[None], (params, hp, ctx, key))
        with env.host.running([chosen.seed]):
            return {name: value.item() for name, value in play(*one_seed).items()}

    return figures


def _evaluate(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Figures by what they are of, the prefix of their lines."""
    env_values, algo_values = values.pop("env"), values.pop("algo")
    if (values["run"] is None) == (values["pymarl"] is None):
        raise ConfigError("run is missing: write run=RUN_DIR, or pymarl=FOLDER, the folder of a PyMARL checkpoint")
    folders = {
        name: None if values[name] is None else str(values[name]) for name in ("run", "pymarl")
    }  # may be numbers
    try:
        chosen = build("", {"_target_": f"{__name__}.{EvaluateOptions.__name__}", **values, **folders})
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix(".")) from None
    if chosen.run is not None:
        return evaluate_run(Path(chosen.run), chosen)
    algo = build("algo", algo_values | {"hidden_dim": pymarl.hidden_dim(chosen.pymarl or "")})
    return {"": evaluate_pymarl(build("env", env_values), algo, chosen)}


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    """What ``configs/evaluate.yaml`` and the overrides say."""
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = hydra.compose("evaluate", list(overrides))
            return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    main()
