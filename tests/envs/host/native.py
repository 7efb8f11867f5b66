"""The toy of `toy.py` in JAX, which gives the numbers that the bridge must give."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.envs.base import Environment
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Observation, StepOutcome


class NativeState(NamedTuple):
    x: Array
    steps: Array
    hits: Array


@options
class Native(Environment):
    """See `toy.Toy`."""

    episode_limit: int
    eval_envs: int

    @property
    def spec(self) -> EnvSpec:
        return EnvSpec(num_agents=2, num_actions=3, obs_dim=3, state_dim=3, episode_limit=self.episode_limit)

    def reset(self, key: Any) -> NativeState:
        seed = jax.random.bits(key, (), jnp.uint32) >> 1
        return NativeState((seed % 97).astype(jnp.int32), jnp.int32(0), jnp.int32(0))

    def step(self, env_state: NativeState, joint_action: Array, key: Any) -> tuple[NativeState, StepOutcome]:
        x = (31 * env_state.x + joint_action[0] + 2 * joint_action[1] + 7) % 97
        steps = env_state.steps + 1
        terminated = x % 11 == 0
        truncated = ~terminated & (steps >= self.episode_limit)
        following = NativeState(x, steps, env_state.hits + (x % 5 == 0))
        return following, StepOutcome((x % 5 - 1).astype(jnp.float32), terminated, truncated)

    def observe(self, env_state: NativeState) -> Observation:
        x, steps, agents = env_state.x, env_state.steps, jnp.arange(2)
        obs = jnp.stack([jnp.stack([x % 7, steps, agent]) for agent in agents]).astype(jnp.float32)
        avail = jnp.ones((2, 3), bool).at[agents, (x[None] + agents) % 3].set(False)
        return Observation(obs, jnp.stack([x, steps, x // 10]).astype(jnp.float32), avail)

    def metrics(self, env_state: NativeState) -> dict[str, Array]:
        return {"hits": env_state.hits.astype(jnp.float32)}

    def episodes_at_once(self, num_episodes: int) -> int:
        return min(self.eval_envs, num_episodes)
