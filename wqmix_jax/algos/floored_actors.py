"""The base of on-policy algorithms whose actors follow a policy with a floor, which epsilon is: COMA and LIIR."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import AgentInputs, Context, Fraction, Hyperparams, PositiveFraction
from wqmix_jax.algos.q_learning import QLearner, is_followed
from wqmix_jax.ops.action_selection import draw, draw_or_best, epsilon_floor
from wqmix_jax.ops.td import lambda_return
from wqmix_jax.options import options
from wqmix_jax.types import Array, Episode, PRNGKey, PyTree


@options
class FlooredActors(QLearner):
    """Decentralised actors, ``{"agent": ..}``, whose outputs are logits of a policy with a floor.

    Attributes:
        td_lambda: lambda of `returns`.
        epsilon_start: the floor at the start.
        epsilon_finish: the floor after ``epsilon_anneal_steps``.
    """

    td_lambda: Fraction
    epsilon_start: PositiveFraction
    epsilon_finish: PositiveFraction

    is_on_policy: ClassVar[bool] = True

    @property
    def head_gain(self) -> float:
        """See `QLearner.head_gain`: actors start nearly uniform."""
        return 0.01

    def sample_act_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Array:
        """Draws standard Gumbel noise, ``[.., N, A]``."""
        return jax.random.gumbel(key, shape)

    def act_with_noise(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, noise: Array
    ) -> tuple[Array, Array]:
        """Draws from the policy; in evaluation takes the likeliest available action."""
        del hp
        carry, logits = self.step(params["agent"], carry, inputs)
        return draw_or_best(logits, inputs.avail_actions, ctx.epsilon, noise), carry

    def sample_noise(self, key: PRNGKey, batch: Episode) -> Array:
        """Draws Gumbel noise for the joint action in each episode's last state, the same at all its times."""
        num_episodes, _, *shape = batch.avail_actions.shape
        return jnp.broadcast_to(jax.random.gumbel(key, (num_episodes, 1, *shape)), batch.avail_actions.shape)

    def policy(self, agent_params: PyTree, batch: Episode, ctx: Context) -> Array:
        """Returns the probabilities of all actions, ``[B, T+1, N, A]``; see `epsilon_floor`."""
        return epsilon_floor(self.unroll(agent_params, batch), batch.avail_actions, ctx.epsilon)

    def actions(self, batch: Episode, policy: Array, noise: Array) -> Array:
        """Returns the actions taken, and drawn from the policy after an episode's last step: ``[B, T+1, N, A]``.

        They are one-hot, and zero past the last state. The value of those that are drawn is what an episode that the
        time limit cut bootstraps from.
        """
        is_step = jnp.pad(batch.mask, ((0, 0), (0, 1)))[..., None] > 0
        is_state = is_step | (jnp.pad(batch.mask, ((0, 0), (1, 0)))[..., None] > 0)
        taken = jnp.pad(batch.joint_action, ((0, 0), (0, 1), (0, 0)))
        taken = jnp.where(is_step, taken, draw(policy, noise))
        return jax.nn.one_hot(jnp.where(is_state, taken, -1), policy.shape[-1], dtype=policy.dtype)

    def returns(self, batch: Episode, hp: Hyperparams, reward: Array, value: Array) -> Array:
        """Returns lambda-returns, 0 in padding: rewards ``[B, T, N]``, values ``[B, T+1, N]`` -> ``[B, T, N]``."""
        each_agent = jax.vmap(lambda_return, in_axes=(1, None, None, 1, None), out_axes=1)
        each_row = jax.vmap(each_agent, in_axes=(0, 0, None, 0, 0))
        y = each_row(reward, batch.discount, hp.gamma, value[:, 1:], hp.td_lambda * is_followed(batch))
        return y * batch.mask[..., None]

    def alive_agents(self, batch: Episode) -> Array:
        """Returns 1 for agents with a part in the policy's loss, ``[B, T, N]``: all of them."""
        return jnp.ones(batch.joint_action.shape, batch.reward.dtype)
