"""Greedy episodes of every seed."""

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Algorithm, Context, Hyperparams
from wqmix_jax.envs.base import Environment
from wqmix_jax.rollout import rollout
from wqmix_jax.types import Array, PRNGKey, PyTree


def evaluate(
    env: Environment,
    algo: Algorithm,
    params: PyTree,
    hp: Hyperparams,
    ctx: Context,
    keys: PRNGKey,
    *,
    num_episodes: int,
) -> dict[str, Array]:
    """Means over ``num_episodes`` greedy episodes, leaves ``[S]``; arguments as in `rollout.rollout`.

    Returns:
        ``episode_return`` (undiscounted) and ``episode_length`` with their standard deviations over the episodes, and
        the environment's own metrics.
    """
    greedy = ctx._replace(epsilon=jnp.zeros_like(ctx.epsilon))
    played = rollout(env, algo, params, hp, greedy, keys, num_envs=num_episodes)
    lengths = played.episodes.length.astype(jnp.float32)
    return {
        "episode_return": played.episode_return.mean(-1),
        "episode_return_std": played.episode_return.std(-1),
        "episode_length": lengths.mean(-1),
        "episode_length_std": lengths.std(-1),
        **jax.tree.map(lambda leaf: leaf.mean(-1), played.metrics),
    }
