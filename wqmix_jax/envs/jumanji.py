"""Jumanji's cooperative grid worlds, such as level-based foraging, as environments of this package.

The adapter fits environments whose observation has one row of features and one mask of actions per agent.
"""

import functools
import json
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import Field

from wqmix_jax.envs.base import Environment, External, ExternalPackage, without_weak_types
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome


class EnvState(NamedTuple):
    """A jumanji state with its observation, which jumanji returns only together with a step.

    Attributes:
        state: jumanji's state, its random key included.
        agents_view: ``[N, ..]``, the agents' features.
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
        agents_view: ``[N, ..]``, in the narrowest integer dtype that holds jumanji's bounds.
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

    name: Literal["LevelBasedForaging-v0", "RobotWarehouse-v0"]
    episode_limit: PositiveInt
    generator: Annotated[dict[str, Any], Field(default_factory=dict)]

    @pydantic.model_validator(mode="after")
    def _can_be_made(self) -> Self:
        try:
            _ = self._jumanji.observation_spec
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"generator={self.generator} is not allowed: {error}") from None
        return self

    @property
    def _jumanji(self) -> Any:
        return _made(self.name, self.episode_limit, json.dumps(self.generator))

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`; the state is the observations of all agents, one after another."""
        fields = self._jumanji.observation_spec
        num_agents, num_actions = fields.action_mask.shape
        obs_dim = int(np.prod(fields.agents_view.shape[1:]))
        return EnvSpec(num_agents, num_actions, obs_dim, num_agents * obs_dim, self.episode_limit)

    def reset(self, key: PRNGKey) -> EnvState:
        """Draws the first state as jumanji does; jumanji takes the raw bits of a key."""
        with jax.numpy_rank_promotion("allow"):
            return _env_state(*self._jumanji.reset(jax.random.key_data(key)))

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays jumanji's step, whose randomness is in the state.

        An episode whose last discount is 0 was terminated. RobotWarehouse returns 0 at its time limit, too, so targets
        don't bootstrap there.
        """
        del key
        with jax.numpy_rank_promotion("allow"):
            state, timestep = self._jumanji.step(env_state.state, joint_action)
        ended, terminated = timestep.last().all(), (timestep.discount == 0).all()
        outcome = StepOutcome(
            reward=timestep.reward.sum().astype(jnp.float32),
            terminated=ended & terminated,
            truncated=ended & ~terminated,
        )
        return _env_state(state, timestep), outcome

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
        obs = agents_view.reshape(agents_view.shape[0], -1).astype(jnp.float32)
        return Observation(obs=obs, state=obs.reshape(-1), avail_actions=action_mask)

    @property
    def _view_dtype(self) -> np.dtype:
        """The narrowest integer dtype that holds all features, where jumanji's specification has integer bounds."""
        view = self._jumanji.observation_spec.agents_view
        if np.issubdtype(view.dtype, np.integer) and hasattr(view, "minimum"):
            low, high = np.asarray(view.minimum).min(), np.asarray(view.maximum).max()
            exact = (np.iinfo(dtype) for dtype in (np.uint8, np.int8, np.int16, np.int32))
            return next(info.dtype for info in exact if info.min <= low and high <= info.max)
        return np.dtype(view.dtype)


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
        return make(name, time_limit=time_limit, generator=type(default._generator)(**arguments))


def _env_state(state: Any, timestep: Any) -> EnvState:
    seen = timestep.observation
    return without_weak_types(EnvState(state, seen.agents_view, seen.action_mask, dict(timestep.extras or {})))
