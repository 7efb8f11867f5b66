"""flax modules as pure functions of a plain tree of parameters."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from wqmix_jax.types import PRNGKey, PyTree

_compute_dtype = contextvars.ContextVar("compute_dtype", default="float32")
_blocks: contextvars.ContextVar["BlockForm | None"] = contextvars.ContextVar("blocks", default=None)


class BlockForm(NamedTuple):
    """The form of the recurrent part for accelerators.

    Attributes:
        max_steps: the most time steps of a block. A block's intermediate arrays exist at a time, and each block costs
            kernels in addition to those of its steps.
        steps_inline: steps of a block that are compiled as straight-line code. A GPU saves the kernels that a loop
            spends on its counter and its slices; a TPU, for which these are cheap, saves code.
        recomputes: whether the backward pass recomputes hidden states block by block, and hidden layers of mixers net
            by net, so that those of one block and one net exist at a time.
    """

    max_steps: int
    steps_inline: int
    recomputes: bool = False

    def block_length(self, num_steps: int) -> int:
        """Returns the steps of a block such that the last block has the least padding."""
        return math.ceil(num_steps / math.ceil(num_steps / self.max_steps))


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
def unroll_in_blocks(form: BlockForm | None) -> Iterator[None]:
    """Traces recurrent nets so that they are unrolled in blocks of steps; step by step, the form for a CPU, if None.

    A context for the same reason as `compute_in`: the platform decides, and algorithms don't differ by it.
    """
    token = _blocks.set(form)
    try:
        yield
    finally:
        _blocks.reset(token)


def block_form() -> BlockForm | None:
    """Returns the value of the innermost `unroll_in_blocks`; None outside of one."""
    return _blocks.get()


def init_net(net: nn.Module, key: PRNGKey, *inputs: Any) -> PyTree:
    """Draws the parameters of a net for inputs of these shapes; an empty tree for one without parameters."""
    return net.init(key, *inputs).get("params", {})


def apply_net(net: nn.Module, params: PyTree, *inputs: Any, method: str = "__call__") -> Any:
    """Applies the net, or another method of it, to its inputs; see `compute_in`."""
    # Matrices alone are narrowed: biases are vectors, and are added in float32.
    dtype = _compute_dtype.get()
    if dtype != "float32":
        params = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
    apply = functools.partial(net.apply, method=method)
    form = block_form()
    if form is not None and form.recomputes and method == "__call__":
        apply = jax.checkpoint(apply)
    return apply({"params": params}, *inputs)
