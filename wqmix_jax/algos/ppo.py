"""MAPPO and IPPO (Yu et al., arXiv 2103.01955; github.com/marlbenchmark/on-policy).

Proximal policy optimisation (Schulman et al., arXiv 1707.06347) of decentralised actors. MAPPO's critic sees the state,
IPPO's (de Witt et al., arXiv 2011.09533) each agent's observations.
"""

import functools
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import (
    AgentInputs,
    Aux,
    Context,
    Fraction,
    Hyperparams,
    PositiveFloat,
    PositiveFraction,
    Weight,
    mean_over_steps,
)
from wqmix_jax.algos.q_learning import QLearner, gather_actions, is_followed
from wqmix_jax.networks.agent import AgentForm
from wqmix_jax.ops import policy_gradient
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.ops.td import lambda_return, masked_mean
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree


@options
class PPO(QLearner):
    """Actors whose outputs are logits, and a critic of the same form; parameters ``{"agent", "critic"}``.

    An agent with a single available action, such as a dead unit of SMAC, has nothing to choose: at these steps it is
    left out of the policy's loss and of the advantages' mean and deviation. The critic learns from all steps.

    Attributes:
        critic: its inputs: ``state``, or each agent's ``obs``.
        critic_agent_id: whether it also sees the agent's number (one-hot). Without it, a critic on the state has one
            value for all agents, unless they have separate parameters.
        standardise_returns: whether the critic learns returns minus their mean, divided by their standard deviation,
            both over all steps played so far.
        gae_lambda: lambda of the advantages (Schulman et al., arXiv 1506.02438).
        limit_is_end: whether an episode that the time limit cut counts as ended, as in the released code by default;
            otherwise the value of its last state is bootstrapped from.
        standardise_advantages: whether those of an iteration get mean 0 and deviation 1.
        clip_ratio: the most by which the ratio of new to old probabilities may differ from 1.
        value_clip: the most by which values may differ from the old ones.
        huber_delta: the error of values from which on their loss is linear.
        value_weight: weight of the critic's loss.
        entropy_weight: weight of the policy's entropy.
        epsilon_start: positive; actions are drawn from the policy whatever it is.
        epsilon_finish: as ``epsilon_start``.
    """

    critic: Literal["state", "obs"]
    critic_agent_id: bool
    standardise_returns: bool
    gae_lambda: Fraction
    limit_is_end: bool
    standardise_advantages: bool
    clip_ratio: PositiveFloat
    value_clip: PositiveFloat
    huber_delta: PositiveFloat
    value_weight: Weight
    entropy_weight: Weight
    epsilon_start: PositiveFraction
    epsilon_finish: PositiveFraction

    is_on_policy: ClassVar[bool] = True
    target_has_played: ClassVar[bool] = True
    clips_nets_apart: ClassVar[bool] = True  # each net has its own Adam in the released code

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        unused = ("epsilon_start", "epsilon_finish", "epsilon_anneal_steps")
        return super().without_effect() | dict.fromkeys(unused, "a policy that actions are drawn from")

    @property
    def head_gain(self) -> float:
        """See `QLearner.head_gain`: actors start nearly uniform."""
        return 0.01

    def critic_form(self, num_agents: int) -> AgentForm:
        """Returns the form of the critic, a network of ``num_agents`` agents with one output."""
        form = self.agents(num_agents, num_actions=1)
        return form._replace(has_id=self.critic_agent_id, has_last_action=False)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of actors and critic."""
        agent_key, critic_key = jax.random.split(key)
        num_agents = self._num_values(env_spec.num_agents)
        width = env_spec.state_dim if self.critic == "state" else env_spec.obs_dim
        critic = self.critic_form(num_agents).init(critic_key, num_agents, width)
        return super().init(agent_key, env_spec) | {"critic": critic}

    def sample_act_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Draws standard Gumbel noise, ``[.., N, A]``."""
        return jax.random.gumbel(key, shape)

    def act_with_noise(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, noise: Array
    ) -> tuple[Array, Array]:
        """Draws from the policy; in evaluation takes the likeliest available action."""
        carry, logits = self.step(params["agent"], carry, inputs)
        return greedy_actions(logits + jnp.where(ctx.epsilon > 0, noise, 0), inputs.avail_actions), carry

    def critic_values(self, batch: Episode, trained: Sequence[PyTree], frozen: Sequence[PyTree] = ()) -> list[Array]:
        """Returns the outputs of several critics, see `unroll_nets`: ``[B, T+1, N]``, or ``[B, T+1, 1]`` for all."""
        num_agents = self._num_values(batch.joint_action.shape[-1])
        if self.critic == "state":
            seen = functools.partial(_seen_by_all, num_agents)
            joint_action = batch.joint_action[..., :num_agents]
            compact = jax.tree_util.Partial(seen, batch.state)
            batch = batch._replace(obs=seen(batch.state), joint_action=joint_action, compact=compact)
        nets = self.unroll_nets(batch, trained, frozen, agents=self.critic_form(num_agents))
        return [net.utilities[..., 0] for net in nets]

    def returns(self, batch: Episode, hp: Hyperparams, old_values: Array) -> tuple[Array, Array]:
        """Returns lambda-returns and advantages by the outputs of the critic that played, ``[B, T+1, ..]``."""
        if self.standardise_returns:
            old_values = old_values * hp.played_return_deviation + hp.played_return_mean
        followed = is_followed(batch)
        discount = batch.discount * followed if self.limit_is_end else batch.discount
        # The advantage of GAE is the lambda-return minus the value; at an episode's last step lambda is 0.
        each_row = jax.vmap(lambda_return, in_axes=(0, 0, None, 0, 0))
        y = each_row(batch.reward, discount, hp.gamma, old_values[:, 1:], hp.gae_lambda * followed)
        return jax.lax.stop_gradient((y, y - old_values[:, :-1]))

    def played_means(self, target: PyTree, batch: Episode, hp: Hyperparams) -> Aux:
        """Returns how many agents have a choice, and moments of returns and advantages, of the episodes just played."""
        [old_values] = self.critic_values(batch, [], [target["critic"]])
        y, advantages = self.returns(batch, hp, old_values)
        is_active = policy_gradient.has_choice(batch.avail_actions[:, :-1])
        advantages *= is_active
        means = {"active_mean": is_active, "advantage_mean": advantages, "advantage_square_mean": advantages**2}
        if self.standardise_returns:
            y = (y - hp.return_mean) / hp.return_deviation
            means |= {"td_target_mean": y}
        return Aux(_means(means, batch), {"td_target": y})

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the clipped policy loss, minus the weighted entropy, plus the weighted clipped value loss."""
        del ctx, noise
        nets = self.unroll_nets(batch, [params["agent"]], [target["agent"]])
        log_policies = (policy_gradient.log_probabilities(net.utilities, batch.avail_actions) for net in nets)
        log_policy, old_log_policy = (each[:, :-1] for each in log_policies)
        all_values, old_values = self.critic_values(batch, [params["critic"]], [target["critic"]])
        y, advantages = self.returns(batch, hp, old_values)
        values, old_values = all_values[:, :-1], old_values[:, :-1]
        log_ratio = gather_actions(log_policy - old_log_policy, batch.joint_action)
        policy_loss = policy_gradient.clipped_policy_loss(log_ratio, self._standardised(advantages, hp), hp.clip_ratio)
        y = (y - hp.return_mean) / hp.return_deviation if self.standardise_returns else y
        value_loss = policy_gradient.clipped_value_loss(values, old_values, y, hp.value_clip, hp.huber_delta)
        # A mean over the agents with a choice, by their share of all steps of the iteration: a mean over steps.
        weights = policy_gradient.has_choice(batch.avail_actions[:, :-1]) / jnp.maximum(hp.active_mean, 1e-6)
        is_clipped = jnp.abs(jnp.exp(log_ratio) - 1) > hp.clip_ratio
        metrics = {
            "policy_loss": weights * policy_loss,
            "policy_entropy": weights * policy_gradient.entropy(log_policy),
        }
        metrics |= {"clipped_share": weights * is_clipped, "value_loss": value_loss}
        metrics = _means(metrics | {"td_target_mean": y, "value_mean": values}, batch)
        loss = metrics["policy_loss"] - hp.entropy_weight * metrics["policy_entropy"]
        loss += hp.value_weight * metrics["value_loss"]
        found = {"log_policy": log_policy, "log_ratio": log_ratio, "advantages": advantages, "old_values": old_values}
        return loss, Aux({"loss": loss, **metrics}, found | {"td_target": y, "values": values})

    def _standardised(self, advantages: Array, hp: Hyperparams) -> Array:
        """Standardises advantages by the moments of those of all agents with a choice in the iteration."""
        if not self.standardise_advantages:
            return advantages
        share = jnp.maximum(hp.active_mean, 1e-6)
        mean = hp.advantage_mean / share
        variance = jnp.maximum(hp.advantage_square_mean / share - jnp.square(mean), 0)
        return (advantages - mean) / (jnp.sqrt(variance) + 1e-5)

    def _num_values(self, num_agents: int) -> int:
        """Returns 1 if all agents have the same value, otherwise the number of agents."""
        is_common = self.critic == "state" and not self.critic_agent_id and self.share_parameters == "all"
        return 1 if is_common else num_agents


def _means(values: dict[str, Array], batch: Episode) -> dict[str, Array]:
    """Averages over real steps and agents, ``[B, T, N]`` or ``[B, T, 1]`` by name -> scalars."""
    return {
        name: masked_mean(each, jnp.broadcast_to(batch.mask[..., None], each.shape)) for name, each in values.items()
    }


def _seen_by_all(num_agents: int, state: Array) -> Array:
    """Returns the state as the observation of each agent: ``[.., D]`` -> ``[.., N, D]``."""
    return jnp.broadcast_to(state[..., None, :], (*state.shape[:-1], num_agents, state.shape[-1]))
