"""An environment of one's own: agents on a ring of cells, who are paid once all stand on the same one."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from wqmix_jax.envs.base import Environment
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome


class State(NamedTuple):
    """Where the agents stand, ``[N]`` int32, and the steps played."""

    cells: Array
    steps: Array


@options
class Meet(Environment):
    """Everything is a function of one game's state; the trainer plays many side by side.

    Attributes:
        num_agents: ``N``.
        num_cells: of the ring.
        episode_limit: steps after which an episode is cut.
    """

    num_agents: Annotated[int, Field(gt=1)]
    num_cells: Annotated[int, Field(gt=1)]
    episode_limit: PositiveInt

    @property
    def spec(self) -> EnvSpec:
        """An agent sees all cells, its own first; its actions are left, stay and right."""
        sizes = {"num_agents": self.num_agents, "num_actions": 3, "episode_limit": self.episode_limit}
        return EnvSpec(**sizes, obs_dim=self.num_cells, state_dim=self.num_agents * self.num_cells)

    def reset(self, key: PRNGKey) -> State:
        """Everyone anywhere."""
        return State(jax.random.randint(key, (self.num_agents,), 0, self.num_cells), jnp.int32(0))

    def step(self, env_state: State, joint_action: Array, key: PRNGKey) -> tuple[State, StepOutcome]:
        """Moves all at once. A meeting terminates the task; the time limit only cuts the episode."""
        after = State((env_state.cells + joint_action - 1) % self.num_cells, env_state.steps + 1)
        met = (after.cells == after.cells[:1]).all()
        return after, StepOutcome(met.astype(jnp.float32), met, ~met & (after.steps >= self.episode_limit))

    def observe(self, env_state: State) -> Observation:
        """How many stand on each cell, counted from the agent's own; the state is who stands where."""
        where = jax.nn.one_hot(env_state.cells, self.num_cells)  # [N, cells]
        obs = jax.vmap(lambda own: jnp.roll(where.sum(0), -own))(env_state.cells)
        return Observation(obs, where.reshape(-1), jnp.ones((self.num_agents, 3), bool))

    def metrics(self, env_state: State) -> dict[str, Array]:
        """Beside the return in every evaluation: whether they met."""
        return {"win_rate": (env_state.cells == env_state.cells[:1]).all().astype(jnp.float32)}
