"""MADDPG with one central critic (Lowe et al., arXiv 1706.02275; ``src/learners/max_q_learner_ddpg.py``).

Every agent follows the deterministic policy gradient through the Gumbel-softmax (appendix B of the paper).
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from wqmix_jax.algos.actor_critic import ActorCritic
from wqmix_jax.algos.base import Aux, Context, Hyperparams, PositiveFloat, mean_over_steps
from wqmix_jax.ops.action_selection import greedy_actions, straight_through
from wqmix_jax.ops.td import masked_mean, masked_mean_square, td_target
from wqmix_jax.options import options
from wqmix_jax.types import Array, Episode, PRNGKey, PyTree


@options
class MADDPG(ActorCritic):
    """The actors' outputs are logits; they act on them epsilon-greedily, and greedily in evaluation.

    Attributes:
        gumbel_temperature: temperature of the softmax whose gradient replaces that of the draw.
    """

    gumbel_temperature: PositiveFloat

    def sample_noise(self, key: PRNGKey, batch: Episode) -> Array:
        """Draws standard Gumbel noise for the actors' draws, ``[B, T, N, A]``."""
        return jax.random.gumbel(key, batch.avail_actions[:, :-1].shape)

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: Array
    ) -> tuple[Array, Aux]:
        """Returns the critic's mean square TD error minus the target critic's value of the actors' draws.

        The target bootstraps from the online actors' greedy joint action.
        """
        del ctx
        nets = self.unroll_nets(batch, [params["agent"], params["q_star_agent"]], [target["q_star_agent"]])
        logits, critic_qs, target_qs = (net.utilities for net in nets)
        greedy = greedy_actions(logits, batch.avail_actions)
        next_q = self.critic_values(target["q_star_mixer"], target_qs[:, 1:], greedy[:, 1:], batch.state[:, 1:])
        y = jax.lax.stop_gradient(td_target(batch.reward, batch.discount, hp.gamma, next_q))
        q_star = self.critic_values(params["q_star_mixer"], critic_qs[:, :-1], batch.joint_action, batch.state[:, :-1])
        q_star_loss = masked_mean_square(q_star - y, batch.mask)
        # [B, T, N, A]: the worth of each action of each agent, when the others play greedily.
        worth = self.deviations(target["q_star_mixer"], target_qs[:, :-1], greedy[:, :-1], batch.state[:, :-1])
        objectives = self._objectives(logits[:, :-1], worth, batch, hp, noise)
        actor_loss = -objectives.sum()
        loss = q_star_loss + actor_loss
        metrics = {
            "loss": loss,
            "actor_loss": actor_loss,
            "q_star_loss": q_star_loss,
            "q_star_mean": masked_mean(q_star, batch.mask),
            "td_target_mean": masked_mean(y, batch.mask),
            "logit_entropy": masked_mean(_logit_entropy(logits[:, :-1], batch.avail_actions[:, :-1]), batch.mask),
        }
        values = {"agent_qs": logits, "greedy_actions": greedy, "q_star": q_star, "td_target": y, "next_value": next_q}
        return loss, Aux(metrics, values | {"objectives": objectives})

    def _objectives(self, logits: Array, worth: Array, batch: Episode, hp: Hyperparams, noise: Array) -> Array:
        """Returns the value of each agent's draw if the others stay greedy, the mean over real steps: ``[N]``.

        Unavailable actions can be drawn, and then have value 0: the authors multiply by the availability.
        """
        # [B, T, N, A] one-hot, through which the gradient reaches the logits; `worth` is a constant.
        drawn = straight_through(logits, noise, hp.gumbel_temperature)
        allowed = jnp.where(batch.avail_actions[:, :-1], jax.lax.stop_gradient(worth), 0)
        value = (drawn * allowed).sum(-1)
        return jax.vmap(masked_mean, in_axes=(-1, None))(value, batch.mask)


def _logit_entropy(logits: Array, avail_actions: Array) -> Array:
    """Returns -sum p log p of the logits' softmax over available actions and agents, not renormalised: ``[B, T]``."""
    return jnp.where(avail_actions, entr(jax.nn.softmax(logits)), 0).sum((-2, -1))
