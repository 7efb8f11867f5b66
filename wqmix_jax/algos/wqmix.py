"""Weighted QMIX: a weighting of the joint actions and an unrestricted central estimate Q*, independent of each other.

OW- and CW-QMIX have both; the paper's ablations (appendix C) leave one out. ``src/learners/max_q_learner.py`` and,
without Q*, ``src/learners/w_q_learner.py`` of the authors' code.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, Context, Hyperparams, PositiveFraction, mean_over_steps
from wqmix_jax.algos.q_learning import gather_actions, init_central, seen_after, seen_before
from wqmix_jax.algos.qmix import QMIX
from wqmix_jax.networks.functional import apply_net
from wqmix_jax.networks.q_star import AttentionQStar, FeedForwardQStar
from wqmix_jax.ops import weighting
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, Observation, PRNGKey, PyTree


class Bootstrap(NamedTuple):
    """The central estimate under the target nets.

    Attributes:
        td_target: ``[B, T]``, y.
        greedy_value: ``[B, T]``, of the greedy joint action at the state that the action was taken in.
        next_value: ``[B, T]``, of `TDLearner.next_actions` at the state after it.
    """

    td_target: Array
    greedy_value: Array
    next_value: Array


@options
class WQMIX(QMIX):
    """Weighted QMIX: QMIX with a weighting of its loss and an optional ``Q*``.

    Parameters: those of QMIX plus, with a ``Q*``, ``{"q_star_agent", "q_star_mixer"}``.

    Attributes:
        weighting: ``optimistic`` (OW, eq. 5), ``central`` (CW, eq. 10) or ``uniform`` (none).
        alpha: the weight of joint actions that the weighting does not set to 1.
        q_star: the central estimate that targets and CW read: ``feedforward`` (figure 1), ``attention`` (figure 6) or
            ``none``, which takes the target Q_tot.
        q_star_dim: width of Q*'s mixing layers.
    """

    weighting: Literal["optimistic", "central", "uniform"]
    alpha: PositiveFraction
    q_star: Literal["feedforward", "attention", "none"]
    q_star_dim: PositiveInt

    @property
    def q_star_net(self) -> nn.Module:
        """Q*'s mixer as a flax module."""
        if self.q_star == "attention":
            return AttentionQStar(self.q_star_dim, self.hypernet_dim)
        return FeedForwardQStar(self.q_star_dim)

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        unused = super().without_effect()
        if self.weighting == "uniform":
            unused |= {"alpha": "algo.weighting=uniform"}
        if self.q_star == "none":
            unused |= {"q_star_dim": "algo.q_star=none"}
        elif self.q_star == "attention":
            unused.pop("hypernet_dim", None)  # its hypernetwork has this width, too
        return unused

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of QMIX's nets and of Q*'s."""
        qmix_key, agent_key, mixer_key = jax.random.split(key, 3)
        params = super().init(qmix_key, env_spec)
        if self.q_star == "none":
            return params
        return params | {
            "q_star_agent": self.init_agents(agent_key, env_spec),
            "q_star_mixer": init_central(self.q_star_net, mixer_key, env_spec),
        }

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the weighted loss of Q_tot (eq. 8) plus, with a Q*, its own unweighted loss (eq. 9)."""
        del ctx, noise
        agent_qs, central_qs, target_qs, choosing_qs = self._utilities(params, target, batch)
        greedy = greedy_actions(agent_qs, batch.avail_actions)
        to_bootstrap = self.greedy_to_bootstrap(agent_qs, choosing_qs, batch)
        q_tot, _ = self.mix(params["mixer"], agent_qs[:, :-1], batch.joint_action, seen_before(batch))
        bootstrap = self._bootstrap(target, target_qs, batch, greedy, to_bootstrap, hp)
        y = bootstrap.td_target
        # The paper's td_error is Q_tot - y: negative where Q_tot underestimates.
        weights = self._weights(q_tot - y, y, greedy, bootstrap, batch, hp)
        both = weights if batch.importance is None else weights * batch.importance
        qmix_loss = masked_mean_square(q_tot - y, batch.mask, both)
        metrics = {
            "loss": qmix_loss,
            "q_tot_mean": masked_mean(q_tot, batch.mask),
            "td_target_mean": masked_mean(y, batch.mask),
            "weight_mean": masked_mean(weights, batch.mask),
        }
        values = {"agent_qs": agent_qs, "greedy_actions": greedy, "q_tot": q_tot, "td_target": y}
        values |= {
            "td_error": q_tot - y,
            "weights": weights,
            "next_value": bootstrap.next_value,
            "greedy_value": bootstrap.greedy_value,
        }
        if self.q_star == "none":
            return qmix_loss, Aux(metrics, values)
        # Q* learns the same target, unweighted, from separate agents with separate parameters: no gradient of this loss
        # reaches the utilities, and none of the weighted loss reaches Q*.
        q_star = self.central_estimate(params, central_qs[:, :-1], batch.joint_action, seen_before(batch))
        q_star_loss = masked_mean_square(q_star - y, batch.mask, batch.importance)
        loss = qmix_loss + q_star_loss
        metrics |= {"loss": loss, "qmix_loss": qmix_loss, "q_star_loss": q_star_loss}
        return loss, Aux(metrics, values | {"q_star": q_star})

    def central_estimate(self, params: PyTree, agent_qs: Array, joint_action: Array, seen: Observation) -> Array:
        """Returns ``Q*(s, u)``, or ``Q_tot`` without a ``Q*``, ``[..]``; see `FactoredQLearner.mixer_inputs`."""
        if self.q_star == "none":
            return self.mix(params["mixer"], agent_qs, joint_action, seen)[0]
        chosen_qs = gather_actions(agent_qs, joint_action)
        return apply_net(self.q_star_net, params["q_star_mixer"], chosen_qs, seen.state)

    def _utilities(self, params: PyTree, target: PyTree, batch: Episode, *more: PyTree) -> tuple[Array, ...]:
        """Returns the utilities of four kinds of agents and, after them, of ``more``, all ``[B, T+1, N, A]``.

        Those of the agents, those of Q*'s, those of the target that bootstrap, and those of the target that choose what
        to bootstrap from. Without a Q* the second are the first, and the target's are those of the agents' copy. With a
        Q* the last are needed without double Q-learning alone; with it they are the first.
        """
        if self.q_star == "none":
            trained = [params["agent"], *more]
            *nets, delayed = [net.utilities for net in self.unroll_nets(batch, trained, [target["agent"]])]
            return nets[0], nets[0], delayed, delayed, *nets[1:]
        trained = [params["agent"], params["q_star_agent"], *more]
        frozen = [target["q_star_agent"]] if self.double_q else [target["q_star_agent"], target["agent"]]
        nets = [net.utilities for net in self.unroll_nets(batch, trained, frozen)]
        online, central, delayed = nets[0], nets[1], nets[len(trained)]
        return online, central, delayed, online if self.double_q else nets[-1], *nets[2 : len(trained)]

    def _bootstrap(
        self, target: PyTree, agent_qs: Array, batch: Episode, greedy: Array, to_bootstrap: Array, hp: Hyperparams
    ) -> Bootstrap:
        """Returns y, and the target nets' central estimate at the greedy actions and at those to bootstrap from.

        With a Q* and double Q-learning the target copies of the agent and the mixer never enter the loss.
        """
        # With q_star="none", an ablation of appendix C, the central estimate is the target Q_tot itself: then this is
        # QMIX's double-Q target, and CW compares with Q_tot.
        #
        # ``greedy_value`` is needed at the first T steps and ``next_value`` at the last T. One call at all T+1 gives
        # both where both are of the online agents' greedy actions. SARSA(lambda) bootstraps from the actions taken, and
        # needs a second call for ``next_value``; ``greedy_value`` stays at the greedy actions: eq. 10 compares y with
        # them.
        seen = Observation(batch.obs, batch.state, batch.avail_actions)
        estimate = jax.lax.stop_gradient(self.central_estimate(target, agent_qs, greedy, seen))
        following = estimate[:, 1:]
        if self.returns == "sarsa_lambda" or not self.double_q:
            next_actions = self.next_actions(to_bootstrap, batch)
            following = self.central_estimate(target, agent_qs[:, 1:], next_actions, seen_after(batch))

        greedy_value = estimate[:, :-1]

        def value(joint_action: Array) -> Array:
            return self.central_estimate(target, agent_qs[:, :-1], joint_action, seen_before(batch))

        y = self.td_targets(batch, hp, following, self.correction(batch, to_bootstrap, value))
        return Bootstrap(td_target=y, greedy_value=greedy_value, next_value=following)

    def _weights(
        self, td_error: Array, y: Array, greedy: Array, bootstrap: Bootstrap, batch: Episode, hp: Hyperparams
    ) -> Array:
        if self.weighting == "uniform":
            return jnp.ones_like(y)
        if self.weighting == "optimistic":
            return jax.lax.stop_gradient(weighting.optimistic(td_error, hp.alpha))
        # A joint action is greedy if every agent took its greedy action: [B, T, N] -> [B, T].
        is_greedy = (batch.joint_action == greedy[:, :-1]).all(-1)
        return weighting.central(is_greedy, y, bootstrap.greedy_value, hp.alpha)
