"""Multi-agent soft actor-critic for discrete actions (``src/learners/max_q_learner_sac.py`` of the authors' code).

Soft actor-critic (Haarnoja et al., arXiv 1801.01290) with the central critic of Iqbal and Sha (arXiv 1810.02912) built
as Q* is; appendix B of the paper.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from pydantic import Field

from wqmix_jax.algos.actor_critic import ActorCritic
from wqmix_jax.algos.base import TRACED, AgentInputs, Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.q_learning import gather_actions
from wqmix_jax.ops.action_selection import draw, draw_or_best, epsilon_floor
from wqmix_jax.ops.td import masked_mean, masked_mean_square, td_target
from wqmix_jax.options import options
from wqmix_jax.types import Array, Episode, PRNGKey, PyTree

Floor = Annotated[float, Field(gt=0, le=1), TRACED]
"""The type of an epsilon floor, which must be positive: epsilon = 0 marks evaluation."""


class Noise(NamedTuple):
    """Standard Gumbel noise of the draws from two policies.

    Attributes:
        online: ``[B, T+1, N, A]``, for the actors' draws.
        target: ``[B, T+1, N, A]``, for the draws of their target copies.
    """

    online: Array
    target: Array


@options
class MASAC(ActorCritic):
    """The actors' outputs are logits of a policy with an epsilon floor; epsilon is that floor, not a chance to explore.

    Attributes:
        alpha_ent: the entropy's weight against the reward (the authors' ``entropy_temp``).
        epsilon_start: the actors' floor at the start, and the target policy's for ever.
        epsilon_finish: the actors' floor after ``epsilon_anneal_steps``.
    """

    alpha_ent: Annotated[float, Field(ge=0), TRACED]
    epsilon_start: Floor
    epsilon_finish: Floor

    def sample_act_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Draws standard Gumbel noise, ``[.., N, A]``."""
        return jax.random.gumbel(key, shape)

    def act_with_noise(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, noise: Array
    ) -> tuple[Array, Array]:
        """Draws from the policy; in evaluation takes the likeliest available action, as the authors do."""
        carry, logits = self.step(params["agent"], carry, inputs)
        return draw_or_best(logits, inputs.avail_actions, ctx.epsilon, noise), carry

    def sample_noise(self, key: PRNGKey, batch: Episode) -> Noise:
        """Draws Gumbel noise for the draws of both policies."""
        online_key, target_key = jax.random.split(key)
        shape = batch.avail_actions.shape
        return Noise(jax.random.gumbel(online_key, shape), jax.random.gumbel(target_key, shape))

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: Noise
    ) -> tuple[Array, Aux]:
        """Returns the critic's mean square error, plus the actors' divergence from the critic's exponential.

        The target's policy keeps the first floor: in the authors' code its copy of the schedule never advances.
        """
        trained, frozen = ([tree["agent"], tree["q_star_agent"]] for tree in (params, target))
        nets = self.unroll_nets(batch, trained, frozen)
        logits, critic_qs, target_logits, target_qs = (net.utilities for net in nets)
        policy = epsilon_floor(logits, batch.avail_actions, ctx.epsilon)
        target_policy = epsilon_floor(target_logits, batch.avail_actions, hp.epsilon_start)
        drawn, target_drawn = draw(policy, noise.online), draw(target_policy, noise.target)
        # The soft value: the target critic's, of a drawn joint action, minus alpha_ent times its log-probability.
        next_q = self.critic_values(target["q_star_mixer"], target_qs[:, 1:], target_drawn[:, 1:], batch.state[:, 1:])
        target_log_probs = jnp.log(gather_actions(target_policy, target_drawn)).sum(-1)
        next_value = next_q - hp.alpha_ent * target_log_probs[:, 1:]
        y = jax.lax.stop_gradient(td_target(batch.reward, batch.discount, hp.gamma, next_value))
        # The critic learns the value of the joint action taken; the actors, that of the one just drawn from them.
        critic_qs, state = critic_qs[:, :-1], batch.state[:, :-1]
        q_star, drawn_q = (
            self.critic_values(params["q_star_mixer"], critic_qs, joint_action, state)
            for joint_action in (batch.joint_action, drawn[:, :-1])
        )
        q_star_loss = masked_mean_square(q_star - y, batch.mask)
        log_probs = jnp.log(gather_actions(policy, drawn))[:, :-1]
        actor_loss = _divergence(log_probs, drawn_q, batch.mask, hp.alpha_ent)
        loss = q_star_loss + actor_loss
        metrics = {
            "loss": loss,
            "actor_loss": actor_loss,
            "q_star_loss": q_star_loss,
            "q_star_mean": masked_mean(q_star, batch.mask),
            "td_target_mean": masked_mean(y, batch.mask),
            "policy_entropy": masked_mean(entr(policy).sum((-2, -1))[:, :-1], batch.mask),
        }
        values = {"policy": policy, "target_policy": target_policy, "drawn": drawn, "target_drawn": target_drawn}
        values |= {"q_star": q_star, "td_target": y, "next_value": next_q, "target_log_probs": target_log_probs}
        return loss, Aux(metrics, values | {"drawn_q_star": drawn_q, "log_probs": log_probs})


def _divergence(log_probs: Array, drawn_q: Array, mask: Array, alpha_ent: Array) -> Array:
    """Returns a loss that falls as each policy nears exp(Q / alpha_ent): the mean over real steps and agents.

    Its gradient is the score function's, from one draw of all agents: that of sum_u pi(u) (alpha_ent log pi(u) - Q).

    Args:
        log_probs: ``[B, T, N]``, of each agent's drawn action.
        drawn_q: ``[B, T]``, the critic's value of the drawn joint action, a constant here.
        mask: ``[B, T]``.
        alpha_ent: scalar.
    """
    # The critic's value is common to the agents: each gets the same return and its own log-probability.
    cost = jax.lax.stop_gradient(alpha_ent * (log_probs + 1) - drawn_q[..., None])
    return masked_mean(log_probs * cost, jnp.broadcast_to(mask[..., None], log_probs.shape))
