"""`PredatorPrey` as a jumanji environment, registered as ``PredatorPrey-v0``."""

import functools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jumanji import specs
from jumanji.env import Environment
from jumanji.types import TimeStep, restart, termination, transition, truncation
from jumanji.viewer import Viewer
from matplotlib.animation import FuncAnimation
from numpy.typing import NDArray

from wqmix_jax.config import load_group
from wqmix_jax.envs.predator_prey.task import EnvState, PredatorPrey
from wqmix_jax.envs.predator_prey.viewer import PredatorPreyViewer
from wqmix_jax.options import build
from wqmix_jax.types import Array, PRNGKey


@chex.dataclass
class State:
    """The state that jumanji carries from step to step.

    Attributes:
        env_state: the task's state.
        key: ``[2]`` uint32, the bits of the threefry key that the next step splits.
    """

    env_state: EnvState
    key: chex.PRNGKey


class Observation(NamedTuple):
    """The observation, under the names of jumanji's multi-agent environments.

    Attributes:
        agents_view: ``[N, O]`` float32, each agent's window.
        action_mask: ``[N, 6]`` bool, True where an action is allowed.
        global_state: ``[D]`` float32, the whole grid, for centralised training only.
        step_count: int32 scalar, the number of steps played.
    """

    agents_view: Array
    action_mask: Array
    global_state: Array
    step_count: Array


class PredatorPreyJumanji(Environment[State, specs.MultiDiscreteArray, Observation]):
    """The paper's predator-prey task in jumanji's interface; see `PredatorPrey` for its rules.

    The reward is that of the team, one float32 scalar. The discount is 0 where the task ended and 1 elsewhere, also at
    the time limit. ``timestep.extras`` holds `PredatorPrey.metrics`.
    """

    def __init__(self, *, viewer: Viewer[State] | None = None, **overrides: Any) -> None:
        """Builds the task.

        Args:
            viewer: draws states; a `PredatorPreyViewer` that returns RGB arrays when absent.
            **overrides: options of `PredatorPrey` that differ from ``configs/env/predator_prey.yaml``.
        """
        self.task: PredatorPrey = build("env", load_group("env", "predator_prey") | overrides)
        self._viewer = viewer or PredatorPreyViewer(self.task)
        super().__init__()

    def __repr__(self) -> str:
        return f"PredatorPreyJumanji({self.task})"

    def reset(self, key: PRNGKey) -> tuple[State, TimeStep[Observation]]:
        """Places every agent and prey on a different random cell."""
        reset_key, next_key = jax.random.split(key)
        env_state = self.task.reset(reset_key)
        timestep = restart(self._observation(env_state), extras=self.task.metrics(env_state), dtype=jnp.float32)
        return State(env_state=env_state, key=jax.random.key_data(next_key)), timestep

    def step(self, state: State, action: chex.Array) -> tuple[State, TimeStep[Observation]]:
        """Plays ``action`` (``[N]`` int32)."""
        step_key, next_key = jax.random.split(jax.random.wrap_key_data(state.key, impl="threefry2x32"))
        env_state, outcome = self.task.step(state.env_state, jnp.asarray(action), step_key)
        # `switch` picks one of jumanji's three constructors: a step in the middle, a terminated and a truncated one.
        kinds = [functools.partial(kind, dtype=jnp.float32) for kind in (transition, termination, truncation)]
        timestep = jax.lax.switch(
            outcome.terminated.astype(jnp.int32) + 2 * outcome.truncated.astype(jnp.int32),
            [lambda *args, kind=kind: kind(args[0], args[1], extras=args[2]) for kind in kinds],
            outcome.reward,
            self._observation(env_state),
            self.task.metrics(env_state),
        )
        return State(env_state=env_state, key=jax.random.key_data(next_key)), timestep

    @cached_property
    def observation_spec(self) -> specs.Spec[Observation]:
        """Shapes and bounds of an `Observation`."""
        sizes = self.task.spec
        views, grid = (sizes.num_agents, sizes.obs_dim), (sizes.state_dim,)
        return specs.Spec(
            Observation,
            "ObservationSpec",
            agents_view=specs.BoundedArray(views, jnp.float32, 0.0, 1.0, "agents_view"),
            action_mask=specs.BoundedArray((sizes.num_agents, sizes.num_actions), bool, False, True, "action_mask"),
            global_state=specs.BoundedArray(grid, jnp.float32, 0.0, 1.0, "global_state"),
            step_count=specs.BoundedArray((), jnp.int32, 0, sizes.episode_limit, "step_count"),
        )

    @cached_property
    def action_spec(self) -> specs.MultiDiscreteArray:
        """The specification of a joint action: one of six actions for each agent."""
        num_values = jnp.full(self.task.num_agents, self.task.spec.num_actions, jnp.int32)
        return specs.MultiDiscreteArray(num_values, jnp.int32, "action")

    @cached_property
    def reward_spec(self) -> specs.Array:
        """The specification of the team's reward, one number."""
        return specs.Array((), jnp.float32, "reward")

    @cached_property
    def discount_spec(self) -> specs.BoundedArray:
        """The specification of the discount, 0 or 1."""
        return specs.BoundedArray((), jnp.float32, 0.0, 1.0, "discount")

    def render(self, state: State) -> NDArray | None:
        """Draws ``state``; returns an RGBA array ``[height, width, 4]`` unless the viewer shows a window."""
        return self._viewer.render(state)

    def animate(self, states: Sequence[State], interval: int = 200, save_path: str | None = None) -> FuncAnimation:
        """Animates consecutive ``states``, ``interval`` milliseconds apart; saved to ``save_path`` if given."""
        return self._viewer.animate(states, interval, save_path)

    def close(self) -> None:
        """Closes the viewer's figure."""
        self._viewer.close()

    def _observation(self, env_state: EnvState) -> Observation:
        seen = self.task.observe(env_state)
        return Observation(
            agents_view=seen.obs,
            action_mask=seen.avail_actions,
            global_state=seen.state,
            step_count=env_state.steps,
        )
