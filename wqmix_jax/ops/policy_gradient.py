"""The parts of losses of policies that actions are drawn from, and of their critics."""

import functools

import jax
import jax.numpy as jnp
import optax

from wqmix_jax.ops.action_selection import UNAVAILABLE
from wqmix_jax.types import Array


def log_probabilities(logits: Array, avail_actions: Array) -> Array:
    """Returns the logarithm of the softmax over available actions: two ``[.., A]`` -> ``[.., A]``, finite."""
    return jax.nn.log_softmax(jnp.where(avail_actions, logits, UNAVAILABLE))


def has_choice(avail_actions: Array) -> Array:
    """Returns 1 where an agent has several available actions, otherwise 0: ``[.., A]`` bool -> ``[..]`` float32."""
    return (avail_actions.sum(-1) > 1).astype(jnp.float32)


def entropy(log_policy: Array) -> Array:
    """Returns the entropy of policies, ``[.., A]`` log-probabilities -> ``[..]``, in nats."""
    return -(jnp.exp(log_policy) * log_policy).sum(-1)


def counterfactual_advantages(qs: Array, policy: Array, actions: Array) -> Array:
    """Returns Q(u) - sum_a pi(a) Q(a), a constant to the gradient (Foerster et al., arXiv 1705.08926, eq. 4).

    Args:
        qs: ``[.., A]``, the values of an agent's actions given those of the others.
        policy: ``[.., A]``, the agent's probabilities.
        actions: ``[.., A]``, the action taken, one-hot.
    """
    return jax.lax.stop_gradient((qs * actions).sum(-1) - (policy * qs).sum(-1))


def clipped_policy_loss(log_ratio: Array, advantages: Array, clip_ratio: Array) -> Array:
    """Returns -min(ratio A, clip(ratio, 1 - c, 1 + c) A), elementwise (Schulman et al., arXiv 1707.06347, eq. 7).

    Args:
        log_ratio: the log-probability of the action taken minus the old one.
        advantages: of the same shape, or one that broadcasts to it.
        clip_ratio: c, a scalar.
    """
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio) * advantages)


def clipped_value_loss(values: Array, old_values: Array, y: Array, value_clip: Array, huber_delta: Array) -> Array:
    """Returns the larger of two Huber losses, elementwise: that of the values, and that of values near the old ones.

    Args:
        values: any shape.
        old_values: as ``values``.
        y: the returns, as ``values``.
        value_clip: scalar, the most by which values near the old ones differ from these.
        huber_delta: scalar, the error from which on the Huber loss is linear.
    """
    near = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    huber = functools.partial(optax.losses.huber_loss, delta=huber_delta)
    return jnp.maximum(huber(values, y), huber(near, y))
