"""Greedy episodes of every seed."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Algorithm, Context, Hyperparams
from wqmix_jax.envs.base import Environment
from wqmix_jax.training.rollout import rollout
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
        the environment's own metrics. Episodes in which the environment failed are left out.
    """
    played = greedy_episodes(env, algo, params, hp, ctx, keys, num_episodes=num_episodes)
    episode_return, length, metrics, whole = played
    return {
        "episode_return": episode_return.mean(-1, where=whole),
        "episode_return_std": episode_return.std(-1, where=whole),
        "episode_length": length.mean(-1, where=whole),
        "episode_length_std": length.std(-1, where=whole),
        **jax.tree.map(lambda leaf: leaf.mean(-1, where=whole), metrics),
    }


class Figures(NamedTuple):
    """What came of every episode, leaves ``[S, E]``.

    Attributes:
        episode_return: float32, undiscounted.
        episode_length: float32, in steps.
        metrics: the environment's own scalars, by their names.
        whole: bool, False where the environment failed.
    """

    episode_return: Array
    episode_length: Array
    metrics: dict[str, Array]
    whole: Array


def greedy_episodes(
    env: Environment,
    algo: Algorithm,
    params: PyTree,
    hp: Hyperparams,
    ctx: Context,
    keys: PRNGKey,
    *,
    num_episodes: int,
) -> Figures:
    """Plays ``num_episodes`` greedy episodes of each seed; arguments as in `rollout.rollout`."""
    greedy = ctx._replace(epsilon=jnp.zeros_like(ctx.epsilon))
    play = functools.partial(_play, env.for_evaluation(), algo, params, hp, greedy)
    return _in_turns(play, keys, num_episodes, env.episodes_at_once(num_episodes))


def _play(
    env: Environment, algo: Algorithm, params: PyTree, hp: Hyperparams, ctx: Context, keys: PRNGKey, num_envs: int
) -> Figures:
    played = rollout(env, algo, params, hp, ctx, keys, num_envs=num_envs)
    return Figures(played.episode_return, played.episodes.length.astype(jnp.float32), played.metrics, played.whole)


def _in_turns(play: Callable[[PRNGKey, int], Figures], keys: PRNGKey, num_episodes: int, at_once: int) -> Figures:
    """``num_episodes`` of each seed, ``at_once`` side by side."""
    if at_once == num_episodes:
        return play(keys, num_episodes)

    def turn(index: Array) -> Figures:
        return play(jax.vmap(jax.random.fold_in, (0, None))(keys, index), at_once)

    figures = jax.lax.map(turn, jnp.arange(-(-num_episodes // at_once)))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1)[:, :num_episodes], figures)
