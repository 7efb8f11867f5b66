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


def gru_step(weights: GRUWeights, carry: Array, inputs: Array) -> Array:
    """One step of torch's GRUCell: ``[R, H]``, ``[R, F]`` -> ``[R, H]``."""
    from_inputs = inputs @ weights.input_kernel + weights.input_bias[None, :]
    from_hidden = carry @ weights.hidden_kernel + weights.hidden_bias[None, :]
    input_reset, input_update, input_new = jnp.split(from_inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(from_hidden, 3, axis=-1)
    reset = nn.sigmoid(input_reset + hidden_reset)
    update = nn.sigmoid(input_update + hidden_update)
    new = jnp.tanh(input_new + reset * hidden_new)
    return (1 - update) * new + update * carry


def gru_unroll(weights: GRUWeights, carry: Array, inputs: Array) -> Array:
    """All hidden states of a sequence: ``[R, H]``, ``[T, R, F]`` -> ``[T, R, H]``."""

    def step(hidden: Array, x: Array) -> tuple[Array, Array]:
        hidden = gru_step(weights, hidden, x)
        return hidden, hidden

    return jax.lax.scan(step, carry, inputs)[1]


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
