"""The base of all algorithms with utility networks of agents: unroll them, act with them, read values from them."""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import pydantic
from pydantic import Field

from wqmix_jax.algos.base import AgentInputs, Algorithm, Context, Fraction, Hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.networks.agent import AgentForm, SeenByAgents, Unrolled, unroll_agents
from wqmix_jax.networks.functional import init_net
from wqmix_jax.ops.action_selection import explore, greedy_actions, sample_exploration
from wqmix_jax.ops.td import lambda_return, n_step_return, td_target
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, Observation, PRNGKey, PyTree


def _sharing(value: Any) -> Any:
    if value in ("all", "none"):
        return value
    groups = value if isinstance(value, list | tuple) else ()
    groups = tuple(tuple(group) if isinstance(group, list | tuple) else () for group in groups)
    agents = [agent for group in groups for agent in group]
    are_numbers = bool(agents) and all(groups) and all(type(agent) is int for agent in agents)
    if not are_numbers or sorted(agents) != list(range(len(agents))):
        raise ValueError("choose all, none or groups that name each agent, from 0, once, such as [[0,1],[2]]")
    return groups


ParameterSharing = Annotated[Any, pydantic.AfterValidator(_sharing)]
"""``all``, ``none``, or a tuple of tuples of agents."""


@options
class QLearner(Algorithm):
    """Agents that act epsilon-greedily on their outputs; parameters ``{"agent": ..}``.

    The base of `TDLearner`, whose outputs are utilities, and of `ActorCritic`, whose outputs are logits. The defaults
    are in ``configs/algo/_agent.yaml``. All options but ``hidden_dim`` are about all networks of agents, those of a Q*
    or a critic included.

    Attributes:
        agent_id: whether agents see their number (one-hot).
        last_action: whether agents see their last action (one-hot).
        recurrent: agents with a GRU; otherwise without memory, with a linear layer in its place.
        share_parameters: the agents that have the same parameters: ``all``, ``none``, or groups such as
            ``[[0,1],[2]]``, which name each agent once.
        layer_norm: whether a layer normalisation follows the agents' first linear layer and precedes their last one.
        weight_init: how the agents' parameters are drawn: as ``torch`` does, or ``orthogonal`` kernels and zero biases.
    """

    agent_id: bool
    last_action: bool
    recurrent: bool
    share_parameters: ParameterSharing
    layer_norm: bool
    weight_init: Literal["torch", "orthogonal"]

    @property
    def head_gain(self) -> float:
        """The gain of orthogonal kernels of the acting agents' last layer."""
        return 1.0

    def agents(self, num_agents: int, num_actions: int, head_gain: float = 1.0) -> AgentForm:
        """Returns the form of a network of agents.

        Raises:
            ConfigError: if ``share_parameters`` doesn't name all agents.
        """
        return AgentForm(
            hidden_dim=self.hidden_dim,
            num_actions=num_actions,
            has_id=self.agent_id,
            has_last_action=self.last_action,
            recurrent=self.recurrent,
            layer_norm=self.layer_norm,
            head_gain=head_gain if self.weight_init == "orthogonal" else None,
            groups=_groups(self.share_parameters, num_agents),
        )

    def init_agents(self, key: PRNGKey, env_spec: EnvSpec, head_gain: float = 1.0) -> PyTree:
        """Draws the parameters of one network of agents."""
        agents = self.agents(env_spec.num_agents, env_spec.num_actions, head_gain)
        return agents.init(key, env_spec.num_agents, env_spec.obs_dim)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the agents' parameters; families with more nets add to this."""
        return {"agent": self.init_agents(key, env_spec, self.head_gain)}

    def acting_params(self, params: PyTree) -> PyTree:
        """Returns the agent alone."""
        return {"agent": params["agent"]}

    def initial_hiddens(self, batch_shape: tuple[int, ...]) -> Array:
        """Returns the hidden state of one network of agents at the start of an episode: zeros, ``[.., N, H]``."""
        return jnp.zeros((*batch_shape, self.hidden_dim))

    def initial_carry(self, batch_shape: tuple[int, ...]) -> PyTree:
        """Returns `initial_hiddens`."""
        return self.initial_hiddens(batch_shape)

    def act(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, key: PRNGKey
    ) -> tuple[Array, Array]:
        """Acts epsilon-greedily among the available actions; see `Algorithm.act`."""
        noise = self.sample_act_noise(key, inputs.avail_actions.shape)
        return self.act_with_noise(params, carry, inputs, hp, ctx, noise)

    def sample_act_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> PyTree:
        """Draws the random numbers of `explore`, an `Exploration`."""
        return sample_exploration(key, shape)

    def act_with_noise(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Array]:
        """Acts epsilon-greedily among the available actions; see `Algorithm.act_with_noise`."""
        del hp
        carry, agent_qs = self.step(params["agent"], carry, inputs)
        return explore(noise, agent_qs, inputs.avail_actions, ctx.epsilon), carry

    def step(self, agent_params: PyTree, carry: Array, inputs: AgentInputs) -> tuple[Array, Array]:
        """Returns the recurrent state after one step, ``[.., N, H]``, and the utilities, ``[.., N, A]``."""
        return self.agents(*inputs.avail_actions.shape[-2:]).step(agent_params, carry, inputs.obs, inputs.last_action)

    def unroll(self, agent_params: PyTree, batch: Episode) -> Array:
        """Returns the utilities of whole episodes from a fresh recurrent state: ``[B, T+1, N, A]``."""
        return self.unroll_nets(batch, [agent_params])[0].utilities

    def unroll_nets(
        self,
        batch: Episode,
        trained: Sequence[PyTree],
        frozen: Sequence[PyTree] = (),
        *,
        keeps_hiddens: bool = False,
        agents: AgentForm | None = None,
    ) -> list[Unrolled]:
        """Unrolls whole episodes from a fresh recurrent state under several agent networks.

        A loss calls this once for all its networks: an accelerator unrolls them together.

        Args:
            batch: the episodes.
            trained: the parameters of networks that have gradients.
            frozen: those of networks that have none, for example target copies.
            keeps_hiddens: whether hidden states are returned, too, which costs memory on an accelerator.
            agents: the form of the networks; that of the agents that act if absent.

        Returns:
            For each network, the trained ones first, utilities ``[B, T+1, N, A]`` and, if kept, hidden states ``[B,
            T+1, N, H]``, after each observation; past the batch's ``num_places`` they have no meaning.
        """
        # Time comes first inside, ``[T+1, B, N, ..]``, as the scan over time needs it.
        # The last action before the first step of an episode is -1, which `agent_inputs` encodes as zeros.
        first = jnp.full_like(batch.joint_action[:, :1], -1)
        last_action = jnp.concatenate([first, batch.joint_action], axis=1)
        starts = batch.starts
        if starts is not None:
            starts = jnp.broadcast_to(starts[..., None], last_action.shape)
            last_action = jnp.where(starts, -1, last_action)
        seen = SeenByAgents(batch.obs, last_action, starts, batch.compact)
        seen = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), seen)._replace(num_places=batch.num_places)
        carry = self.initial_hiddens(last_action.shape[:1] + last_action.shape[2:]).astype(batch.obs.dtype)
        agents = self.agents(*batch.avail_actions.shape[-2:]) if agents is None else agents
        unrolled = unroll_agents(agents, trained, frozen, carry, seen, keeps_hiddens=keeps_hiddens)
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), unrolled)


