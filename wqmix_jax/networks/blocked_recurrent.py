"""The encoded gated recurrent unit for accelerators: several nets unrolled together, time in blocks.

A GPU or TPU is bound by the number of kernels in sequence and by memory, not by arithmetic. So the loop over time holds
the one product that depends on the previous step, for all nets together; everything else is a large product over a
block of steps outside of it. `wqmix_jax.networks.recurrent.encoded_unroll` computes the same for a CPU.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import LinearWeights
from wqmix_jax.networks.recurrent import GRUWeights
from wqmix_jax.types import Array, PyTree

MAX_BLOCK = 32
"""The most time steps of a block. A block's intermediate arrays exist at a time, and each block costs kernels of its
own; padding and the granularity of `num_places` are less than a block."""


class UnrollPlan(NamedTuple):
    """The static choices of an unroll.

    Attributes:
        num_trained: how many of the nets, the first ones, have gradients.
        block: time steps of a block.
        unroll: steps of the inner loop's body that are compiled as straight-line code.
    """

    num_trained: int
    block: int
    unroll: int


class StackedWeights(NamedTuple):
    """The weights of ``G`` nets of equal shapes, leaves ``[G, ..]``."""

    encoder: LinearWeights
    gru: GRUWeights


class _Block(NamedTuple):
    """The intermediate values of a block of ``K`` steps that don't depend on hidden states.

    Attributes:
        encoded: ``[G, K, R, F]``, the unit's inputs.
        from_inputs: ``[G, K, R, 3H]``, their part of the gates.
    """

    encoded: Array
    from_inputs: Array


class _Gates(NamedTuple):
    """The gates of any number of steps, ``[.., H]``; ``hidden_new`` is the hidden state's term in the new gate."""

    reset: Array
    update: Array
    new: Array
    hidden_new: Array


class _Residuals(NamedTuple):
    """The inputs of the backward pass: the arguments of `blocked_unroll`, and what the forward pass stores.

    Attributes:
        hiddens: ``[num_trained, K * blocks, R, H]``, of the trained nets.
        first: ``[blocks, num_trained, R, H]``, their hidden states before each block.
    """

    weights: StackedWeights
    carry: Array
    inputs: Array
    starts: Array | None
    num_places: Array | None
    hiddens: Array
    first: Array


def stack(encoders: Sequence[LinearWeights], units: Sequence[GRUWeights]) -> StackedWeights:
    """Stacks the weights of nets of equal shapes."""
    stacked: Any = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (encoders, units)]
    return StackedWeights(*stacked)


def block_length(num_steps: int) -> int:
    """Returns the steps of a block, at most `MAX_BLOCK`, such that the last block has the least padding."""
    return math.ceil(num_steps / math.ceil(num_steps / MAX_BLOCK))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_unroll(
    plan: UnrollPlan,
    weights: StackedWeights,
    carry: Array,
    inputs: Array,
    starts: Array | None = None,
    num_places: Array | None = None,
) -> Array:
    """Returns all hidden states of a sequence under several nets; see `encoded_unroll`.

    Args:
        plan: static choices.
        weights: of ``G`` nets; those after the first ``plan.num_trained`` get no gradient.
        carry: ``[R, H]``, the hidden state of each net before the first step.
        inputs: ``[T, R, I]``, common to all nets.
        starts: ``[T, R]`` bool, where the hidden state before the step is ``carry`` again; None for nowhere.
        num_places: scalar int32, the number of steps that are taken, up to the end of a block; None for all. The hidden
            states of the others are zero and have no gradient.

    Returns:
        ``[G, T, R, H]``.
    """
    return _forward(plan, weights, carry, inputs, starts, num_places)[0]


