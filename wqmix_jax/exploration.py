"""Greedy and epsilon-greedy choice among available actions, and the schedule of epsilon."""

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array, PRNGKey


def masked_argmax(agent_qs: Array, avail_actions: Array) -> Array:
    """Each agent's best available action: ``[.., N, A]``, ``[.., N, A]`` bool -> ``[.., N]`` int32, first on ties.

    The action is available whatever the values are, nan and infinities included; 0 where no action is available.
    """
    # An available -inf must beat an unavailable action; a nan passes through `maximum` and wins the argmax.
    available_qs = jnp.maximum(agent_qs, jnp.finfo(jnp.result_type(agent_qs, float)).min)
    return jnp.argmax(jnp.where(avail_actions, available_qs, -jnp.inf), axis=-1).astype(jnp.int32)


def with_idle_action(avail_actions: Array) -> Array:
    """Makes action 0 available to each agent without any available action: ``[.., N, A]`` bool -> ``[.., N, A]`` bool.

    Such an agent plays action 0, and maxima over its available actions are the utility of action 0, as for a unit in
    SMAC that is dead. Rollout and replay apply this, so that no algorithm meets an agent without an action.
    """
    is_first = jnp.arange(avail_actions.shape[-1]).reshape((1,) * (avail_actions.ndim - 1) + (-1,)) == 0
    return avail_actions | (is_first & ~avail_actions.any(-1, keepdims=True))


def epsilon_greedy(key: PRNGKey, agent_qs: Array, avail_actions: Array, epsilon: Array) -> Array:
    """Each agent on its own explores uniformly over its available actions with probability ``epsilon`` (scalar).

    Shapes as `masked_argmax`.
    """
    explore_key, action_key = jax.random.split(key)
    explore = jax.random.uniform(explore_key, agent_qs.shape[:-1]) < epsilon
    random_action = jax.random.categorical(action_key, jnp.where(avail_actions, 0.0, -jnp.inf), axis=-1)
    return jnp.where(explore, random_action.astype(jnp.int32), masked_argmax(agent_qs, avail_actions))


def linear_epsilon(env_steps: Array, start: Array, finish: Array, anneal_steps: Array) -> Array:
    """Linear from ``start`` to ``finish`` over the first ``anneal_steps`` environment steps, constant afterwards."""
    progress = jnp.minimum(env_steps / anneal_steps, 1.0)
    return start + (finish - start) * progress
