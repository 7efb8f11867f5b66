"""Jumanji's cooperative grid worlds, such as level-based foraging, as environments of this package.

The adapter fits environments whose observation has one row of features and one mask of actions per agent, and two that
show the whole grid to everyone, Connector and Cleaner: each of their agents sees planes of the grid with itself marked.
"""

import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import Field

from wqmix_jax.envs.base import Environment, External, ExternalPackage, without_weak_types
from wqmix_jax.errors import error_line
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

DIRTY, WALL = 0, 2
"""Cleaner's numbers of tiles; a clean one is 1."""


class EnvState(NamedTuple):
    """A jumanji state with its observation, which jumanji returns only together with a step.

    Attributes:
        state: jumanji's state, its random key included.
        agents_view: ``[N, ..]``, the agents' features; Connector's grid, ``[G, G]``; Cleaner's grid, ``[G * G]``,
            followed by the agents' rows and columns, ``[2 * N]``.
        action_mask: ``[N, A]`` bool, True where an action is allowed.
        extras: jumanji's scalars for the log.
    """

    state: Any
    agents_view: Array
    action_mask: Array
    extras: dict[str, Array]


class CompressedState(NamedTuple):
    """One step in the replay.

    Attributes:
        agents_view: that of `EnvState`, in the narrowest integer dtype that holds jumanji's bounds.
        action_mask: ``[ceil(N * A / 8)]`` uint8, one bit for each action.
    """

    agents_view: Array
    action_mask: Array


