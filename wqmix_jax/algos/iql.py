"""Independent Q-learning with shared recurrent agents (Tan 1993; ``src/learners/q_learner.py`` without a mixer)."""

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, Context, Hyperparams
from wqmix_jax.algos.q_learning import QLearner, gather_actions, greedy_actions
from wqmix_jax.config import options
from wqmix_jax.td import masked_mean, masked_mean_square, td_target
from wqmix_jax.types import Array, Episode, PyTree


@options
class IQL(QLearner):
    """Every agent learns its own double-Q target from the shared reward."""

    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Mean square TD error over steps and agents."""
        del ctx, noise
        agent_qs = self.unroll(params["agent"], batch)
        chosen_qs = gather_actions(agent_qs[:, :-1], batch.joint_action)
        next_actions = greedy_actions(agent_qs, batch.avail_actions)[:, 1:]
        next_qs = gather_actions(self.unroll(target["agent"], batch)[:, 1:], next_actions)
        y = jax.lax.stop_gradient(td_target(batch.reward[..., None], batch.discount[..., None], hp.gamma, next_qs))
        mask = jnp.broadcast_to(batch.mask[..., None], chosen_qs.shape)
        td_error = chosen_qs - y
        loss = masked_mean_square(td_error, mask)
        metrics = {
            "loss": loss,
            "chosen_q_mean": masked_mean(chosen_qs, mask),
            "td_target_mean": masked_mean(y, mask),
        }
        values = {"agent_qs": agent_qs, "chosen_qs": chosen_qs}
        values |= {"td_target": y, "next_value": next_qs, "td_error": td_error}
        return loss, Aux(metrics, values)
