"""Independent Q-learning from episodes that a central Q, maximised by coordinate ascent, plays a share of.

After independent centrally-assisted Q-learning (Boehmer et al., arXiv 1906.02138), whose code isn't public. The paper
has agents and a central Q that share control and one replay; nets, losses and the form of control here are our choice,
and there is no intrinsic reward.
"""

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import AgentInputs, Aux, Context, Fraction, Hyperparams, PositiveFraction, mean_over_steps
from wqmix_jax.algos.iql import IQL
from wqmix_jax.algos.q_learning import gather_actions, init_central
from wqmix_jax.networks.functional import apply_net
from wqmix_jax.networks.q_star import FeedForwardQStar
from wqmix_jax.ops.action_selection import coordinate_ascent, explore, greedy_actions
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree


@options
class CentralIQL(IQL):
    """`IQL` plus a central Q* on separate agents and the state, which acts in some episodes of training.

    Q* learns from the same replay, and bootstraps from the joint action that coordinate ascent finds. Evaluation and
    saved policies play the independent agents alone. Parameters: ``{"agent", "q_star_agent", "q_star_mixer"}``.

    Attributes:
        central_share: the probability that Q*'s joint actions are played throughout a training episode, with the same
            exploration as the agents'.
        ascent_sweeps: how often each agent in turn takes its best action given those of the others, from the
            independent agents' greedy actions on.
        q_star_dim: width of Q*'s mixing layers.
        epsilon_start: as in every algorithm, but above 0, which marks evaluation.
        epsilon_finish: the same.
    """

    central_share: Fraction
    ascent_sweeps: PositiveInt
    q_star_dim: PositiveInt
    epsilon_start: PositiveFraction
    epsilon_finish: PositiveFraction
    acts_on_state = True

    @property
    def q_star_net(self) -> FeedForwardQStar:
        """Q*'s mixer as a flax module."""
        return FeedForwardQStar(self.q_star_dim)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of the agents and of Q*'s nets."""
        keys = jax.random.split(key, 3)
        central = {"q_star_agent": self.init_agents(keys[1], env_spec)}
        central["q_star_mixer"] = init_central(self.q_star_net, keys[2], env_spec)
        return super().init(keys[0], env_spec) | central

    def initial_carry(self, batch_shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Returns the hidden states of the agents and of Q*'s agents, each ``[.., N, H]``."""
        return self.initial_hiddens(batch_shape), self.initial_hiddens(batch_shape)

    def draw_latent(self, params: PyTree, state: Array, hp: Hyperparams, ctx: Context, key: PRNGKey) -> Array:
        """Draws whether Q* plays each episode, ``[..]`` bool; never in evaluation."""
        del params
        return jax.random.bernoulli(key, hp.central_share, state.shape[:-1]) & (ctx.epsilon > 0)

    def act_with_noise(  # type: ignore[override]
        self,
        params: PyTree,
        carry: tuple[Array, Array],
        inputs: AgentInputs,
        hp: Hyperparams,
        ctx: Context,
        noise: PyTree,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Explores around the agents' or Q*'s joint action; see `Algorithm.act_with_noise`."""
        del hp
        own, central = carry
        own, agent_qs = self.step(params["agent"], own, inputs)
        if "q_star_agent" in params:  # among all parameters, not among those that playing needs
            central, central_qs = self.step(params["q_star_agent"], central, inputs)
            greedy = greedy_actions(agent_qs, inputs.avail_actions)
            best = self.maximiser(params, central_qs, greedy, inputs.state, inputs.avail_actions)
            central_choice = jax.nn.one_hot(best, agent_qs.shape[-1], dtype=agent_qs.dtype)
            agent_qs = jnp.where(inputs.latent[..., None, None], central_choice, agent_qs)
        return explore(noise, agent_qs, inputs.avail_actions, ctx.epsilon), (own, central)

    def maximiser(self, params: PyTree, central_qs: Array, start: Array, state: Array, avail_actions: Array) -> Array:
        """Returns the joint action that coordinate ascent on Q* finds from ``start``, both ``[.., N]``.

        Args:
            params: with ``q_star_mixer``.
            central_qs: ``[.., N, A]``, the utilities of Q*'s agents.
            start: ``[.., N]``.
            state: ``[.., D]``.
            avail_actions: ``[.., N, A]`` bool.
        """

        def values(agent: Array, joint_action: Array) -> Array:
            inputs = agent, central_qs, gather_actions(central_qs, joint_action), state
            return apply_net(self.q_star_net, params["q_star_mixer"], *inputs, method="deviations_of")

        return coordinate_ascent(values, start, avail_actions, self.ascent_sweeps)

    def q_star(self, params: PyTree, central_qs: Array, joint_action: Array, state: Array) -> Array:
        """Returns Q*(s, u), ``[..]``; arguments as in `maximiser`."""
        return apply_net(self.q_star_net, params["q_star_mixer"], gather_actions(central_qs, joint_action), state)

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the loss of the agents, see `IQL.loss`, plus the mean square TD error of Q*."""
        del ctx, noise
        trained, frozen = ([tree["agent"], tree["q_star_agent"]] for tree in (params, target))
        agent_qs, central_qs, target_qs, delayed_qs = (
            net.utilities for net in self.unroll_nets(batch, trained, frozen)
        )
        agents_loss, aux = self.agents_loss(batch, hp, agent_qs, target_qs)
        choosing = jax.lax.stop_gradient((params, central_qs) if self.double_q else (target, delayed_qs))
        best = self.maximiser(
            *choosing, greedy_actions(agent_qs, batch.avail_actions), batch.state, batch.avail_actions
        )

        def value(joint_action: Array) -> Array:
            return self.q_star(target, delayed_qs[:, :-1], joint_action, batch.state[:, :-1])

        next_value = self.q_star(target, delayed_qs[:, 1:], self.next_actions(best, batch), batch.state[:, 1:])
        y = self.td_targets(batch, hp, next_value, self.correction(batch, best, value))
        q_star = self.q_star(params, central_qs[:, :-1], batch.joint_action, batch.state[:, :-1])
        q_star_loss = masked_mean_square(q_star - y, batch.mask, batch.importance)
        loss = agents_loss + q_star_loss
        metrics = {"loss": loss, "agents_loss": agents_loss, "q_star_loss": q_star_loss}
        metrics |= {"q_star_mean": masked_mean(q_star, batch.mask)}
        return loss, Aux(aux.metrics | metrics, aux.values | {"q_star": q_star, "q_star_target": y, "maximiser": best})