Returns = Literal["one_step", "n_step", "td_lambda", "sarsa_lambda", "q_lambda", "pymarl2_q_lambda"]


@options
class TDLearner(QLearner):
    """A Q-learner whose targets bootstrap from the value of the next joint action; the defaults are in ``_td.yaml``.

    Attributes:
        prioritised: whether episodes are replayed in proportion to their priority, sum |td_error| / sqrt(length), to a
            power, with importance weights. `Aux.values` must have ``td_error``, and the loss reads
            `Episode.importance`.
        priority_exponent: that power; 0 is uniform.
        importance_exponent: the power of the importance weights at the start; it rises linearly to 1 at
            ``total_env_steps``.
        standardise_returns: whether the networks learn targets minus their mean, divided by their standard deviation,
            both over all steps that were learned from before. `Aux.values` must have them as ``td_target``.
        double_q: whether the online agents choose the greedy joint actions to bootstrap from (double Q-learning);
            otherwise the target agents do.
        returns: ``one_step``; ``n_step``; ``td_lambda``, lambda-returns over the greedy joint actions' values (Peng's
            Q(lambda)); ``sarsa_lambda``, over those of the joint actions taken (SMIX(lambda), Wen et al., arXiv
            1911.04094); ``q_lambda``, Q(lambda) with off-policy corrections (Harutyunyan et al., arXiv 1602.04951); or
            ``pymarl2_q_lambda``, which PyMARL2 computes: ``q_lambda`` plus V(s) - Q(s, u) of the step itself.
        n_steps: the steps of ``n_step``.
        td_lambda: lambda.
    """

    prioritised: bool
    priority_exponent: Annotated[float, Field(ge=0, le=1)]
    importance_exponent: Annotated[float, Field(ge=0, le=1)]
    standardise_returns: bool
    double_q: bool
    returns: Returns
    n_steps: PositiveInt
    td_lambda: Fraction

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        unused = {"n_steps"} if self.returns != "n_step" else set()
        unused |= {"td_lambda"} if self.returns in ("one_step", "n_step") else set()
        without = dict.fromkeys(sorted(unused), f"algo.returns={self.returns}")
        if not self.prioritised:
            without |= dict.fromkeys(["priority_exponent", "importance_exponent"], "algo.prioritised=false")
        elif self.priority_exponent == 0:
            without |= {"importance_exponent": "algo.priority_exponent=0"}
        return super().without_effect() | without

    def greedy_to_bootstrap(self, online_qs: Array, target_qs: Array, batch: Episode) -> Array:
        """Returns the greedy joint actions whose target values are bootstrapped from, ``[B, T+1, N]``.

        Args:
            online_qs: ``[B, T+1, N, A]``, the online agents' utilities.
            target_qs: ``[B, T+1, N, A]``, those of the target agents.
            batch: the episodes.
        """
        return greedy_actions(online_qs if self.double_q else target_qs, batch.avail_actions)

    def next_actions(self, greedy: Array, batch: Episode) -> Array:
        """Returns the joint actions after each step from whose values targets bootstrap, ``[B, T, N]``.

        Args:
            greedy: ``[B, T+1, N]``, see `greedy_to_bootstrap`. After an episode's last step nothing was taken, so that
                SARSA, too, bootstraps from these.
            batch: the episodes.
        """
        if self.returns != "sarsa_lambda":
            return greedy[:, 1:]
        taken = jnp.concatenate([batch.joint_action[:, 1:], greedy[:, -1:]], axis=1)
        return jnp.where(is_followed(batch)[..., None] > 0, taken, greedy[:, 1:])

    def correction(self, batch: Episode, greedy: Array, value: Callable[[Array], Array]) -> Array | None:
        """Returns V(s) - Q(s, u) of each step for Q(lambda), None for other ``returns``.

        Args:
            batch: the episodes.
            greedy: ``[B, T+1, N]``, see `greedy_to_bootstrap`.
            value: the target nets' value of joint actions ``[B, T, N]`` before each step, shaped as its result.
        """
        if self.returns not in ("q_lambda", "pymarl2_q_lambda"):
            return None
        return jax.lax.stop_gradient(value(greedy[:, :-1]) - value(batch.joint_action))

    def td_targets(self, batch: Episode, hp: Hyperparams, next_value: Array, correction: Array | None = None) -> Array:
        """Returns y, a constant to the gradient.

        Args:
            batch: the episodes.
            hp: the traced options.
            next_value: ``[B, T]`` or, one for each agent, ``[B, T, N]``: the target nets' value of `next_actions`.
            correction: see `correction`; shaped as ``next_value``.
        """
        if correction is None and self.returns in ("q_lambda", "pymarl2_q_lambda"):
            name = type(self).__qualname__
            raise ConfigError(f"algo.returns={self.returns} is not allowed: the loss of {name} has no correction")
        reward, discount, mean, deviation = batch.reward, batch.discount, 0.0, 1.0
        if self.standardise_returns:  # the networks' values are standardised, the rewards aren't
            mean, deviation = hp.return_mean, hp.return_deviation
            next_value = next_value * deviation + mean
        if self.returns == "one_step":
            # Reward and discount are shared; values may be one per agent, [B, T, N].
            per_agent = (1,) * (next_value.ndim - reward.ndim)
            reward, discount = (leaf.reshape(*leaf.shape, *per_agent) for leaf in (reward, discount))
            y = td_target(reward, discount, hp.gamma, next_value)
        # No return passes from one episode of a row to another: nothing follows an episode's last step.
        elif self.returns == "n_step":
            each_row = jax.vmap(functools.partial(n_step_return, num_steps=self.n_steps), in_axes=(0, 0, None, 0, 0))
            y = each_row(reward, discount, hp.gamma, next_value, is_followed(batch))
        else:
            each_row = jax.vmap(lambda_return, in_axes=(0, 0, None, 0, 0, 0))
            plain = None if correction is None else correction * deviation
            y = each_row(reward, discount, hp.gamma, next_value, hp.td_lambda * is_followed(batch), plain)
        if self.standardise_returns:
            y = (y - mean) / deviation
        if self.returns == "pymarl2_q_lambda" and correction is not None:
            y += correction
        return jax.lax.stop_gradient(y)


