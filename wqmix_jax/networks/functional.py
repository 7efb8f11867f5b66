"""flax modules as pure functions of a plain tree of parameters."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

from wqmix_jax.types import PRNGKey, PyTree

_compute_dtype = contextvars.ContextVar("compute_dtype", default="float32")
_steps_inline: contextvars.ContextVar[int | None] = contextvars.ContextVar("steps_inline", default=None)


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


@contextlib.contextmanager
def unroll_in_blocks(steps_inline: int | None) -> Iterator[None]:
    """Traces recurrent nets so that they are unrolled in blocks of steps, the form for accelerators.

    A context for the same reason as `compute_in`: the platform decides, and algorithms don't differ by it.

    Args:
        steps_inline: steps of a block that are compiled as straight-line code; None for an unroll step by step, the
            form for a CPU.
    """
    token = _steps_inline.set(steps_inline)
    try:
        yield
    finally:
        _steps_inline.reset(token)


def steps_inline() -> int | None:
    """Returns the value of the innermost `unroll_in_blocks`; None outside of one."""
    return _steps_inline.get()


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
