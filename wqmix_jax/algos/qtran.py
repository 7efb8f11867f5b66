"""QTRAN-base (Son et al., arXiv 1905.05408; ``src/learners/qtran_learner.py`` of the authors' code).

Seen as a Weighted QMIX (section 6 of the paper): Q_tot is the sum of the utilities plus V(s), Q* a joint network on the
agents' hidden states, and Q_tot learns from Q* at two joint actions of each state, the greedy one and the one taken,
with the weights of eq. 11.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from pydantic import Field

from wqmix_jax.algos.base import TRACED, Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.q_learning import TDLearner, gather_actions, seen_after, seen_before
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.qtran import JointValue, QTRANJoint
from wqmix_jax.ops import weighting
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, Observation, PRNGKey, PyTree

Weight = Annotated[float, Field(ge=0), TRACED]


@options
class QTRAN(TDLearner):
    """Parameters ``{"agent", "mixer"}``, the mixer being the joint network.

    Attributes:
        lambda_opt: weight of the loss at the greedy joint action.
        lambda_nopt: weight of the loss where the joint action taken is underestimated.
        mixer_embed_dim: width of the joint network.
        mixer_layers: its hidden layers.
    """

    lambda_opt: Weight
    lambda_nopt: Weight
    mixer_embed_dim: PositiveInt
    mixer_layers: PositiveInt

    @property
    def joint_net(self) -> QTRANJoint:
        """The joint network as a flax module."""
        return QTRANJoint(self.mixer_embed_dim, self.mixer_layers)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of agent and joint network."""
        agent_key, joint_key = jax.random.split(key)
        hidden = jnp.zeros((env_spec.num_agents, self.hidden_dim))
        actions, state = jnp.zeros((env_spec.num_agents, env_spec.num_actions)), jnp.zeros(env_spec.state_dim)
        mixer = init_net(self.joint_net, joint_key, hidden, actions, state)
        return super().init(agent_key, env_spec) | {"mixer": mixer}

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the TD loss of Q* plus the weighted losses of Q_tot at the greedy and at the taken joint action.

        The gradient reaches the agents through their hidden states, too; to Q_tot's losses Q* is a constant.
        """
        del ctx, noise
        nets = self.unroll_nets(batch, [params["agent"]], [target["agent"]], keeps_hiddens=True)
        (hidden, agent_qs), (target_hidden, target_qs) = nets
        assert hidden is not None
        assert target_hidden is not None
        greedy = greedy_actions(agent_qs, batch.avail_actions)
        before, after = seen_before(batch), seen_after(batch)
        taken = self.joint_value(params["mixer"], hidden[:, :-1], batch.joint_action, before)
        best = self.joint_value(params["mixer"], hidden[:, :-1], greedy[:, :-1], before)
        to_bootstrap = self.greedy_to_bootstrap(agent_qs, target_qs, batch)
        next_actions = self.next_actions(to_bootstrap, batch)
        following = self.joint_value(target["mixer"], target_hidden[:, 1:], next_actions, after)

        def value(joint_action: Array) -> Array:
            return self.joint_value(target["mixer"], target_hidden[:, :-1], joint_action, before).q

        y = self.td_targets(batch, hp, following.q, self.correction(batch, to_bootstrap, value))

        # Q_tot is the sum of utilities plus V(s), and learns from Q*, a constant here, at two joint actions. If the one
        # taken is overestimated, `optimistic` with alpha = 0 leaves it alone.
        chosen_qs = gather_actions(agent_qs[:, :-1], batch.joint_action)
        greedy_qs = gather_actions(agent_qs[:, :-1], greedy[:, :-1])
        td_error = taken.q - y
        opt_error = greedy_qs.sum(-1) + taken.v - jax.lax.stop_gradient(best.q)
        nopt_error = chosen_qs.sum(-1) + taken.v - jax.lax.stop_gradient(taken.q)
        importance, is_under = batch.importance, weighting.optimistic(nopt_error, jnp.zeros(()))
        losses = {
            "td_loss": masked_mean_square(td_error, batch.mask, importance),
            "opt_loss": masked_mean_square(opt_error, batch.mask, importance),
            "nopt_loss": masked_mean_square(
                nopt_error, batch.mask, is_under if importance is None else is_under * importance
            ),
        }
        loss = losses["td_loss"] + hp.lambda_opt * losses["opt_loss"] + hp.lambda_nopt * losses["nopt_loss"]

        # Only for the log: the weights of eq. 11 that these two losses amount to.
        is_greedy = (batch.joint_action == greedy[:, :-1]).all(-1)
        values = {"agent_qs": agent_qs, "greedy_actions": greedy, "hidden": hidden, "target_hidden": target_hidden}
        values |= {"chosen_qs": chosen_qs, "greedy_qs": greedy_qs, "q_tot": chosen_qs.sum(-1) + taken.v}
        values |= {"q_star": taken.q, "greedy_q_star": best.q, "v": taken.v, "next_v": following.v}
        values |= {"td_target": y, "next_value": following.q, "td_error": td_error}
        values |= {"opt_error": opt_error, "nopt_error": nopt_error}
        values |= {"weights": weighting.qtran(is_greedy, nopt_error, hp.lambda_opt, hp.lambda_nopt)}
        logged = {"q_tot": "q_tot", "q_star": "q_star", "td_target": "td_target", "weight": "weights"}
        means = {f"{name}_mean": masked_mean(values[value], batch.mask) for name, value in logged.items()}
        return loss, Aux({"loss": loss} | losses | means, values)

    def joint_value(self, joint_params: PyTree, hidden: Array, joint_action: Array, seen: Observation) -> JointValue:
        """Returns the joint network's values of ``joint_action`` ``[.., N]`` at the hidden states ``[.., N, H]``."""
        actions = jax.nn.one_hot(joint_action, seen.avail_actions.shape[-1], dtype=hidden.dtype)
        return apply_net(self.joint_net, joint_params, hidden, actions, seen.state)
