"""The encoded gated recurrent unit for accelerators: several nets unrolled together, time in blocks.

A GPU or TPU is bound by the number of kernels in sequence and by memory, not by arithmetic. So the loop over time holds
the one product that depends on the previous step, for all nets together; everything else is a large product over a
block of steps outside of it. `wqmix_jax.networks.recurrent.encoded_unroll` computes the same for a CPU.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import LinearWeights
from wqmix_jax.networks.recurrent import GRUWeights
from wqmix_jax.types import Array, PyTree


class UnrollPlan(NamedTuple):
    """The static choices of an unroll.

    Attributes:
        num_trained: how many of the nets, the first ones, have gradients.
        block: time steps of a block.
        unroll: steps of the inner loop's body that are compiled as straight-line code.
        features: maps a block's ``(sources, last_action)`` to the nets' inputs ``[K, .., N, I]``, see `Sequence`.
        keeps_hiddens: whether hidden states are returned; otherwise those of nets without gradients are never stored.
        recomputes: whether the backward pass recomputes the hidden states of a block from those before it. Otherwise
            they are stored, ``[num_trained, T, R, H]``, and the loop over time runs once less.
    """

    num_trained: int
    block: int
    unroll: int
    features: Callable[[PyTree, Array], Array]
    keeps_hiddens: bool
    recomputes: bool


class AgentWeights(NamedTuple):
    """The weights of an agent network, layer by layer; those of ``G`` networks are stacked, leaves ``[G, ..]``."""

    encoder: LinearWeights
    gru: GRUWeights
    head: LinearWeights


class Sequence(NamedTuple):
    """The inputs of all nets, padded to whole blocks by `padded_sequence`: ``T`` is a multiple of the block's length.

    Attributes:
        sources: leaves ``[T, ..]``, which the nets' inputs are made of in addition to ``last_action``; floating ones
            have a gradient.
        last_action: ``[T, .., N]`` int.
        starts: ``[T, R]`` bool, where the hidden state before the step is the first one again; None for nowhere.
        num_places: scalar int32, the number of steps that are taken, up to the end of a block; None for all.
    """

    sources: PyTree
    last_action: Array
    starts: Array | None
    num_places: Array | None


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
        hiddens: ``[num_trained, T, R, H]``, of the trained nets; None if they are recomputed.
        first: ``[blocks, num_trained, R, H]``, their hidden states before each block.
    """

    weights: AgentWeights
    carry: Array
    sequence: Sequence
    hiddens: Array | None
    first: Array


