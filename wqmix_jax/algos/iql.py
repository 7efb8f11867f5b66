"""Independent Q-learning with shared recurrent agents (Tan 1993; ``src/learners/q_learner.py`` without a mixer)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, Context, Hyperparams, PositiveFraction, mean_over_steps
from wqmix_jax.algos.q_learning import TDLearner, gather_actions
from wqmix_jax.ops import weighting
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import options
from wqmix_jax.types import Array, Episode, PyTree


@options
class IQL(TDLearner):
    """Every agent learns its own double-Q target from the shared reward.

    Attributes:
        weighting: ``uniform``, or ``optimistic``: hysteretic Q-learning (Matignon et al. 2007; with recurrent agents
            Omidshafiei et al., arXiv 1703.06182), which learns less from a target below the utility.
        alpha: ratio of the lower to the higher learning rate.
    """

    weighting: Literal["uniform", "optimistic"]
    alpha: PositiveFraction

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        unused = {"alpha": "algo.weighting=uniform"} if self.weighting == "uniform" else {}
        return super().without_effect() | unused

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the mean square TD error over steps and agents, weighted unless ``weighting`` is uniform."""
        del ctx, noise
        online, delayed = self.unroll_nets(batch, [params["agent"]], [target["agent"]])
        return self.agents_loss(batch, hp, online.utilities, delayed.utilities)

    def agents_loss(self, batch: Episode, hp: Hyperparams, agent_qs: Array, target_qs: Array) -> tuple[Array, Aux]:
        """Returns `loss` for given utilities ``[B, T+1, N, A]`` of the online and the target agents."""
        chosen_qs = gather_actions(agent_qs[:, :-1], batch.joint_action)
        greedy = self.greedy_to_bootstrap(agent_qs, target_qs, batch)
        next_qs = gather_actions(target_qs[:, 1:], self.next_actions(greedy, batch))
        value = functools.partial(gather_actions, target_qs[:, :-1])
        y = self.td_targets(batch, hp, next_qs, self.correction(batch, greedy, value))
        # Every agent counts: the mask of steps, repeated per agent, [B, T, N].
        mask = jnp.broadcast_to(batch.mask[..., None], chosen_qs.shape)
        td_error = chosen_qs - y
        metrics = {"chosen_q_mean": masked_mean(chosen_qs, mask), "td_target_mean": masked_mean(y, mask)}
        values = {"agent_qs": agent_qs, "chosen_qs": chosen_qs}
        values |= {"td_target": y, "next_value": next_qs, "td_error": td_error}
        importance = None if batch.importance is None else jnp.broadcast_to(batch.importance[..., None], mask.shape)
        if self.weighting == "uniform":
            loss = masked_mean_square(td_error, mask, importance)
            return loss, Aux({"loss": loss, **metrics}, values)
        weights = jax.lax.stop_gradient(weighting.optimistic(td_error, hp.alpha))
        loss = masked_mean_square(td_error, mask, weights if importance is None else weights * importance)
        weight_mean = masked_mean(weights, mask)
        return loss, Aux({"loss": loss, **metrics, "weight_mean": weight_mean}, values | {"weights": weights})
