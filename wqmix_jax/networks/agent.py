"""The utility networks of the agents: their form, how they are drawn, act and are unrolled."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from wqmix_jax.networks.functional import BlockForm, apply_net, block_form, init_net
from wqmix_jax.networks.linear import Linear
from wqmix_jax.networks.recurrent import GRU, encoded_unroll
from wqmix_jax.types import Array, PRNGKey, PyTree

HIDDEN_GAIN = 2**0.5
"""The gain of orthogonal kernels before a ReLU."""

_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)  # torch's epsilon


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


def agent_inputs(
    obs: Array, last_action: Array, num_actions: int, *, has_last_action: bool = True, has_id: bool = True
) -> Array:
    """Concatenates local observation, one-hot last action and one-hot agent id.

    Args:
        obs: ``[.., N, O]``.
        last_action: ``[.., N]`` int, -1 where there is none (t = 0), which gives zeros.
        num_actions: ``A``.
        has_last_action: whether the last action is part of the inputs.
        has_id: whether the id is.

    Returns:
        ``[.., N, O + A + N]`` in the dtype of ``obs``, less what is not part of the inputs.
    """
    chex.assert_equal_shape_prefix([obs, last_action], obs.ndim - 1)
    inputs = obs
    if has_last_action:
        last = jax.nn.one_hot(last_action, num_actions, dtype=obs.dtype)
        inputs = jnp.concatenate([obs, last], axis=-1)
    return with_ids(inputs) if has_id else inputs


def with_ids(features: Array) -> Array:
    """Appends each agent's one-hot id to its features: ``[.., N, F]`` -> ``[.., N, F + N]``."""
    # An id lets agents with shared weights behave differently.
    num_agents = features.shape[-2]
    ids = jnp.broadcast_to(jnp.eye(num_agents, dtype=features.dtype), (*features.shape[:-1], num_agents))
    return jnp.concatenate([features, ids], axis=-1)


class RecurrentAgent(nn.Module):
    """Linear-ReLU-GRU-Linear (figure 1 of the QMIX paper, arXiv 1803.11485).

    Attributes:
        hidden_dim: ``H``.
        num_actions: ``A``.
        layer_norm: whether the encoder's outputs before the ReLU and the hidden states before the head are normalised.
        head_gain: None for torch's initialisation; otherwise kernels are orthogonal and biases zero, and this is the
            head's gain.
    """

    hidden_dim: int
    num_actions: int
    layer_norm: bool = False
    head_gain: float | None = None

    def setup(self) -> None:
        """Creates the layers; their parameters have the names of the attributes."""
        self.encoder = Linear(self.hidden_dim, None if self.head_gain is None else HIDDEN_GAIN)
        self.gru = GRU(self.hidden_dim, is_orthogonal=self.head_gain is not None)
        self.head = Linear(self.num_actions, self.head_gain)
        if self.layer_norm:
            self.encoder_norm, self.head_norm = _LayerNorm(), _LayerNorm()

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
        """Returns the layers' weights for inputs of this width, not stacked; without those of `layer_norm`."""
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
        gru, encoder = self.gru(self.hidden_dim), None
        # Any batch axes become one of rows, [T, R, I]: the GRU works on matrices.
        rows = inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])
        starts = None if starts is None else starts.reshape(len(rows), -1)
        if self.layer_norm:  # one product over all steps, stored, where the fused encoder stays in the loop
            rows = nn.relu(self.encoder_norm(self.encoder(rows)))
        else:
            encoder = self.encoder.weights(inputs.shape[-1])
        hiddens = encoded_unroll(encoder, gru, carry.reshape(-1, self.hidden_dim), rows, starts, num_places)
        hiddens = hiddens.reshape(*inputs.shape[:-1], self.hidden_dim)
        return Unrolled(hiddens, self.head(self.head_norm(hiddens) if self.layer_norm else hiddens))


