"""Value factorisation: a mixer makes Q_tot of the utilities (``src/learners/q_learner.py`` of the authors' code)."""

import abc

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.q_learning import TDLearner, seen_after, seen_before
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Episode, Observation, PRNGKey, PyTree


@options
class FactoredQLearner(TDLearner):
    """A learner whose mixer joins the utilities to Q_tot, which learns the double-Q target of the paper's eq. 3.

    Parameters: ``{"agent", "mixer"}``.
    """

    @property
    @abc.abstractmethod
    def mixer_net(self) -> nn.Module:
        """The mixer as a flax module."""

    @abc.abstractmethod
    def mixer_inputs(self, agent_qs: Array, joint_action: Array, seen: Observation) -> tuple[Array, ...]:
        """Returns the inputs of the mixer.

        Args:
            agent_qs: ``[.., N, A]``.
            joint_action: ``[.., N]``, the joint action whose value is computed.
            seen: leaves ``[.., ..]``, the observations of the same steps.
        """

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of agent and mixer."""
        agent_key, mixer_key = jax.random.split(key)
        num_agents, num_actions = env_spec.num_agents, env_spec.num_actions
        seen = Observation(
            obs=jnp.zeros((1, num_agents, env_spec.obs_dim)),
            state=jnp.zeros((1, env_spec.state_dim)),
            avail_actions=jnp.ones((1, num_agents, num_actions), bool),
        )
        agent_qs, joint_action = jnp.zeros((1, num_agents, num_actions)), jnp.zeros((1, num_agents), jnp.int32)
        mixer = init_net(self.mixer_net, mixer_key, *self.mixer_inputs(agent_qs, joint_action, seen))
        # A mixer without parameters, VDN's, is an empty tree.
        return super().init(agent_key, env_spec) | {"mixer": mixer}

    def mix(
        self, mixer_params: PyTree, agent_qs: Array, joint_action: Array, seen: Observation
    ) -> tuple[Array, dict[str, Array]]:
        """Returns Q_tot of a joint action, ``[..]``, and its terms by name; arguments as in `mixer_inputs`."""
        return apply_net(self.mixer_net, mixer_params, *self.mixer_inputs(agent_qs, joint_action, seen)), {}

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the mean square TD error of Q_tot."""
        del ctx, noise
        online, delayed = self.unroll_nets(batch, [params["agent"]], [target["agent"]])
        return self.td_loss(params, target, batch, hp, online.utilities, delayed.utilities)

    def td_loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, agent_qs: Array, target_qs: Array
    ) -> tuple[Array, Aux]:
        """Returns `loss` for given utilities ``[B, T+1, N, A]`` of the online and the target agents."""
        greedy = greedy_actions(agent_qs, batch.avail_actions)
        q_tot, parts = self.mix(params["mixer"], agent_qs[:, :-1], batch.joint_action, seen_before(batch))
        # Double Q-learning: the online agents choose the next joint action, the target nets say its value.
        to_bootstrap = self.greedy_to_bootstrap(agent_qs, target_qs, batch)
        next_actions = self.next_actions(to_bootstrap, batch)
        next_q, next_parts = self.mix(target["mixer"], target_qs[:, 1:], next_actions, seen_after(batch))

        def value(joint_action: Array) -> Array:
            return self.mix(target["mixer"], target_qs[:, :-1], joint_action, seen_before(batch))[0]

        y = self.td_targets(batch, hp, next_q, self.correction(batch, to_bootstrap, value))
        loss = masked_mean_square(q_tot - y, batch.mask, batch.importance)
        metrics = {
            "loss": loss,
            "q_tot_mean": masked_mean(q_tot, batch.mask),
            "td_target_mean": masked_mean(y, batch.mask),
        }
        values = {"agent_qs": agent_qs, "greedy_actions": greedy, "q_tot": q_tot}
        values |= {"td_target": y, "next_value": next_q, "td_error": q_tot - y}
        values |= parts | {f"next_{name}": part for name, part in next_parts.items()}
        return loss, Aux(metrics, values)