def _forward(
    plan: UnrollPlan,
    weights: StackedWeights,
    carry: Array,
    inputs: Array,
    starts: Array | None,
    num_places: Array | None,
) -> tuple[Array, _Residuals]:
    # Two loops. The outer one, over blocks, has a dynamic length, so that one program runs batches of all lengths. The
    # inner one has a static length, and its body is one product [G, R, H] x [G, H, 3H] and one elementwise kernel. Nets
    # come first in a block's arrays, [G, K, R, ..]: a product's rows, K * R, are contiguous then, which a TPU's compiler
    # turns into a third of the code.
    num_steps, kernel, bias = len(inputs), weights.gru.hidden_kernel, weights.gru.hidden_bias
    num_nets, num_blocks = len(kernel), -(-num_steps // plan.block)
    padded, restarts = _padded(plan, inputs), _padded(plan, starts)
    begin = jnp.broadcast_to(carry[None], (num_nets, *carry.shape))

    def step(hidden: Array, at: tuple[Array, Array | None]) -> tuple[Array, Array]:
        from_inputs, start = at
        hidden = _restarted(hidden, begin, start)
        gates = _gates(from_inputs, _product("grh,ghm->grm", hidden, kernel) + bias[:, None, :])
        hidden = (1 - gates.update) * gates.new + gates.update * hidden
        return hidden, hidden

    def add_block(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        hidden, hiddens, first = state
        from_inputs = _before_gates(weights, _at_block(plan, padded, index)).from_inputs
        start = _at_block(plan, restarts, index)
        first = jax.lax.dynamic_update_index_in_dim(first, hidden[: plan.num_trained], index, 0)
        hidden, outs = jax.lax.scan(step, hidden, (from_inputs.swapaxes(0, 1), start), unroll=plan.unroll)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * plan.block, axis=1)
        return hidden, put(hiddens, outs.swapaxes(0, 1)), first

    hiddens = jnp.zeros((num_nets, num_blocks * plan.block, *carry.shape), carry.dtype)
    first = jnp.zeros((num_blocks, plan.num_trained, *carry.shape), carry.dtype)
    used = _used_blocks(plan, num_blocks, num_places)
    _, hiddens, first = jax.lax.fori_loop(0, used, add_block, (begin, hiddens, first))
    residuals = _Residuals(weights, carry, inputs, starts, num_places, hiddens[: plan.num_trained], first)
    return jnp.where(_is_place(num_steps, num_places), hiddens[:, :num_steps], 0), residuals


def _backward(plan: UnrollPlan, residuals: _Residuals, d_hiddens: Array) -> tuple[PyTree, Array, Array, None, None]:
    """Backpropagates through time: ``[G, T, R, H]`` -> the gradients of all differentiable arguments.

    Nothing but hidden states was stored: the gates are recomputed from them, as products over a block of steps. Given
    the gates, the gradient with respect to a hidden state, ``d`` ``[G, R, H]``, depends linearly on that of the next
    one: the inner loop scales it by factors computed beforehand and multiplies it with the kernel. The products that
    make the weights' gradients of it follow after the loop.
    """
    weights, carry, inputs, starts, num_places, hiddens, first = residuals
    num_nets, num_steps, num_blocks = len(weights.gru.hidden_kernel), len(inputs), len(first)
    weights = jax.tree.map(lambda leaf: leaf[: plan.num_trained], weights)
    encoder, gru = weights
    narrow = gru.hidden_kernel.dtype  # that of matrix products: bfloat16 with `compute_in("bfloat16")`
    padded, restarts = _padded(plan, inputs), _padded(plan, starts)
    d_hiddens = jnp.where(_is_place(num_steps, num_places), d_hiddens, 0)[: plan.num_trained]
    d_hiddens = _padded(plan, d_hiddens, axis=1)
    begin = jnp.broadcast_to(carry[None], first.shape[1:])
    used = _used_blocks(plan, num_blocks, num_places)

    def step(d_before: Array, at: Any) -> tuple[Array, Array]:
        d_hidden, factors, update, start = at
        d_hidden = d_before + d_hidden
        d_from_hidden = jnp.tile(d_hidden, 3) * factors
        d_before = d_hidden * update + _product("grm,ghm->grh", d_from_hidden, gru.hidden_kernel)
        return _restarted(d_before, jnp.zeros_like(d_before), start), d_hidden

    def add_block(count: Array, state: tuple[Array, Array, PyTree, Array]) -> tuple[Array, Array, PyTree, Array]:
        d_before, d_carry, d_weights, d_inputs = state
        index = used - 1 - count
        x, start = _at_block(plan, padded, index), _at_block(plan, restarts, index)
        after, d_after = (_at_block(plan, leaf, index, axis=1) for leaf in (hiddens, d_hiddens))
        before = jnp.concatenate([first[index][:, None], after[:, :-1]], axis=1)
        before = _restarted(before, begin[:, None], start)
        block = _before_gates(weights, x)
        gates = _gates(
            block.from_inputs, _product("gkrh,ghm->gkrm", before, gru.hidden_kernel) + _bias(gru.hidden_bias)
        )
        # From h = (1 - update) new + update before and new = tanh(.. + reset hidden_new), with sigmoid' = s (1 - s):
        # the derivatives of h with respect to the gates before their nonlinearities.
        to_new = (1 - gates.update) * (1 - gates.new * gates.new)
        to_update = (before - gates.new) * gates.update * (1 - gates.update)
        to_reset = to_new * gates.hidden_new * gates.reset * (1 - gates.reset)
        factors = jnp.concatenate([to_reset, to_update, to_new * gates.reset], axis=-1)
        xs = d_after.swapaxes(0, 1), factors.swapaxes(0, 1), gates.update.swapaxes(0, 1), start
        d_before, d_hidden = jax.lax.scan(step, d_before, xs, reverse=True, unroll=plan.unroll)
        d_hidden = d_hidden.swapaxes(0, 1)
        d_from_hidden = jnp.tile(d_hidden, 3) * factors
        d_from_inputs = jnp.tile(d_hidden, 3) * jnp.concatenate([to_reset, to_update, to_new], axis=-1)
        d_encoded = _product("gkrm,gfm->gkrf", d_from_inputs, gru.input_kernel)
        d_encoded = jnp.where(block.encoded > 0, d_encoded, 0)
        if start is not None:  # the gradient that `step` cuts off is with respect to ``carry``
            d_start = d_hidden * gates.update + _product("gkrm,ghm->gkrh", d_from_hidden, gru.hidden_kernel)
            d_carry += jnp.where(start[None, :, :, None], d_start, 0).sum((0, 1))
        d_block = StackedWeights(
            LinearWeights(_product("kri,gkrf->gif", x, d_encoded.astype(narrow)), d_encoded.sum((1, 2))),
            GRUWeights(
                _product("gkrf,gkrm->gfm", block.encoded, d_from_inputs.astype(narrow)),
                _product("gkrh,gkrm->ghm", before, d_from_hidden.astype(narrow)),
                d_from_inputs.sum((1, 2)),
                d_from_hidden.sum((1, 2)),
            ),
        )
        # Inputs are data as a rule: then nothing reads this, and the compiler removes it.
        d_x = _product("gkrf,gif->kri", d_encoded, encoder.kernel)
        d_inputs = jax.lax.dynamic_update_slice_in_dim(d_inputs, d_x, index * plan.block, 0)
        return d_before, d_carry, jax.tree.map(jnp.add, d_weights, d_block), d_inputs

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, carry.dtype), weights)
    state = jnp.zeros_like(begin), jnp.zeros_like(carry), zeros, jnp.zeros_like(padded)
    d_before, d_carry, d_weights, d_inputs = jax.lax.fori_loop(0, used, add_block, state)

    def with_frozen(grad: Array, leaf: Array) -> Array:
        return jnp.pad(grad, [(0, num_nets - plan.num_trained)] + [(0, 0)] * (grad.ndim - 1)).astype(leaf.dtype)

    d_weights = jax.tree.map(with_frozen, d_weights, weights)
    return d_weights, d_carry + d_before.sum(0), d_inputs[:num_steps], None, None


