"""The recurrent utility network that all agents share."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.blocked_recurrent import (
    AgentWeights,
    UnrollPlan,
    blocked_unroll,
    padded_sequence,
)
from wqmix_jax.networks.functional import apply_net, block_form
from wqmix_jax.networks.linear import Linear
from wqmix_jax.networks.recurrent import GRU, encoded_unroll
from wqmix_jax.types import Array, PyTree


class Unrolled(NamedTuple):
    """A sequence under one agent network.

    Attributes:
        hiddens: ``[.., H]``, the hidden states after each step; None if they weren't kept.
        utilities: ``[.., A]``.
    """

    hiddens: Array | None
    utilities: Array


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

    def weights(self, num_inputs: int) -> AgentWeights:
        """Returns the layers' weights for inputs of this width, not stacked."""
        layers = self.encoder.weights(num_inputs), self.gru(self.hidden_dim), self.head.weights(self.hidden_dim)
        return AgentWeights(*layers)

    def unroll(
        self, carry: Array, inputs: Array, starts: Array | None = None, num_places: Array | None = None
    ) -> Unrolled:
        """Unrolls a sequence as `__call__` does, but returns the hidden states of all steps.

        Args:
            carry: ``[.., H]``, the hidden state before the first step.
            inputs: ``[T, .., I]``.
            starts: ``[T, ..]`` bool, where the hidden state before the step is ``carry`` again; None for nowhere.
            num_places: scalar int32, the number of steps that are taken, the hidden states of the others being zero;
                None for all.

        Returns:
            Leaves ``[T, ..]``.
        """
        encoder, gru = self.encoder.weights(inputs.shape[-1]), self.gru(self.hidden_dim)
        # Any batch axes become one of rows, [T, R, I]: the GRU works on matrices.
        rows = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        starts = None if starts is None else starts.reshape(len(rows), -1)
        hiddens = encoded_unroll(encoder, gru, carry.reshape(-1, self.hidden_dim), rows, starts, num_places)
        hiddens = hiddens.reshape(*inputs.shape[:-1], self.hidden_dim)
        return Unrolled(hiddens, self.head(hiddens))


def unroll_agents(
    agent: RecurrentAgent,
    trained: Sequence[PyTree],
    frozen: Sequence[PyTree],
    carry: Array,
    obs: Array,
    last_action: Array,
    starts: Array | None = None,
    num_places: Array | None = None,
    *,
    keeps_hiddens: bool = False,
) -> list[Unrolled]:
    """Unrolls the same sequence under several agent networks: one after another, or all together in blocks of steps.

    `wqmix_jax.networks.functional.unroll_in_blocks` chooses the form; the two agree to rounding.

    Args:
        agent: the module of all of them.
        trained: the parameters of networks that have gradients.
        frozen: those of networks that have none, for example target copies.
        carry: ``[.., N, H]``, the hidden state before the first step.
        obs: ``[T, .., N, O]``, see `agent_inputs`.
        last_action: ``[T, .., N]``.
        starts: ``[T, .., N]``, see `RecurrentAgent.unroll`.
        num_places: see there.
        keeps_hiddens: whether hidden states are returned, too.

    Returns:
        One `Unrolled` for each network, the trained ones first, leaves ``[T, .., N, ..]``.
    """
    nets, form = [*trained, *frozen], block_form()
    features = functools.partial(agent_inputs, num_actions=agent.num_actions)
    if form is None:
        inputs = features(obs, last_action)
        every = [apply_net(agent, params, carry, inputs, starts, num_places, method="unroll") for params in nets]
        return every if keeps_hiddens else [one._replace(hiddens=None) for one in every]
    block = form.block_length(len(obs))
    plan = UnrollPlan(len(trained), block, min(form.steps_inline, block), features, keeps_hiddens)
    num_inputs = jax.eval_shape(features, obs, last_action).shape[-1]
    layers = [apply_net(agent, params, num_inputs, method="weights") for params in nets]
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    starts = None if starts is None else starts.reshape(len(obs), -1)
    sequence = padded_sequence(plan, obs, last_action, starts, num_places)
    results = blocked_unroll(plan, weights, carry.reshape(-1, agent.hidden_dim), sequence)
    utilities, hiddens = jax.tree.map(
        lambda leaf: leaf[:, : len(obs)].reshape(len(nets), *last_action.shape, leaf.shape[-1]), results
    )
    return [Unrolled(None if hiddens is None else hiddens[net], utilities[net]) for net in range(len(nets))]
