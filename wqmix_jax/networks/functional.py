"""flax modules as pure functions of a plain tree of parameters."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

from wqmix_jax.types import PRNGKey, PyTree

_compute_dtype = contextvars.ContextVar("compute_dtype", default="float32")


@contextlib.contextmanager
def compute_in(dtype: str) -> Iterator[None]:
    """Traces nets so that they multiply matrices of ``dtype``; parameters, sums and everything else stay float32.

    A context and not an argument: the precision is a choice of the run, and reaches every net of every algorithm, also
    those of users, without an argument in each ``init``, ``act`` and ``loss`` on the way.
    """
    token = _compute_dtype.set(dtype)
    try:
        yield
    finally:
        _compute_dtype.reset(token)


def init_net(net: nn.Module, key: PRNGKey, *inputs: Any) -> PyTree:
    """Draws the parameters of a net for inputs of these shapes; an empty tree for one without parameters."""
    return net.init(key, *inputs).get("params", {})


def apply_net(net: nn.Module, params: PyTree, *inputs: Any, method: str = "__call__") -> Any:
    """Applies the net, or another method of it, to its inputs; see `compute_in`."""
    # Matrices alone are narrowed: biases are vectors, and are added in float32.
    dtype = _compute_dtype.get()
    if dtype != "float32":
        params = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
    return net.apply({"params": params}, *inputs, method=method)
