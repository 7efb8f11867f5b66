"""Short episodes one after another in a row as long as the longest may be, so that little of a batch is padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array


class Slots(NamedTuple):
    """Which step of which episode lies at each place of the rows, leaves ``[R, T+1]``.

    An episode takes a place more than it has steps, for what is seen after the last of them.

    Attributes:
        episode: int32, its index in the batch.
        step: int32, from 0 to the episode's length.
        filled: bool, whether anything lies there; the other two are 0 elsewhere.
    """

    episode: Array
    step: Array
    filled: Array


def pack(lengths: Array, episode_limit: int) -> tuple[Slots, Array]:
    """Puts the episodes of a batch into as few rows as first-fit decreasing finds.

    Args:
        lengths: ``[B]`` int32; an episode without a step is left out.
        episode_limit: ``T``, the most steps that one of them has.

    Returns:
        The slots, ``B`` rows of ``T+1``, the fullest first, and how many rows aren't empty, a scalar int32.
    """
    batch_size, capacity = len(lengths), episode_limit + 1
    sizes = jnp.where(lengths > 0, lengths + 1, 0)
    rows, offsets = _first_fit_decreasing(sizes, capacity)
    steps = jnp.arange(capacity)[None, :]
    places = (rows * capacity + offsets)[:, None] + steps
    nowhere = batch_size * capacity
    places = jnp.where(steps < sizes[:, None], places, nowhere)
    held = jnp.full(nowhere, -1, jnp.int32)
    held = held.at[places.reshape(-1)].set(jnp.arange(nowhere), mode="drop")
    held = held.reshape(batch_size, capacity)
    filled = held >= 0
    held = jnp.maximum(held, 0)
    return Slots(held // capacity, held % capacity, filled), filled.any(1).sum(dtype=jnp.int32)


def _first_fit_decreasing(sizes: Array, capacity: int) -> tuple[Array, Array]:
    """The row of each size and where it begins there, ``[B]`` int32: the largest first, each where it first fits.

    The rows are numbered by what they hold, the fullest first.
    """

    def put(free: Array, size: Array) -> tuple[Array, tuple[Array, Array]]:
        row = jnp.argmax(free >= size)
        return free.at[row].add(-size), (row, capacity - free[row])

    order = jnp.argsort(-sizes)
    free, placed = jax.lax.scan(put, jnp.full(len(sizes), capacity, sizes.dtype), sizes[order])
    row, offset = (jnp.zeros(len(sizes), jnp.int32).at[order].set(of.astype(jnp.int32)) for of in placed)
    return jnp.argsort(jnp.argsort(free)).astype(jnp.int32)[row], offset