class FeedForwardAgent(nn.Module):
    """Linear-ReLU-Linear-ReLU-Linear: EPyMARL's ``rnn_agent`` with ``use_rnn: False``; its hidden state is never read.

    Attributes:
        hidden_dim: ``H``.
        num_actions: ``A``.
        layer_norm: whether the outputs of both hidden layers are normalised before the ReLU.
        head_gain: see `RecurrentAgent`.
    """

    hidden_dim: int
    num_actions: int
    layer_norm: bool = False
    head_gain: float | None = None

    def setup(self) -> None:
        """Creates the layers; their parameters have the names of the attributes."""
        gain = None if self.head_gain is None else HIDDEN_GAIN
        self.encoder, self.hidden = Linear(self.hidden_dim, gain), Linear(self.hidden_dim, gain)
        self.head = Linear(self.num_actions, self.head_gain)
        if self.layer_norm:
            self.encoder_norm, self.hidden_norm = _LayerNorm(), _LayerNorm()

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Returns ``carry`` and the utilities: ``[T, .., I]`` -> ``[T, .., A]``."""
        return carry, self.unroll(carry, inputs).utilities

    def unroll(
        self, carry: Array, inputs: Array, starts: Array | None = None, num_places: Array | None = None
    ) -> Unrolled:
        """Returns the outputs of the last hidden layer and the utilities; see `RecurrentAgent.unroll`."""
        del carry, starts, num_places  # a step depends on its inputs alone, and all steps are one product
        encoded = self.encoder(inputs)
        hiddens = self.hidden(nn.relu(self.encoder_norm(encoded) if self.layer_norm else encoded))
        hiddens = nn.relu(self.hidden_norm(hiddens) if self.layer_norm else hiddens)
        return Unrolled(hiddens, self.head(hiddens))


class AgentForm(NamedTuple):
    """The form of the networks of all agents.

    Attributes:
        hidden_dim: ``H``.
        num_actions: ``A``.
        has_id: whether an agent's id is part of its inputs.
        has_last_action: whether its last action is.
        recurrent: `RecurrentAgent`, otherwise `FeedForwardAgent`.
        layer_norm: see these.
        head_gain: see these.
        groups: the number of the group of each agent, ``N`` integers. Each group has one set of weights. None if all
            agents share one set, which then has no axis of groups.
    """

    hidden_dim: int
    num_actions: int
    has_id: bool = True
    has_last_action: bool = True
    recurrent: bool = True
    layer_norm: bool = False
    head_gain: float | None = None
    groups: tuple[int, ...] | None = None

    @property
    def net(self) -> nn.Module:
        """The flax module of one set of weights."""
        kind = RecurrentAgent if self.recurrent else FeedForwardAgent
        return kind(self.hidden_dim, self.num_actions, self.layer_norm, self.head_gain)

    def inputs(self, obs: Array, last_action: Array) -> Array:
        """Returns the networks' inputs; see `agent_inputs`."""
        parts = {"has_last_action": self.has_last_action, "has_id": self.has_id}
        return agent_inputs(obs, last_action, self.num_actions, **parts)

    def init(self, key: PRNGKey, num_agents: int, obs_dim: int) -> PyTree:
        """Draws the parameters.

        Returns:
            A tree of one set of weights. With groups, one of stacked sets, leaves ``[G, ..]``, each drawn from its key;
            under ``agents`` if each agent is a group, otherwise under ``groups``.
        """
        obs = jnp.zeros((1, num_agents, obs_dim))
        inputs = self.inputs(obs, jnp.full(obs.shape[:-1], -1))
        carry = jnp.zeros((num_agents, self.hidden_dim))
        if self.groups is None:
            return init_net(self.net, key, carry, inputs)
        keys = jax.random.split(key, max(self.groups) + 1)
        return {self._stack: jax.vmap(lambda key: init_net(self.net, key, carry[0], inputs[:, 0]))(keys)}

    def step(self, params: PyTree, carry: Array, obs: Array, last_action: Array) -> tuple[Array, Array]:
        """Takes one step.

        Args:
            params: see `init`.
            carry: ``[.., N, H]``, the hidden state before it.
            obs: ``[.., N, O]``.
            last_action: ``[.., N]``.

        Returns:
            The hidden state after it, ``[.., N, H]``, and the utilities, ``[.., N, A]``.
        """
        # The unrolled net on a sequence of one step: the same arithmetic as in `unroll_agents`.
        inputs = self.inputs(obs, last_action)[None]
        apply = self.for_all_agents(functools.partial(apply_net, self.net), in_axes=(0, -2, -2), out_axes=-2)
        carry, utilities = apply(self.by_agent(params), carry, inputs)
        return carry, utilities[0]

    def by_agent(self, params: PyTree) -> PyTree:
        """Returns the parameters for `for_all_agents`: with groups, those of each agent, leaves ``[N, ..]``."""
        if self.groups is None:
            return params
        stacked = params[self._stack]
        return stacked if self._are_alone else jax.tree.map(lambda leaf: leaf[jnp.array(self.groups)], stacked)

    def for_all_agents(self, function: Callable[..., Any], in_axes: Sequence[int], out_axes: int) -> Callable[..., Any]:
        """Returns ``function`` if all agents share their weights, or maps it over the agents, an axis of each argument.

        Batched products, one for all agents, are the result.
        """
        return function if self.groups is None else jax.vmap(function, tuple(in_axes), out_axes)

    @property
    def _are_alone(self) -> bool:
        return self.groups == tuple(range(len(self.groups or ())))

    @property
    def _stack(self) -> str:
        return "agents" if self._are_alone else "groups"