@options
class JumanjiEnvironment(Environment):
    """One of jumanji's environments; rewards of several agents are summed.

    Attributes:
        name: jumanji's id.
        episode_limit: jumanji's ``time_limit``, in steps.
        generator: arguments of the environment's generator of first states; empty for its defaults.
    """

    name: Literal["LevelBasedForaging-v0", "RobotWarehouse-v0", "Connector-v3", "Cleaner-v0"]
    episode_limit: PositiveInt
    generator: Annotated[dict[str, Any], Field(default_factory=dict)]

    @pydantic.model_validator(mode="after")
    def _can_be_made(self) -> Self:
        try:
            if self.name == "Cleaner-v0" and len(set(self._jumanji.grid_shape)) > 1:
                raise ValueError("num_rows and num_cols must be equal, because jumanji's masks exchange them")
            _ = self._jumanji.observation_spec
            if self.generator:  # without it the game is jumanji's own
                jax.eval_shape(self._first_step, jax.random.key(0))
        except Exception as error:  # each generator has its own
            raise ValueError(f"generator={self.generator} is not allowed: {error_line(error)}") from None
        return self

    def _first_step(self, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        return self.step(self.reset(key), jnp.zeros(self.spec.num_agents, jnp.int32), key)

    @property
    def _jumanji(self) -> Any:
        return _made(self.name, self.episode_limit, json.dumps(self.generator))

    @property
    def _view(self) -> "_View":
        return _VIEWS.get(self.name, _ROWS)

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`."""
        return _spec(self.name, self.episode_limit, json.dumps(self.generator))

    def reset(self, key: PRNGKey) -> EnvState:
        """Draws the first state as jumanji does; jumanji takes the raw bits of a key."""
        with jax.numpy_rank_promotion("allow"):
            return self._env_state(*self._jumanji.reset(jax.random.key_data(key)))

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays jumanji's step, whose randomness is in the state.

        An episode whose last discount is 0 was terminated. RobotWarehouse returns 0 at its time limit, too, so targets
        don't bootstrap there. Cleaner also does; there the episode was cut if a tile is still dirty.
        """
        del key
        with jax.numpy_rank_promotion("allow"):
            state, timestep = self._jumanji.step(env_state.state, joint_action)
        ended, terminated = timestep.last().all(), (timestep.discount == 0).all()
        if self.name == "Cleaner-v0":
            terminated &= (state.step_count < self.episode_limit) | ~(state.grid == DIRTY).any()
        outcome = StepOutcome(
            reward=timestep.reward.sum().astype(jnp.float32),
            terminated=ended & terminated,
            truncated=ended & ~terminated,
        )
        return self._env_state(state, timestep), outcome

    def observe(self, env_state: EnvState) -> Observation:
        """Returns jumanji's observation, flattened for each agent."""
        return self._observation(env_state.agents_view, env_state.action_mask)

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Returns jumanji's extras."""
        return {name: value.astype(jnp.float32) for name, value in env_state.extras.items()}

    @property
    def external(self) -> External:
        """The version of jumanji, on which the rules of the game depend."""
        return ExternalPackage("jumanji")

    def compress(self, env_state: EnvState) -> CompressedState:
        """Returns the agents' features once, not twice: the state consists of them."""
        return CompressedState(env_state.agents_view.astype(self._view_dtype), jnp.packbits(env_state.action_mask))

    def decompress(self, compressed: PyTree) -> Observation:
        """See `Environment.decompress`."""
        shape = (self.spec.num_agents, self.spec.num_actions)
        mask = jnp.unpackbits(compressed.action_mask, count=shape[0] * shape[1]).reshape(shape)
        return self._observation(compressed.agents_view, mask.astype(bool))

    def _observation(self, agents_view: Array, action_mask: Array) -> Observation:
        obs, state = self._view.features(agents_view, self._jumanji)
        return Observation(obs=obs, state=state, avail_actions=action_mask)

    def _env_state(self, state: Any, timestep: Any) -> EnvState:
        seen = timestep.observation
        view = self._view.take(seen)
        return without_weak_types(EnvState(state, view, seen.action_mask, dict(timestep.extras or {})))

    @property
    def _view_dtype(self) -> np.dtype:
        """The narrowest integer dtype that holds all features, where jumanji's specification has integer bounds."""
        view = getattr(self._jumanji.observation_spec, self._view.bounds)
        if np.issubdtype(view.dtype, np.integer) and hasattr(view, "minimum"):
            low, high = np.asarray(view.minimum).min(), np.asarray(view.maximum).max()
            exact = (np.iinfo(dtype) for dtype in (np.uint8, np.int8, np.int16, np.int32))
            return next(info.dtype for info in exact if info.min <= low and high <= info.max)
        return np.dtype(view.dtype)


class _View(NamedTuple):
    """The part of jumanji's observation that is kept, and the features that are computed from it.

    Attributes:
        bounds: the field of jumanji's observation whose bounds the kept array has.
        take: returns the kept array of an observation.
        features: returns the features of the agents, ``[N, O]``, and of the state, ``[D]``, as float32, from a kept
            array and jumanji's object.
    """

    bounds: str
    take: Callable[[Any], Array]
    features: Callable[[Array, Any], tuple[Array, Array]]


def _row_features(agents_view: Array, game: Any) -> tuple[Array, Array]:
    """Returns each agent's row, and all rows as the state."""
    del game
    obs = agents_view.reshape(agents_view.shape[0], -1).astype(jnp.float32)
    return obs, obs.reshape(-1)


def _connector_features(grid: Array, game: Any) -> tuple[Array, Array]:
    """Returns binary planes of Connector's grid, in which agent ``i`` has the numbers ``3 i`` + 1, 2 and 3.

    Returns:
        obs ``[N, 6 * G * G]``: the agent's path, head and target, then those of all others. state ``[(1 + 2 N) * G *
        G]``: all paths, then each agent's head and target.
    """
    grid, num_agents = grid.astype(jnp.int32), game.num_agents
    numbers = 1 + np.arange(3 * num_agents).reshape(num_agents, 3)
    each = grid[None, None] == numbers[:, :, None, None]  # [N, 3, G, G]
    others = each.any(0)[None] & ~each
    obs = jnp.concatenate([each, others], axis=1).reshape(num_agents, -1)
    state = jnp.concatenate([each[:, 0].any(0).reshape(-1), each[:, 1:].reshape(-1)])
    return obs.astype(jnp.float32), state.astype(jnp.float32)


def _grid_and_places(seen: Any) -> Array:
    return jnp.concatenate([seen.grid.reshape(-1), seen.agents_locations.reshape(-1)], dtype=jnp.int32)


def _cleaner_features(grid_and_places: Array, game: Any) -> tuple[Array, Array]:
    """Returns planes of Cleaner's grid.

    Returns:
        obs ``[N, 4 * G * G]``: dirty tiles, walls, the agent, the number of others. state ``[(2 + N) * G * G]``: dirty
        tiles, walls, each agent.
    """
    size = int(np.prod(game.grid_shape))
    grid = grid_and_places[:size].reshape(game.grid_shape)
    places = grid_and_places[size:].reshape(-1, 2).astype(jnp.int32)
    num_agents = len(places)
    tiles = jnp.stack([grid == DIRTY, grid == WALL]).astype(jnp.float32)
    rows, columns = (jax.nn.one_hot(places[:, axis], grid.shape[axis]) for axis in (0, 1))
    agents = rows[:, :, None] * columns[:, None, :]  # [N, G, G]
    shared = jnp.broadcast_to(tiles[None], (num_agents, *tiles.shape))
    obs = jnp.concatenate([shared, agents[:, None], (agents.sum(0)[None] - agents)[:, None]], axis=1)
    return obs.reshape(num_agents, -1), jnp.concatenate([tiles, agents]).reshape(-1)


_ROWS = _View("agents_view", lambda seen: seen.agents_view, _row_features)
_VIEWS = {
    "Connector-v3": _View("grid", lambda seen: seen.grid, _connector_features),
    "Cleaner-v0": _View("agents_locations", _grid_and_places, _cleaner_features),
}
"""The views by jumanji's id; others have a row for each agent."""


@functools.cache
def _spec(name: str, time_limit: int, generator: str) -> EnvSpec:
    game, view = _made(name, time_limit, generator), _VIEWS.get(name, _ROWS)
    fields = game.observation_spec
    obs, state = jax.eval_shape(lambda: view.features(view.take(fields.generate_value()), game))
    num_agents, num_actions = fields.action_mask.shape
    return EnvSpec(num_agents, num_actions, obs.shape[1], state.shape[0], time_limit)


@functools.cache
def _made(name: str, time_limit: int, generator: str) -> Any:
    """Returns one object per set of options, because jumanji keeps caches in its objects.

    The object outlives the caller and holds arrays, so these must be concrete even while a function is being traced.
    """
    with jax.ensure_compile_time_eval():
        from jumanji.registration import make

        arguments = json.loads(generator)
        if not arguments:
            return make(name, time_limit=time_limit)
        default: Any = make(name)
        generator = default.generator if name == "Cleaner-v0" else default._generator
        return make(name, time_limit=time_limit, generator=type(generator)(**arguments))
