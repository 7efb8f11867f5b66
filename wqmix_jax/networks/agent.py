"""The recurrent utility network that all agents share."""

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
from wqmix_jax.networks.functional import BlockForm, apply_net, block_form
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


class SeenByAgents(NamedTuple):
    """A sequence of the agents' observations; see `RecurrentAgent.unroll` for the last two attributes.

    Attributes:
        obs: ``[T, .., N, O]``.
        last_action: ``[T, .., N]`` int, -1 where there is none.
        starts: ``[T, .., N]`` bool, or None.
        compact: a function that makes ``obs`` of its arguments, leaves ``[T, ..]``, or of the same slices of all; None
            if there is none.
        num_places: scalar int32, or None.
    """

    obs: Array
    last_action: Array
    starts: Array | None = None
    compact: jax.tree_util.Partial | None = None
    num_places: Array | None = None


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
        assert hiddens is not None
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
    seen: SeenByAgents,
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
        seen: the sequence.
        keeps_hiddens: whether hidden states are returned, too.

    Returns:
        One `Unrolled` for each network, the trained ones first, leaves ``[T, .., N, ..]``.
    """
    nets, form = [*trained, *frozen], block_form()
    if form is not None:
        return _unroll_blocks(form, agent, nets, len(trained), carry, seen, keeps_hiddens=keeps_hiddens)
    inputs = agent_inputs(seen.obs, seen.last_action, agent.num_actions)
    rest = seen.starts, seen.num_places
    unrolled = [apply_net(agent, params, carry, inputs, *rest, method="unroll") for params in nets]
    return unrolled if keeps_hiddens else [one._replace(hiddens=None) for one in unrolled]


def _unroll_blocks(
    form: BlockForm,
    agent: RecurrentAgent,
    nets: Sequence[PyTree],
    num_trained: int,
    carry: Array,
    seen: SeenByAgents,
    *,
    keeps_hiddens: bool,
) -> list[Unrolled]:
    """Unrolls all nets together; the first ``num_trained`` have gradients."""
    # Observations are made of their compact form block by block, so that those of all steps never exist.
    if seen.compact is None:
        sources, observe = seen.obs, lambda obs: obs
    else:
        sources, make_obs = seen.compact.args, seen.compact.func
        observe = lambda parts: make_obs(*parts)  # noqa: E731

    def features(parts: PyTree, last_action: Array) -> Array:
        return agent_inputs(observe(parts).astype(carry.dtype), last_action, agent.num_actions)

    num_steps, block = len(seen.obs), form.block_length(len(seen.obs))
    plan = UnrollPlan(num_trained, block, min(form.steps_inline, block), features, keeps_hiddens, form.recomputes)
    num_inputs = jax.eval_shape(features, sources, seen.last_action).shape[-1]
    layers = [apply_net(agent, params, num_inputs, method="weights") for params in nets]
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    starts = None if seen.starts is None else seen.starts.reshape(num_steps, -1)
    sequence = padded_sequence(plan, sources, seen.last_action, starts, seen.num_places)
    results = blocked_unroll(plan, weights, carry.reshape(-1, agent.hidden_dim), sequence)
    utilities, hiddens = jax.tree.map(
        lambda leaf: leaf[:, :num_steps].reshape(len(nets), *seen.last_action.shape, leaf.shape[-1]), results
    )
    return [Unrolled(None if hiddens is None else hiddens[net], utilities[net]) for net in range(len(nets))]
