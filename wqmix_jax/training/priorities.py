"""Prioritised sampling of stored episodes (Schaul et al., arXiv 1511.05952), by episode as in PyMARL2.

The priorities of a seed are one small array, so that a sample is a cumulative sum and a search: a few kernels on an
accelerator, where a sum tree takes as many for each level.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Algorithm
from wqmix_jax.types import Array, PRNGKey


class Priorities(NamedTuple):
    """The priorities of the stored episodes.

    Attributes:
        powers: ``[buffer_size]``, each priority to the power of the exponent; 0 where no episode is stored.
        largest: scalar, the largest of them so far, which a new episode gets.
    """

    powers: Array
    largest: Array


class Draw(NamedTuple):
    """The episodes of one batch.

    Attributes:
        indices: ``[B]`` int32, their indices in the replay.
        importance: ``[B]``, their importance weights, divided by the largest.
    """

    indices: Array
    importance: Array


def is_prioritised(algo: Algorithm) -> bool:
    """Returns True if the algorithm's episodes are prioritised, see `TDLearner`."""
    return getattr(algo, "prioritised", False)


def no_priorities(buffer_size: int) -> Priorities:
    """Returns the priorities of an empty replay."""
    return Priorities(jnp.zeros(buffer_size), jnp.float32(1))


def add_episodes(priorities: Priorities, indices: Array, is_active: Array) -> Priorities:
    """Gives the episodes that were stored at ``indices`` ``[E]`` the largest priority, if ``is_active``, a scalar."""
    powers = priorities.powers.at[indices].set(priorities.largest)
    return priorities._replace(powers=jnp.where(is_active, powers, priorities.powers))


def draw_episodes(priorities: Priorities, key: PRNGKey, batch_size: int, beta: Array) -> Draw:
    """Draws episodes in proportion to their priorities' powers, one from each of ``batch_size`` equal shares.

    Args:
        priorities: at least one of them isn't 0.
        key: random key.
        batch_size: ``B``.
        beta: scalar, the exponent of the importance weights: 1 corrects for the priorities in full.
    """
    sums = jnp.cumsum(priorities.powers)
    shares = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
    indices = jnp.searchsorted(sums, shares * sums[-1], side="right")
    num_stored = (priorities.powers > 0).sum()
    indices = jnp.clip(indices, 0, jnp.maximum(num_stored - 1, 0)).astype(jnp.int32)  # rounding may reach past the last
    # Weights are relative: factors that all episodes share cancel out. Nothing is stored in an empty replay.
    powers = priorities.powers[indices]
    importance = jnp.where(powers > 0, powers, 1) ** -beta
    return Draw(indices, importance / importance.max())


def set_priorities(
    priorities: Priorities, indices: Array, errors: Array, lengths: Array, exponent: float
) -> Priorities:
    """Sets the priorities of a batch's episodes: sum |td_error| / sqrt(length), as in PyMARL2.

    Args:
        priorities: before the learner step.
        indices: ``[B]``, see `Draw`; equal ones have equal errors.
        errors: ``[B]``, the sums of the absolute TD errors of their steps.
        lengths: ``[B]`` int32.
        exponent: alpha, the power of the priorities.
    """
    # A small constant keeps every episode possible.
    powers = (errors / jnp.sqrt(jnp.maximum(lengths, 1)) + 1e-6) ** exponent
    return Priorities(priorities.powers.at[indices].set(powers), jnp.maximum(priorities.largest, powers.max()))