def is_followed(batch: Episode) -> Array:
    """Returns 1 where a real step comes next, ``[B, T]``."""
    return jnp.pad(batch.mask[:, 1:], ((0, 0), (0, 1)))


def seen_before(batch: Episode) -> Observation:
    """Returns the observations before each step, leaves ``[B, T, ..]``."""
    return Observation(batch.obs[:, :-1], batch.state[:, :-1], batch.avail_actions[:, :-1])


def seen_after(batch: Episode) -> Observation:
    """Returns the observations after each step, leaves ``[B, T, ..]``."""
    return Observation(batch.obs[:, 1:], batch.state[:, 1:], batch.avail_actions[:, 1:])


def _groups(sharing: Any, num_agents: int) -> tuple[int, ...] | None:
    """Returns the number of each agent's group; None if all agents share their parameters."""
    if sharing == "all":
        return None
    if sharing == "none":
        return tuple(range(num_agents))
    groups = {agent: group for group, agents in enumerate(sharing) for agent in agents}
    if len(groups) != num_agents:
        named = [list(agents) for agents in sharing]
        needed = f"it names {len(groups)} agents, and the environment has {num_agents}"
        raise ConfigError(f"algo.share_parameters={named} is not allowed: {needed}")
    return tuple(groups[agent] for agent in range(num_agents))


def init_central(net: nn.Module, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
    """Draws the parameters of a net on the chosen utilities and the state: a Q*, or a critic built as one."""
    return init_net(net, key, jnp.zeros((1, env_spec.num_agents)), jnp.zeros((1, env_spec.state_dim)))


def gather_actions(agent_qs: Array, joint_action: Array) -> Array:
    """Returns the utilities of the given actions: ``[.., N, A]``, ``[.., N]`` -> ``[.., N]``."""
    # A masked sum, since a gather's gradient is a scatter, which is slow on every backend.
    taken = joint_action[..., None] == jnp.arange(agent_qs.shape[-1]).reshape((1,) * joint_action.ndim + (-1,))
    return jnp.where(taken, agent_qs, 0).sum(-1)