def padded_sequence(
    plan: UnrollPlan, sources: PyTree, last_action: Array, starts: Array | None, num_places: Array | None
) -> Sequence:
    """Pads time to whole blocks with zeros."""

    def padded(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, -len(leaf) % plan.block)] + [(0, 0)] * (leaf.ndim - 1))

    sources, last_action, starts = jax.tree.map(padded, (sources, last_action, starts))
    return Sequence(sources, last_action, starts, num_places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_unroll(
    plan: UnrollPlan, weights: AgentWeights, carry: Array, sequence: Sequence
) -> tuple[Array, Array | None]:
    """Unrolls a sequence under several nets; see `wqmix_jax.networks.recurrent.encoded_unroll`.

    Args:
        plan: static choices.
        weights: of ``G`` nets; those after the first ``plan.num_trained`` get no gradient.
        carry: ``[R, H]``, the hidden state of each net before the first step, with ``R`` rows: all axes of an
            observation between the first and the last.
        sequence: common to all nets.

    Returns:
        The outputs of the heads, ``[G, T, R, A]``, and, if kept, the hidden states ``[G, T, R, H]``. In blocks after
        ``sequence.num_places`` they are zero and have no gradient; after it within a block they have no meaning.
    """
    return _forward(plan, weights, carry, sequence)[0]


def _forward(
    plan: UnrollPlan, weights: AgentWeights, carry: Array, sequence: Sequence
) -> tuple[tuple[Array, Array | None], _Residuals]:
    # Two loops. The outer one, over blocks, has a dynamic length, so that one program runs batches of all lengths. The
    # inner one has a static length, and its body is one product [G, R, H] x [G, H, 3H] and one elementwise kernel. Nets
    # come first in a block's arrays, [G, K, R, ..]: then a product's rows, K * R, are contiguous, which makes a third
    # of the code on a TPU.
    num_nets, num_steps = len(weights.gru.hidden_kernel), len(sequence.last_action)
    num_kept = num_nets if plan.keeps_hiddens else 0 if plan.recomputes else plan.num_trained
    begin = jnp.broadcast_to(carry[None], (num_nets, *carry.shape))

    def add_block(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        hidden, outputs, hiddens, first = state
        first = jax.lax.dynamic_update_index_in_dim(first, hidden[: plan.num_trained], index, 0)
        inputs, start = _inputs(plan, sequence, index)
        from_inputs = _before_gates(weights, inputs).from_inputs
        hidden, after = _steps(plan, weights.gru, begin, hidden, from_inputs, start)
        heads = _product("gkrh,gha->gkra", after, weights.head.kernel) + _bias(weights.head.bias)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * plan.block, axis=1)
        return hidden, put(outputs, heads), put(hiddens, after[:num_kept]), first

    rows, hidden_dim = carry.shape
    outputs = jnp.zeros((num_nets, num_steps, rows, weights.head.bias.shape[-1]), carry.dtype)
    hiddens = jnp.zeros((num_kept, num_steps, rows, hidden_dim), carry.dtype)
    first = jnp.zeros((num_steps // plan.block, plan.num_trained, rows, hidden_dim), carry.dtype)
    state = begin, outputs, hiddens, first
    with _loop_scope(plan, sequence):
        _, outputs, hiddens, first = jax.lax.fori_loop(0, _used_blocks(plan, sequence), add_block, state)
    stored = None if plan.recomputes else hiddens[: plan.num_trained]
    residuals = _Residuals(weights, carry, sequence, stored, first)
    return (outputs, hiddens if plan.keeps_hiddens else None), residuals


class _Gradients(NamedTuple):
    """The sums over the blocks so far, from the last to the first.

    Attributes:
        before: ``[num_trained, R, H]``, with respect to the hidden states before the block.
        carry: ``[R, H]``.
        weights: of the trained nets.
        sources: those of `Sequence.sources`; None for leaves that have no gradient.
    """

    before: Array
    carry: Array
    weights: AgentWeights
    sources: PyTree


def _backward(
    plan: UnrollPlan, residuals: _Residuals, d_results: tuple[Array, Array | None]
) -> tuple[AgentWeights, Array, Sequence]:
    """Backpropagates through time: the gradients of `blocked_unroll`'s results -> those of its arguments."""
    every, carry, sequence, _, first = residuals
    weights, d_results = jax.tree.map(lambda leaf: leaf[: plan.num_trained], (every, d_results))
    used = _used_blocks(plan, sequence)

    def add_block(count: Array, so_far: _Gradients) -> _Gradients:
        return _add_block(plan, weights, residuals, d_results, used - 1 - count, so_far)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, carry.dtype), weights)
    d_sources = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if _is_float(leaf) else None, sequence.sources)
    so_far = _Gradients(jnp.zeros(first.shape[1:], carry.dtype), jnp.zeros_like(carry), zeros, d_sources)
    with _loop_scope(plan, sequence):
        grads = jax.lax.fori_loop(0, used, add_block, so_far)

    def with_frozen(grad: Array, leaf: Array) -> Array:
        return jnp.pad(grad, [(0, len(leaf) - len(grad))] + [(0, 0)] * (grad.ndim - 1)).astype(leaf.dtype)

    d_sequence = Sequence(grads.sources, None, None, None)  # type: ignore[arg-type]
    return jax.tree.map(with_frozen, grads.weights, every), grads.carry + grads.before.sum(0), d_sequence


