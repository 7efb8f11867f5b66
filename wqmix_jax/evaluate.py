"""The command line: ``python -m wqmix_jax.evaluate pymarl=FOLDER [env=predator_prey] [episodes=32] [seed=0]``.

Plays greedy episodes with trained agents and prints their return and length. Whatever is wrong with the options or the
checkpoint is told in one line on stderr, with exit code 2.
"""

import sys
from collections.abc import Sequence
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
from wqmix_jax.types import Array, PRNGKey, PyTree


@options
class EvaluateOptions:
    """What is played, beside the environment.

    Attributes:
        pymarl: the folder of a PyMARL checkpoint.
        episodes: greedy episodes.
        seed: of the episodes' randomness.
        matmul_precision: what `jax.default_matmul_precision` is set to.
    """

    pymarl: str
    episodes: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    try:
        played = _evaluate(_compose(sys.argv[1:] if arguments is None else arguments))
    except (ConfigError, pymarl.PyMARLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for name in ("return", "length"):
        mean, deviation = played[f"episode_{name}"], played[f"episode_{name}_std"]
        print(f"{name} {mean:.2f} (standard deviation {deviation:.2f})")


def evaluate_pymarl(env: Environment, algo: Algorithm, chosen: EvaluateOptions) -> dict[str, float]:
    """Means and standard deviations over the episodes, as `evaluator.evaluate` names them.

    Raises:
        PyMARLError: if the checkpoint's agent doesn't fit the algorithm and the environment.
    """
    like = jax.eval_shape(lambda: algo.init(jax.random.key(0), env.spec))
    params = pymarl.load_checkpoint(chosen.pymarl, like, nets=["agent"])
    hp = jax.tree.map(jnp.asarray, hyperparams(algo))
    ctx = Context(epsilon=jnp.float32(0), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
    key = jax.random.key(chosen.seed, impl="threefry2x32")
    one_seed = jax.tree.map(lambda leaf: leaf[None], (params, hp, ctx, key))
    env.host.sharding()  # refuses where the host can't be called

    def play(params: PyTree, hp: PyTree, ctx: Context, keys: PRNGKey) -> dict[str, Array]:
        with jax.default_matmul_precision(chosen.matmul_precision):
            return evaluate(env, algo, params, hp, ctx, keys, num_episodes=chosen.episodes)

    with env.host.running([chosen.seed]):
        return {name: value.item() for name, value in jax.jit(play)(*one_seed).items()}


def _evaluate(values: dict[str, Any]) -> dict[str, float]:
    env, algo_values = build("env", values.pop("env")), values.pop("algo")
    if values["pymarl"] is None:
        raise ConfigError("pymarl is missing: write pymarl=FOLDER, the folder of a PyMARL checkpoint")
    values["pymarl"] = str(values["pymarl"])  # a checkpoint's folder may be named by a number
    try:
        chosen = build("", {"_target_": f"{__name__}.{EvaluateOptions.__name__}", **values})
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix(".")) from None
    algo = build("algo", algo_values | {"hidden_dim": pymarl.hidden_dim(chosen.pymarl)})
    return evaluate_pymarl(env, algo, chosen)


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