blocked_unroll.defvjp(_forward, _backward)


def _product(subscripts: str, inputs: Array, kernel: Array) -> Array:
    """Returns the einsum in the kernel's dtype, summed and returned in that of the inputs; see `linear.product`."""
    return jnp.einsum(subscripts, inputs.astype(kernel.dtype), kernel, preferred_element_type=inputs.dtype)


def _before_gates(weights: StackedWeights, inputs: Array) -> _Block:
    """Encodes a block's inputs ``[K, R, I]``, and takes the unit's product with them."""
    encoder, gru = weights
    encoded = nn.relu(_product("kri,gif->gkrf", inputs, encoder.kernel) + _bias(encoder.bias))
    return _Block(encoded, _product("gkrf,gfm->gkrm", encoded, gru.input_kernel) + _bias(gru.input_bias))


def _bias(bias: Array) -> Array:
    return bias[:, None, None, :]


def _gates(from_inputs: Array, from_hidden: Array) -> _Gates:
    input_reset, input_update, input_new = jnp.split(from_inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(from_hidden, 3, axis=-1)
    reset = nn.sigmoid(input_reset + hidden_reset)
    update = nn.sigmoid(input_update + hidden_update)
    return _Gates(reset, update, jnp.tanh(input_new + reset * hidden_new), hidden_new)


def _restarted(values: Array, carry: Array, start: Array | None) -> Array:
    """Returns ``carry`` where the rows ``start``, ``[.., R]``, and ``values`` elsewhere, both ``[G, .., R, H]``."""
    return values if start is None else jnp.where(start[None, ..., None], carry, values)


def _padded(plan: UnrollPlan, leaf: Array | None, axis: int = 0) -> Any:
    """Pads time to whole blocks with zeros."""
    if leaf is None:
        return None
    widths = [(0, -size % plan.block if place == axis else 0) for place, size in enumerate(leaf.shape)]
    return jnp.pad(leaf, widths)


def _at_block(plan: UnrollPlan, leaf: Array | None, index: Array, axis: int = 0) -> Any:
    return None if leaf is None else jax.lax.dynamic_slice_in_dim(leaf, index * plan.block, plan.block, axis)


def _used_blocks(plan: UnrollPlan, num_blocks: int, num_places: Array | None) -> Array | int:
    return num_blocks if num_places is None else (num_places + plan.block - 1) // plan.block


def _is_place(num_steps: int, num_places: Array | None) -> Array:
    """Returns True for steps that are taken, ``[1, T, 1, 1]``."""
    return (jnp.arange(num_steps) < (num_steps if num_places is None else num_places)).reshape(1, -1, 1, 1)