def _add_block(
    plan: UnrollPlan,
    weights: AgentWeights,
    residuals: _Residuals,
    d_results: tuple[Array, Array | None],
    index: Array,
    so_far: _Gradients,
) -> _Gradients:
    """Adds the gradients of one block, given those with respect to the hidden states after it.

    At most hidden states were stored: the gates are recomputed from them, as products over a block of steps. The
    products that make the weights' gradients follow after the loop over the steps.

    Args:
        plan: static choices.
        weights: of the trained nets.
        residuals: see `_Residuals`.
        d_results: the gradients with respect to the trained nets' results, ``[num_trained, T, R, ..]``.
        index: the number of the block.
        so_far: the sums over the blocks after it.
    """
    (encoder, gru, head), carry, sequence = weights, residuals.carry, residuals.sequence
    inputs, start = _inputs(plan, sequence, index)
    block, d_head = _before_gates(weights, inputs), _at_block(plan, d_results[0], index, axis=1)
    begin, first = jnp.broadcast_to(carry[None], so_far.before.shape), residuals.first[index]
    if residuals.hiddens is None:
        after = _steps(plan, gru, begin, first, block.from_inputs, start)[1]
    else:
        after = _at_block(plan, residuals.hiddens, index, axis=1)
    before = _restarted(jnp.concatenate([first[:, None], after[:, :-1]], axis=1), begin[:, None], start)
    from_hidden = _product("gkrh,ghm->gkrm", before, gru.hidden_kernel) + _bias(gru.hidden_bias)
    gates = _gates(block.from_inputs, from_hidden)
    input_factors, hidden_factors = _factors(gates, before)
    d_after = _product("gkra,gha->gkrh", d_head, head.kernel)
    if d_results[1] is not None:
        d_after += _at_block(plan, d_results[1], index, axis=1)
    d_before, d_hidden = _steps_back(plan, gru, so_far.before, d_after, hidden_factors, gates.update, start)
    d_from_inputs, d_from_hidden = (jnp.tile(d_hidden, 3) * each for each in (input_factors, hidden_factors))
    d_encoded = jnp.where(block.encoded > 0, _product("gkrm,gfm->gkrf", d_from_inputs, gru.input_kernel), 0)
    d_carry = so_far.carry
    if start is not None:  # the gradient that `_steps_back` cuts off is with respect to ``carry``
        d_start = d_hidden * gates.update + _product("gkrm,ghm->gkrh", d_from_hidden, gru.hidden_kernel)
        d_carry += jnp.where(start[None, :, :, None], d_start, 0).sum((0, 1))
    narrow = gru.hidden_kernel.dtype  # that of matrix products: bfloat16 with `compute_in("bfloat16")`
    d_weights = AgentWeights(
        LinearWeights(_product("kri,gkrf->gif", inputs, d_encoded.astype(narrow)), d_encoded.sum((1, 2))),
        GRUWeights(
            _product("gkrf,gkrm->gfm", block.encoded, d_from_inputs.astype(narrow)),
            _product("gkrh,gkrm->ghm", before, d_from_hidden.astype(narrow)),
            d_from_inputs.sum((1, 2)),
            d_from_hidden.sum((1, 2)),
        ),
        LinearWeights(_product("gkrh,gkra->gha", after, d_head.astype(narrow)), d_head.sum((1, 2))),
    )
    # Sources are data as a rule: then nothing reads their gradient, and the compiler removes it.
    d_block = _sources_gradient(plan, sequence, index, _product("gkrf,gif->kri", d_encoded, encoder.kernel))
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * plan.block, axis=0)
    d_sources = jax.tree.map(put, so_far.sources, d_block)
    return _Gradients(d_before, d_carry, jax.tree.map(jnp.add, so_far.weights, d_weights), d_sources)


def _steps_back(
    plan: UnrollPlan,
    gru: GRUWeights,
    d_before: Array,
    d_after: Array,
    hidden_factors: Array,
    update: Array,
    starts: Array | None,
) -> tuple[Array, Array]:
    """Takes the steps of a block from the last to the first.

    Given the gates, the gradient with respect to a hidden state, ``[G, R, H]``, depends linearly on that of the next
    one: a step scales it by factors computed beforehand and multiplies it with the kernel.

    Args:
        plan: static choices.
        gru: of ``G`` nets.
        d_before: ``[G, R, H]``, the gradient with respect to the hidden states after the block, by the steps after it.
        d_after: ``[G, K, R, H]``, that with respect to the hidden states after each step, by the results.
        hidden_factors: ``[G, K, R, 3H]``, see `_factors`.
        update: ``[G, K, R, H]``, the update gates.
        starts: ``[K, R]``, or None.

    Returns:
        The gradient with respect to the hidden states before the block, and those with respect to the hidden states
        after each step ``[G, K, R, H]``.
    """

    def step(d_before: Array, at: Any) -> tuple[Array, Array]:
        d_hidden, factors, update, start = at
        d_hidden = d_before + d_hidden
        d_from_hidden = jnp.tile(d_hidden, 3) * factors
        d_before = d_hidden * update + _product("grm,ghm->grh", d_from_hidden, gru.hidden_kernel)
        return _restarted(d_before, jnp.zeros_like(d_before), start), d_hidden

    xs = d_after.swapaxes(0, 1), hidden_factors.swapaxes(0, 1), update.swapaxes(0, 1), starts
    d_before, d_hidden = jax.lax.scan(step, d_before, xs, reverse=True, unroll=plan.unroll)
    return d_before, d_hidden.swapaxes(0, 1)


blocked_unroll.defvjp(_forward, _backward)


def _product(subscripts: str, inputs: Array, kernel: Array) -> Array:
    """Returns the einsum in the kernel's dtype, summed and returned in that of the inputs; see `linear.product`."""
    return jnp.einsum(subscripts, inputs.astype(kernel.dtype), kernel, preferred_element_type=inputs.dtype)


def _before_gates(weights: AgentWeights, inputs: Array) -> _Block:
    """Encodes a block's inputs ``[K, R, I]``, and takes the unit's product with them."""
    encoder, gru, _ = weights
    encoded = nn.relu(_product("kri,gif->gkrf", inputs, encoder.kernel) + _bias(encoder.bias))
    return _Block(encoded, _product("gkrf,gfm->gkrm", encoded, gru.input_kernel) + _bias(gru.input_bias))


