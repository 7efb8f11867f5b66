"""Puts short episodes one after another into rows of the longest length, so that little of a batch is padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array


class RowLayout(NamedTuple):
    """The step of the episode that is at each place of the rows, leaves ``[R, T+1]``.

    An episode takes one place more than it has steps, for the observation after its last step.

    Attributes:
        episode: int32, its index in the batch.
        step: int32, from 0 to the episode's length.
        filled: bool, whether the place holds a step; the other two are 0 elsewhere.
    """

    episode: Array
    step: Array
    filled: Array


def first_fit_rows(lengths: Array, episode_limit: int) -> tuple[RowLayout, Array]:
    """Puts the episodes of a batch into as few rows as first-fit decreasing finds.

    Args:
        lengths: ``[B]`` int32; an episode without a step is left out.
        episode_limit: ``T``, the most steps of an episode.

    Returns:
        The layout of ``B`` rows of ``T+1`` places, the fullest first, and how many rows aren't empty, a scalar int32.
    """
    batch_size, capacity = len(lengths), episode_limit + 1
    sizes = jnp.where(lengths > 0, lengths + 1, 0)
    rows, offsets = _first_fit_decreasing(sizes, capacity)
    # Each episode writes ``episode * capacity + step`` to its places, where all rows form one line of B * (T+1) places.
    # Steps past its end go to a place outside, and are dropped.
    steps = jnp.arange(capacity)[None, :]
    places = (rows * capacity + offsets)[:, None] + steps
    outside = batch_size * capacity
    places = jnp.where(steps < sizes[:, None], places, outside)
    held = jnp.full(outside, -1, jnp.int32)
    held = held.at[places.reshape(-1)].set(jnp.arange(outside), mode="drop")
    held = held.reshape(batch_size, capacity)
    filled = held >= 0
    held = jnp.maximum(held, 0)
    return RowLayout(held // capacity, held % capacity, filled), filled.any(1).sum(dtype=jnp.int32)


def _first_fit_decreasing(sizes: Array, capacity: int) -> tuple[Array, Array]:
    """Returns each size's row and where it begins there, ``[B]`` int32: the largest first, each where it first fits.

    The rows are numbered by how much they hold, the fullest first.
    """

    def put(free: Array, size: Array) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.argmax(free >= size)
        return free.at[row].add(-size), (row, capacity - free[row])

    order = jnp.argsort(-sizes)
    free, placed = jax.lax.scan(put, jnp.full(len(sizes), capacity, sizes.dtype), sizes[order])
    row, offset = (jnp.zeros(len(sizes), jnp.int32).at[order].set(leaf.astype(jnp.int32)) for leaf in placed)
    return jnp.argsort(jnp.argsort(free)).astype(jnp.int32)[row], offset
