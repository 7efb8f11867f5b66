"""A gated recurrent unit with torch's two bias vectors, unrolled over time."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import torch_uniform
from wqmix_jax.types import Array


class GRUWeights(NamedTuple):
    """The gates' weights side by side in torch's order: reset, update, new.

    Attributes:
        input_kernel: ``[F, 3H]``.
        hidden_kernel: ``[H, 3H]``.
        input_bias: ``[3H]``.
        hidden_bias: ``[3H]``.
    """

    input_kernel: Array
    hidden_kernel: Array
    input_bias: Array
    hidden_bias: Array


class _Gates(NamedTuple):
    """What a step computes on its way, each ``[R, H]``; ``hidden_new`` is what the new gate has of the hidden state."""

    reset: Array
    update: Array
    new: Array
    hidden_new: Array


def gru_step(weights: GRUWeights, carry: Array, inputs: Array) -> Array:
    """One step of torch's GRUCell: ``[R, H]``, ``[R, F]`` -> ``[R, H]``."""
    gates = _gates(weights, carry, inputs)
    return (1 - gates.update) * gates.new + gates.update * carry


@jax.custom_vjp
def gru_unroll(weights: GRUWeights, carry: Array, inputs: Array) -> Array:
    """All hidden states of a sequence: ``[R, H]``, ``[T, R, F]`` -> ``[T, R, H]``.

    The backward pass is written out: it computes the gates again from the stored hidden states and adds up the weights'
    gradients once per `CHUNK` steps, so that what it touches stays in the cache, where autodiff would store and reread
    every gate.
    """

    def step(hidden: Array, x: Array) -> tuple[Array, Array]:
        hidden = gru_step(weights, hidden, x)
        return hidden, hidden

    return jax.lax.scan(step, carry, inputs)[1]


CHUNK = 2
"""Time steps whose weight gradients are one matrix product; measured on a two-core CPU."""


def _gates(weights: GRUWeights, carry: Array, inputs: Array) -> _Gates:
    from_inputs = inputs @ weights.input_kernel + weights.input_bias[None, :]
    from_hidden = carry @ weights.hidden_kernel + weights.hidden_bias[None, :]
    input_reset, input_update, input_new = jnp.split(from_inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(from_hidden, 3, axis=-1)
    reset = nn.sigmoid(input_reset + hidden_reset)
    update = nn.sigmoid(input_update + hidden_update)
    return _Gates(reset, update, jnp.tanh(input_new + reset * hidden_new), hidden_new)


def _unroll_forward(weights: GRUWeights, carry: Array, inputs: Array) -> tuple[Array, tuple]:
    hiddens = gru_unroll(weights, carry, inputs)
    return hiddens, (weights, carry, inputs, hiddens)


class _Backward(NamedTuple):
    """The backward loop's state: the gradients so far."""

    carry: Array
    weights: GRUWeights
    inputs: Array


def _unroll_backward(residuals: tuple, d_hiddens: Array) -> tuple[GRUWeights, Array, Array]:
    weights, carry, inputs, hiddens = residuals
    num_steps = inputs.shape[0]
    first = (num_steps - 1) % CHUNK + 1  # the first chunk, done last, takes the remainder
    grads = _Backward(jnp.zeros_like(carry), jax.tree.map(jnp.zeros_like, weights), jnp.zeros_like(inputs))

    def from_the_end(index: Array, grads: _Backward) -> _Backward:
        start = num_steps - (index + 1) * CHUNK
        x, previous, d_out = (
            jax.lax.dynamic_slice_in_dim(array, start - shift, CHUNK)
            for array, shift in ((inputs, 0), (hiddens, 1), (d_hiddens, 0))
        )
        return _chunk_backward(weights, grads, start, x, previous, d_out)

    if num_steps > first:  # a slice of a whole chunk can't be traced on a shorter sequence
        grads = jax.lax.fori_loop(0, (num_steps - first) // CHUNK, from_the_end, grads)
    previous = jnp.concatenate([carry[None], hiddens[: first - 1]])
    grads = _chunk_backward(weights, grads, 0, inputs[:first], previous, d_hiddens[:first])
    return grads.weights, grads.carry, grads.inputs


def _chunk_backward(
    weights: GRUWeights, grads: _Backward, start: Array | int, x: Array, previous: Array, d_out: Array
) -> _Backward:
    """Adds the gradients of a few steps ``[C, R, ..]``, of which the carry's alone goes from step to step."""
    num_steps, num_rows, _ = x.shape
    flat_x, flat_previous = x.reshape(num_steps * num_rows, -1), previous.reshape(num_steps * num_rows, -1)
    gates = jax.tree.map(lambda g: g.reshape(num_steps, num_rows, -1), _gates(weights, flat_previous, flat_x))
    d_carry, d_from_inputs, d_from_hidden = grads.carry, [], []
    for t in reversed(range(num_steps)):
        reset, update, new, hidden_new = (gate[t] for gate in gates)
        d_carry = d_carry + d_out[t]
        d_new = d_carry * (1 - update) * (1 - new * new)
        d_update = d_carry * (previous[t] - new) * update * (1 - update)
        d_reset = d_new * hidden_new * reset * (1 - reset)
        d_from_inputs.insert(0, jnp.concatenate([d_reset, d_update, d_new], axis=-1))
        d_from_hidden.insert(0, jnp.concatenate([d_reset, d_update, d_new * reset], axis=-1))
        d_carry = d_carry * update + d_from_hidden[0] @ weights.hidden_kernel.T
    flat_inputs, flat_hidden = jnp.concatenate(d_from_inputs), jnp.concatenate(d_from_hidden)
    d_weights = GRUWeights(
        flat_x.T @ flat_inputs, flat_previous.T @ flat_hidden, flat_inputs.sum(0), flat_hidden.sum(0)
    )
    d_x = (flat_inputs @ weights.input_kernel.T).reshape(x.shape)
    return _Backward(
        carry=d_carry,
        weights=jax.tree.map(jnp.add, grads.weights, d_weights),
        inputs=jax.lax.dynamic_update_slice_in_dim(grads.inputs, d_x, start, 0),
    )


gru_unroll.defvjp(_unroll_forward, _unroll_backward)


class GRU(nn.Module):
    """The unit's weights, initialised U(-1/sqrt(H), 1/sqrt(H)) as in torch."""

    hidden_dim: int

    @nn.compact
    def __call__(self, carry: Array, inputs: Array) -> Array:
        """Unrolls ``[T, .., F]`` from ``carry`` ``[.., H]`` to all hidden states ``[T, .., H]``."""
        init, gates = torch_uniform(self.hidden_dim), 3 * self.hidden_dim
        weights = GRUWeights(
            self.param("input_kernel", init, (inputs.shape[-1], gates)),
            self.param("hidden_kernel", init, (self.hidden_dim, gates)),
            self.param("input_bias", init, (gates,)),
            self.param("hidden_bias", init, (gates,)),
        )
        rows = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        hiddens = gru_unroll(weights, carry.reshape(-1, self.hidden_dim), rows)
        return hiddens.reshape(*inputs.shape[:-1], self.hidden_dim)