def _bias(bias: Array) -> Array:
    return bias[:, None, None, :]


def _factors(gates: _Gates, before: Array) -> tuple[Array, Array]:
    """Returns the derivatives of the hidden state with respect to the inputs' and the hidden state's part of the gates.

    From h = (1 - update) new + update before and new = tanh(.. + reset hidden_new), with sigmoid' = s (1 - s); both
    ``[.., 3H]``, and they differ in the new gate alone, where the reset gate scales the hidden state's term.
    """
    to_new = (1 - gates.update) * (1 - gates.new * gates.new)
    to_update = (before - gates.new) * gates.update * (1 - gates.update)
    to_reset = to_new * gates.hidden_new * gates.reset * (1 - gates.reset)
    common = [to_reset, to_update]
    return jnp.concatenate([*common, to_new], axis=-1), jnp.concatenate([*common, to_new * gates.reset], axis=-1)


def _steps(
    plan: UnrollPlan, gru: GRUWeights, begin: Array, hidden: Array, from_inputs: Array, starts: Array | None
) -> tuple[Array, Array]:
    """Takes the steps of a block.

    Args:
        plan: static choices.
        gru: of ``G`` nets.
        begin: ``[G, R, H]``, the hidden states where rows start.
        hidden: ``[G, R, H]``, those before the block.
        from_inputs: ``[G, K, R, 3H]``.
        starts: ``[K, R]``, or None.

    Returns:
        The hidden states after the block, and those after each step ``[G, K, R, H]``.
    """

    def step(hidden: Array, at: tuple[Array, Array | None]) -> tuple[Array, Array]:
        from_inputs, start = at
        hidden = _restarted(hidden, begin, start)
        from_hidden = _product("grh,ghm->grm", hidden, gru.hidden_kernel) + gru.hidden_bias[:, None, :]
        gates = _gates(from_inputs, from_hidden)
        hidden = (1 - gates.update) * gates.new + gates.update * hidden
        return hidden, hidden

    hidden, after = jax.lax.scan(step, hidden, (from_inputs.swapaxes(0, 1), starts), unroll=plan.unroll)
    return hidden, after.swapaxes(0, 1)


def _gates(from_inputs: Array, from_hidden: Array) -> _Gates:
    input_reset, input_update, input_new = jnp.split(from_inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(from_hidden, 3, axis=-1)
    reset = nn.sigmoid(input_reset + hidden_reset)
    update = nn.sigmoid(input_update + hidden_update)
    return _Gates(reset, update, jnp.tanh(input_new + reset * hidden_new), hidden_new)


def _restarted(values: Array, carry: Array, start: Array | None) -> Array:
    """Returns ``carry`` where the rows ``start``, ``[.., R]``, and ``values`` elsewhere, both ``[G, .., R, H]``."""
    return values if start is None else jnp.where(start[None, ..., None], carry, values)


def _inputs(plan: UnrollPlan, sequence: Sequence, index: Array) -> tuple[Array, Any]:
    """Returns a block's inputs ``[K, R, I]`` and starts ``[K, R]``."""
    at_block = functools.partial(_at_block, plan, index=index)
    inputs = plan.features(*jax.tree.map(at_block, (sequence.sources, sequence.last_action)))
    starts = None if sequence.starts is None else _at_block(plan, sequence.starts, index)
    return inputs.reshape(plan.block, -1, inputs.shape[-1]), starts


def _sources_gradient(plan: UnrollPlan, sequence: Sequence, index: Array, d_inputs: Array) -> PyTree:
    """Returns the gradient of a block's sources, given that of its inputs ``[K, R, I]``; None for integers."""
    sources, last_action = jax.tree.map(
        functools.partial(_at_block, plan, index=index), (sequence.sources, sequence.last_action)
    )
    inputs, pull_back = jax.vjp(lambda sources: plan.features(sources, last_action), sources)
    (d_sources,) = pull_back(d_inputs.reshape(inputs.shape))
    return jax.tree.map(lambda leaf, grad: grad if _is_float(leaf) else None, sources, d_sources)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _at_block(plan: UnrollPlan, leaf: Array, index: Array, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(leaf, index * plan.block, plan.block, axis)


def _loop_scope(plan: UnrollPlan, sequence: Sequence) -> Any:
    """Names a loop of dynamic length after its most turns, for whoever reads the compiled program."""
    return jax.named_scope(f"blocks_at_most_{len(sequence.last_action) // plan.block}")


def _used_blocks(plan: UnrollPlan, sequence: Sequence) -> Array | int:
    if sequence.num_places is None:
        return len(sequence.last_action) // plan.block
    return (sequence.num_places + plan.block - 1) // plan.block
