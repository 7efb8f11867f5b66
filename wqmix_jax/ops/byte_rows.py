"""Trees of arrays as flat rows of bytes, in which everything about a step or an episode is one contiguous array."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array, PyTree


def row_bytes(template: PyTree) -> int:
    """Returns the length of the rows of trees with the template's shapes and dtypes."""
    return sum(map(_num_bytes, jax.tree.leaves(template)))


def to_row(tree: PyTree) -> Array:
    """Returns the bytes of all leaves, one after another: ``[row_bytes]`` uint8."""

    def as_bytes(leaf: Array) -> Array:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        return jax.lax.bitcast_convert_type(leaf, jnp.uint8).reshape(-1)

    return jnp.concatenate([as_bytes(leaf) for leaf in jax.tree.leaves(tree)])


def from_row(row: Array, template: PyTree) -> PyTree:
    """Inverts `to_row`: ``[row_bytes]`` uint8 -> a tree of the template's shapes and dtypes."""
    # The offsets are static, so this is slices and bitcasts, which the compiler fuses into whatever reads the leaves.
    # A bitcast from bytes takes them from a trailing axis as long as the dtype is wide; uint8 and bool have none, and
    # a bool, whose byte is 0 or 1, can't be bitcast at all.
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        flat = row[start : start + _num_bytes(leaf)]
        start += _num_bytes(leaf)
        if leaf.dtype == jnp.bool_:
            leaves.append(flat.reshape(leaf.shape).astype(jnp.bool_))
            continue
        width = () if leaf.dtype.itemsize == 1 else (leaf.dtype.itemsize,)
        leaves.append(jax.lax.bitcast_convert_type(flat.reshape(leaf.shape + width), leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _num_bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
