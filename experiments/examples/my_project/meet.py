"""A custom environment: agents on a ring of cells get a reward when all are in the same cell."""

from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from wqmix_jax.envs.base import Environment
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome


class State(NamedTuple):
    """The agents' cells, ``[N]`` int32, and the steps played."""

    cells: Array
    steps: Array


@options
class Meet(Environment):
    """Pure functions of the state of one game; the trainer plays many games in parallel.

    Attributes:
        num_agents: the number of agents, ``N``.
        num_cells: the number of cells of the ring.
        episode_limit: steps after which an episode is cut.
    """

    viewer_class: ClassVar[str | None] = "meet_viewer:MeetViewer"

    num_agents: Annotated[int, Field(gt=1)]
    num_cells: Annotated[int, Field(gt=1)]
    episode_limit: PositiveInt

    @property
    def spec(self) -> EnvSpec:
        """Agents observe all cells, their own first; the actions are left, stay and right."""
        sizes = {"num_agents": self.num_agents, "num_actions": 3, "episode_limit": self.episode_limit}
        return EnvSpec(**sizes, obs_dim=self.num_cells, state_dim=self.num_agents * self.num_cells)

    def reset(self, key: PRNGKey) -> State:
        """Places all agents at random."""
        return State(jax.random.randint(key, (self.num_agents,), 0, self.num_cells), jnp.int32(0))

    def step(self, env_state: State, joint_action: Array, key: PRNGKey) -> tuple[State, StepOutcome]:
        """Moves all agents. A meeting terminates the task; the time limit only truncates the episode."""
        after = State((env_state.cells + joint_action - 1) % self.num_cells, env_state.steps + 1)
        met = (after.cells == after.cells[:1]).all()
        return after, StepOutcome(met.astype(jnp.float32), met, ~met & (after.steps >= self.episode_limit))

    def observe(self, env_state: State) -> Observation:
        """Counts the agents in each cell, starting from the observer's; the state is each agent's cell."""
        where = jax.nn.one_hot(env_state.cells, self.num_cells)  # [N, cells]
        obs = jax.vmap(lambda own: jnp.roll(where.sum(0), -own))(env_state.cells)
        return Observation(obs, where.reshape(-1), jnp.ones((self.num_agents, 3), bool))

    def metrics(self, env_state: State) -> dict[str, Array]:
        """Adds to every evaluation whether the agents met."""
        return {"win_rate": (env_state.cells == env_state.cells[:1]).all().astype(jnp.float32)}
