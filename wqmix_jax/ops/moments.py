"""A running mean and variance of numbers that come in batches (``RunningMeanStd`` of EPyMARL)."""

from typing import NamedTuple

import jax.numpy as jnp

from wqmix_jax.types import Array

PRIOR_COUNT = 1e-4
"""The number of values, of variance 1, that the moments start with."""


class Moments(NamedTuple):
    """The moments of all numbers so far, scalars.

    Attributes:
        num_values: how many there were, and `PRIOR_COUNT`.
        mean: their mean.
        variance: their variance (divided by their number).
    """

    num_values: Array
    mean: Array
    variance: Array

    @property
    def deviation(self) -> Array:
        """The standard deviation, at least what `PRIOR_COUNT` contributes, which float32 may lose: all may be equal."""
        return jnp.sqrt(jnp.maximum(self.variance, PRIOR_COUNT / self.num_values))


def no_moments() -> Moments:
    """Returns the moments at the start: mean 0, variance 1."""
    return Moments(jnp.float32(PRIOR_COUNT), jnp.float32(0), jnp.float32(1))


def add_moments(moments: Moments, batch: Moments) -> Moments:
    """Returns the moments of both sets of numbers together (Chan et al. 1979)."""
    num_values = moments.num_values + batch.num_values
    share, difference = batch.num_values / num_values, batch.mean - moments.mean
    return Moments(
        num_values=num_values,
        mean=moments.mean + difference * share,
        variance=moments.variance + share * (batch.variance - moments.variance + jnp.square(difference) * (1 - share)),
    )


def masked_moments(values: Array, mask: Array) -> Moments:
    """Returns the moments of the values where ``mask`` is 1, of the same shape; variance 0 if there are none."""
    count = mask.sum()
    mean = (values * mask).sum() / jnp.maximum(count, 1)
    return Moments(count, mean, (jnp.square(values - mean) * mask).sum() / jnp.maximum(count, 1))
