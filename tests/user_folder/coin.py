"""A user's own environment: two agents that both have to name the side that a coin shows."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from wqmix_jax.envs.base import Environment
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome


class State(NamedTuple):
    """The coin's side, the steps played, and whether the last answer was right."""

    side: Array
    steps: Array
    won: Array


@options
class Coin(Environment):
    """A right answer pays 1 and may end the game, so episodes differ in length.

    Attributes:
        episode_limit: steps after which an episode is cut.
        end_probability: how likely a right answer ends the game.
    """

    episode_limit: Annotated[int, Field(gt=0)]
    end_probability: Annotated[float, Field(ge=0, le=1)]

    @property
    def spec(self) -> EnvSpec:
        """Two agents, two sides."""
        return EnvSpec(num_agents=2, num_actions=2, obs_dim=2, state_dim=2, episode_limit=self.episode_limit)

    def reset(self, key: PRNGKey) -> State:
        """A tossed coin."""
        return State(jax.random.bernoulli(key).astype(jnp.int32), jnp.int32(0), jnp.bool_(False))

    def step(self, env_state: State, joint_action: Array, key: PRNGKey) -> tuple[State, StepOutcome]:
        """Pays, and tosses again."""
        toss_key, end_key = jax.random.split(key)
        right = (joint_action == env_state.side[None]).all()
        truncated = env_state.steps + 1 >= self.episode_limit
        terminated = right & jax.random.bernoulli(end_key, self.end_probability) & ~truncated
        following = State(self.reset(toss_key).side, env_state.steps + 1, right)
        return following, StepOutcome(right.astype(jnp.float32), terminated, truncated)

    def observe(self, env_state: State) -> Observation:
        """Everybody sees the coin."""
        side = jax.nn.one_hot(env_state.side, 2)
        return Observation(jnp.stack([side, side]), side, jnp.ones((2, 2), bool))

    def metrics(self, env_state: State) -> dict[str, Array]:
        """Returns 1 if the last answer was right."""
        return {"win_rate": env_state.won.astype(jnp.float32)}