def unroll_agents(
    agents: AgentForm,
    trained: Sequence[PyTree],
    frozen: Sequence[PyTree],
    carry: Array,
    seen: SeenByAgents,
    *,
    keeps_hiddens: bool = False,
) -> list[Unrolled]:
    """Unrolls the same sequence under several networks: one after another, or all together in blocks of steps.

    `wqmix_jax.networks.functional.unroll_in_blocks` chooses the form; the two agree to rounding.

    Args:
        agents: the form of all of them.
        trained: the parameters of networks that have gradients.
        frozen: those of networks that have none, for example target copies.
        carry: ``[.., N, H]``, the hidden state before the first step.
        seen: the sequence.
        keeps_hiddens: whether hidden states are returned, too.

    Returns:
        One `Unrolled` for each network, the trained ones first, leaves ``[T, .., N, ..]``.
    """
    nets, form = [agents.by_agent(params) for params in (*trained, *frozen)], block_form()
    if form is not None and agents.recurrent and not agents.layer_norm:
        return _unroll_blocks(form, agents, nets, len(trained), carry, seen, keeps_hiddens=keeps_hiddens)
    inputs = agents.inputs(seen.obs, seen.last_action)

    def unroll_one(params: PyTree, carry: Array, inputs: Array, starts: Array | None) -> Unrolled:
        return apply_net(agents.net, params, carry, inputs, starts, seen.num_places, method="unroll")

    each_agent = agents.for_all_agents(unroll_one, in_axes=(0, -2, -2, -1), out_axes=-2)

    def unroll(params: PyTree) -> Unrolled:
        return each_agent(params, carry, inputs, seen.starts)

    unrolled = [unroll(params) for params in nets] if form is None else _unroll_stacked(unroll, nets, len(trained))
    return unrolled if keeps_hiddens else [one._replace(hiddens=None) for one in unrolled]


def _unroll_stacked(unroll: Callable[[PyTree], Unrolled], nets: Sequence[PyTree], num_trained: int) -> list[Unrolled]:
    """Unrolls the trained nets together, and then the others, which have no gradient."""
    unrolled: list[Unrolled] = []
    for part in (nets[:num_trained], jax.lax.stop_gradient(nets[num_trained:])):
        if part:
            stacked = jax.vmap(unroll)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *part))
            unrolled += [jax.tree.map(lambda leaf, net=net: leaf[net], stacked) for net in range(len(part))]
    return unrolled


def _unroll_blocks(
    form: BlockForm,
    agents: AgentForm,
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

    def features(parts: tuple[PyTree, Array | None], last_action: Array) -> Array:
        sources, agent = parts
        inputs = agents.inputs(observe(sources).astype(carry.dtype), last_action)
        return inputs if agent is None else jax.lax.dynamic_index_in_dim(inputs, agent[0], inputs.ndim - 2, False)

    num_steps, block = len(seen.obs), form.block_length(len(seen.obs))
    plan = UnrollPlan(num_trained, block, min(form.steps_inline, block), features, keeps_hiddens, form.recomputes)
    num_inputs = jax.eval_shape(features, (sources, None), seen.last_action).shape[-1]

    def unroll(nets: Sequence[PyTree], carry: Array, starts: Array | None, agent: Array | None) -> Any:
        layers = [apply_net(agents.net, params, num_inputs, method="weights") for params in nets]
        weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        starts = None if starts is None else starts.reshape(num_steps, -1)
        sequence = padded_sequence(plan, (sources, agent), seen.last_action, starts, seen.num_places)
        return blocked_unroll(plan, weights, carry.reshape(-1, agents.hidden_dim), sequence)

    # With groups, each agent is an unroll under its weights; its number at each step is one of the sources, since
    # those of a block make the inputs of all agents.
    number = None if agents.groups is None else jnp.tile(jnp.arange(len(agents.groups))[:, None], (1, num_steps))
    results = agents.for_all_agents(unroll, in_axes=(0, -2, -1, 0), out_axes=-2)(nets, carry, seen.starts, number)
    utilities, hiddens = jax.tree.map(
        lambda leaf: leaf[:, :num_steps].reshape(len(nets), *seen.last_action.shape, leaf.shape[-1]), results
    )
    return [Unrolled(None if hiddens is None else hiddens[net], utilities[net]) for net in range(len(nets))]
