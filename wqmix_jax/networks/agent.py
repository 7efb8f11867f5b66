"""The recurrent utility network that all agents share."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import Linear
from wqmix_jax.networks.recurrent import GRU, encoded_unroll
from wqmix_jax.types import Array


def agent_inputs(obs: Array, last_action: Array, num_actions: int) -> Array:
    """Concatenates local observation, one-hot last action and one-hot agent id.

    Args:
        obs: ``[.., N, O]``.
        last_action: ``[.., N]`` int, -1 where there is none (t = 0), which gives zeros.
        num_actions: ``A``.

    Returns:
        ``[.., N, O + A + N]`` in the dtype of ``obs``.
    """
    chex.assert_equal_shape_prefix([obs, last_action], obs.ndim - 1)
    last = jax.nn.one_hot(last_action, num_actions, dtype=obs.dtype)
    return with_ids(jnp.concatenate([obs, last], axis=-1))


def with_ids(features: Array) -> Array:
    """Appends each agent's one-hot id to its features: ``[.., N, F]`` -> ``[.., N, F + N]``."""
    # An id lets agents with shared weights behave differently.
    num_agents = features.shape[-2]
    ids = jnp.broadcast_to(jnp.eye(num_agents, dtype=features.dtype), (*features.shape[:-1], num_agents))
    return jnp.concatenate([features, ids], axis=-1)


class RecurrentAgent(nn.Module):
    """Linear-ReLU-GRU-Linear, one set of weights for all agents (figure 1 of the QMIX paper, arXiv 1803.11485)."""

    hidden_dim: int
    num_actions: int

    def setup(self) -> None:
        """Creates the layers; their parameters have the names of the attributes."""
        self.encoder = Linear(self.hidden_dim)
        self.gru = GRU(self.hidden_dim)
        self.head = Linear(self.num_actions)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Unrolls a sequence.

        Args:
            carry: ``[.., H]``, the hidden state before the first step.
            inputs: ``[T, .., I]``.

        Returns:
            The hidden state after the last step ``[.., H]`` and the utilities ``[T, .., A]``.
        """
        hiddens, utilities = self.unroll(carry, inputs)
        return hiddens[-1], utilities

    def unroll(
        self, carry: Array, inputs: Array, starts: Array | None = None, num_places: Array | None = None
    ) -> tuple[Array, Array]:
        """Unrolls a sequence as `__call__` does, but returns the hidden states of all steps.

        Args:
            carry: ``[.., H]``, the hidden state before the first step.
            inputs: ``[T, .., I]``.
            starts: ``[T, ..]`` bool, where the hidden state before the step is ``carry`` again; None for nowhere.
            num_places: scalar int32, the number of steps that are taken, the hidden states of the others being zero;
                None for all.

        Returns:
            The hidden states ``[T, .., H]`` and the utilities ``[T, .., A]``.
        """
        encoder, gru = self.encoder.weights(inputs.shape[-1]), self.gru(self.hidden_dim)
        # Any batch axes become one of rows, [T, R, I]: the GRU works on matrices.
        rows = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        starts = None if starts is None else starts.reshape(len(rows), -1)
        hiddens = encoded_unroll(encoder, gru, carry.reshape(-1, self.hidden_dim), rows, starts, num_places)
        hiddens = hiddens.reshape(*inputs.shape[:-1], self.hidden_dim)
        return hiddens, self.head(hiddens)
