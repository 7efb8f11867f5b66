"""Temporal-difference targets and masked losses, as tiny elementwise functions."""

import jax.numpy as jnp

from wqmix_jax.types import Array


def td_target(reward: Array, discount: Array, gamma: Array, next_value: Array) -> Array:
    """y = r + gamma * discount * V(s'), the target of eq. 6 of the paper (arXiv 2006.10800).

    All arguments broadcast; ``discount`` is 0 where the task terminated and 1 elsewhere.
    """
    return reward + gamma * discount * next_value


def masked_mean_square(error: Array, mask: Array, weights: Array | None = None) -> Array:
    """sum(w * (error * mask)^2) / sum(mask), a scalar; ``weights`` default to 1 (eq. 8 of the paper)."""
    squares = jnp.square(error * mask)
    return (squares if weights is None else weights * squares).sum() / mask.sum()


def masked_mean(value: Array, mask: Array) -> Array:
    """The mean of ``value`` over the entries where ``mask`` is 1, a scalar."""
    return (value * mask).sum() / mask.sum()
