"""An algorithm that compiles in a second: linear utilities, summed, and one-step targets without a bootstrap."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.environments import TINY
from wqmix_jax.algos.base import AgentInputs, Algorithm, Aux, Context
from wqmix_jax.ops.action_selection import epsilon_greedy
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import build, options
from wqmix_jax.types import Array, EnvSpec, Episode


@options
class Linear(Algorithm):
    """Acts epsilon-greedily on ``obs @ agent``; the sum of the chosen utilities is fitted to the reward."""

    def init(self, key: Any, env_spec: EnvSpec) -> Any:
        return {"agent": jax.random.normal(key, (env_spec.obs_dim, env_spec.num_actions))}

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Array:
        return jnp.zeros(batch_shape, jnp.int32)

    def act(
        self, params: Any, carry: Array, inputs: AgentInputs, hp: Any, ctx: Context, key: Any
    ) -> tuple[Array, Array]:
        return epsilon_greedy(key, inputs.obs @ params["agent"], inputs.avail_actions, ctx.epsilon), carry

    def loss(self, params: Any, target: Any, batch: Episode, hp: Any, ctx: Context, noise: Any) -> tuple[Array, Aux]:
        qs = batch.obs[:, :-1] @ params["agent"]
        q_tot = jnp.take_along_axis(qs, batch.joint_action[..., None], -1).sum((-1, -2))
        loss = masked_mean_square(q_tot - batch.reward, batch.mask)
        return loss, Aux({"loss": loss, "reward": masked_mean(batch.reward, batch.mask)}, {})


@options
class LinearInState(Linear):
    """The same, fitted to the reward plus the sum of the state."""

    def loss(self, params: Any, target: Any, batch: Episode, hp: Any, ctx: Context, noise: Any) -> tuple[Array, Aux]:
        wanted = batch.reward + batch.state[:, :-1].sum(-1)
        return super().loss(params, target, batch._replace(reward=wanted), hp, ctx, noise)


def linear(**changes: Any) -> Linear:
    return build("algo", {"_target_": f"{__name__}.Linear", **TINY, **changes})
