"""JaxMARL's cooperative games with discrete actions (Rutherford et al. 2024), as environments of this package.

JaxMARL is an optional extra, imported when the environment is first used. Its battles have their own module,
`wqmix_jax.envs.smax`.

Agents may differ in their numbers of features and actions: features are padded with zeros, actions with unavailable
ones.
"""

import functools
import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import Field

from wqmix_jax.envs.base import Environment, External, ExternalPackage, without_weak_types
from wqmix_jax.envs.payoffs import available_actions
from wqmix_jax.envs.quiet_imports import quiet_imports
from wqmix_jax.errors import error_line, install_extra
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

_SHARES: Mapping[str, Callable[[Array], Array]] = {"sum": jnp.sum, "mean": jnp.mean, "first": lambda each: each[0]}
"""The team's reward from those of the agents, ``[N]``."""


_NOT_GIVEN = ("initial_state_buffer", "action_spaces", "observation_spaces", "num_moves")
"""Arguments of constructors that no option can give: they need objects, or, as hanabi's ``num_moves``, do not work."""


class EnvState(NamedTuple):
    """JaxMARL's state with its observation, which some games return only together with a step.

    Attributes:
        state: JaxMARL's state.
        obs: ``[N, O]``, the agents' features in JaxMARL's dtype.
        avail_actions: ``[N, A]`` bool.
        steps: int32 scalar, the steps played.
    """

    state: Any
    obs: Array
    avail_actions: Array
    steps: Array


class CompressedState(NamedTuple):
    """One step in the replay.

    Attributes:
        obs: ``[N, O]``, in JaxMARL's dtype.
        avail_actions: ``[ceil(N * A / 8)]`` uint8, one bit for each action.
    """

    obs: Array
    avail_actions: Array


class _Game(NamedTuple):
    """One of JaxMARL's games.

    Attributes:
        native: JaxMARL's object.
        obs_dims: each agent's number of features.
        num_actions: each agent's number of actions.
        dtype: of the features, the same for all agents.
        legal_actions: the function from JaxMARL's state to each agent's mask; None where all actions are always legal.
    """

    native: Any
    obs_dims: tuple[int, ...]
    num_actions: tuple[int, ...]
    dtype: Any
    legal_actions: Callable[[Any], Mapping[str, Array]] | None


@options
class JaxMARL(Environment):
    """One of JaxMARL's cooperative games.

    Attributes:
        name: JaxMARL's id.
        episode_limit: steps after which an episode is cut; null is the game's ``max_steps``, which ``hanabi`` lacks.
        reward: the team's reward from those of the agents: their ``mean``, their ``sum``, or that of the ``first``.
        options: arguments of ``jaxmarl.make``, where ``layout`` may be the name of one of ``overcooked``'s.
    """

    name: Literal[
        "MPE_simple_spread_v3",
        "MPE_simple_reference_v3",
        "MPE_simple_speaker_listener_v4",
        "overcooked",
        "overcooked_v2",
        "switch_riddle",
        "hanabi",
    ]
    episode_limit: PositiveInt | None
    reward: Literal["mean", "sum", "first"]
    options: Annotated[dict[str, Any], Field(default_factory=dict)]

    @pydantic.model_validator(mode="after")
    def _can_be_made(self) -> Self:
        if importlib.util.find_spec("jaxmarl") is None:
            raise ValueError(f"env=jaxmarl is not allowed: it needs jaxmarl, {install_extra('jaxmarl')}")
        try:
            _ = self._game
        except Exception as error:  # each game has its own
            raise ValueError(f"options={self.options} is not allowed: {error_line(error)}") from None
        if self._limit is None:
            raise ValueError(f"episode_limit=None is not allowed: {self.name} has no limit; give a number of steps")
        return self

    @property
    def _game(self) -> _Game:
        return _made(self.name, json.dumps(self.options))

    @property
    def _limit(self) -> int | None:
        return getattr(self._game.native, "max_steps", None) if self.episode_limit is None else self.episode_limit

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`; the state is the observations of all agents, one after another."""
        game = self._game
        num_agents, obs_dim = len(game.obs_dims), max(game.obs_dims)
        return EnvSpec(num_agents, max(game.num_actions), obs_dim, num_agents * obs_dim, self._limit or 0)

    def reset(self, key: PRNGKey) -> EnvState:
        """Draws the first state as JaxMARL does."""
        with jax.numpy_rank_promotion("allow"):
            seen, state = self._game.native.reset(key)
            return self._env_state(without_weak_types(state), seen, steps=jnp.int32(0))

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays JaxMARL's ``step_env``, which unlike its ``step`` never resets.

        JaxMARL's ``done`` also reports its own time limit. The limit depends on the number of steps in its state, so
        the ``done`` of the same step with that number at -1, so at 0 after it, reports the end of the task alone; a
        compiler computes what both have in common once. An episode that is longer than JaxMARL's limit is not done,
        either.
        """
        native, first = self._game.native, env_state.state
        first = first.replace(done=jnp.zeros_like(first.done))
        actions = dict(zip(native.agents, joint_action, strict=True))
        with jax.numpy_rank_promotion("allow"):
            seen, state, rewards, _, _ = native.step_env(key, first, actions)
            *_, dones, _ = native.step_env(key, first.replace(step=jnp.full_like(first.step, -1)), actions)
            state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), state, first)
            following = self._env_state(state, seen, steps=env_state.steps + jnp.int32(1))
        each = jnp.stack([jnp.asarray(rewards[agent], jnp.float32) for agent in native.agents])
        terminated = jnp.asarray(dones["__all__"], bool)
        outcome = StepOutcome(
            reward=_SHARES[self.reward](each),
            terminated=terminated,
            truncated=~terminated & (following.steps >= self.spec.episode_limit),
        )
        return following, outcome

    def observe(self, env_state: EnvState) -> Observation:
        """Returns JaxMARL's observations, flattened and padded for each agent."""
        return _observation(env_state.obs, env_state.avail_actions)

    @property
    def external(self) -> External:
        """The version of JaxMARL, on which the rules of the games depend."""
        return ExternalPackage("jaxmarl")

    def compress(self, env_state: EnvState) -> CompressedState:
        """Returns the agents' features once, not twice: the state consists of them."""
        return CompressedState(env_state.obs, jnp.packbits(env_state.avail_actions))

    def decompress(self, compressed: PyTree) -> Observation:
        """See `Environment.decompress`."""
        shape = (self.spec.num_agents, self.spec.num_actions)
        bits = jnp.unpackbits(compressed.avail_actions, count=shape[0] * shape[1])
        return _observation(compressed.obs, bits.reshape(shape).astype(bool))

    def _env_state(self, state: Any, seen: Mapping[str, Array], steps: Array) -> EnvState:
        game, agents = self._game, self._game.native.agents
        obs = jnp.stack([_padded(seen[agent], max(game.obs_dims)) for agent in agents]).astype(game.dtype)
        legal = jnp.asarray(available_actions(game.num_actions))
        if game.legal_actions is not None:
            masks = game.legal_actions(state)
            legal &= jnp.stack([_padded(masks[agent], max(game.num_actions)) for agent in agents]) > 0
        return EnvState(state, obs, legal, steps)


def _padded(features: Array, size: int) -> Array:
    flat = jnp.ravel(features)
    return jnp.pad(flat, (0, size - len(flat)))


def _observation(obs: Array, avail_actions: Array) -> Observation:
    obs = obs.astype(jnp.float32)
    return Observation(obs=obs, state=obs.reshape(-1), avail_actions=avail_actions)


@functools.cache
def _made(name: str, arguments: str) -> _Game:
    """Returns one object per set of options: jax caches JaxMARL's jitted methods by their object.

    The object outlives the caller and holds arrays, so these must be concrete even while a function is being traced.
    """
    with quiet_imports(), jax.ensure_compile_time_eval(), jax.numpy_rank_promotion("allow"):
        native = _native(name, json.loads(arguments))
        return _described(native)


def _native(name: str, arguments: dict[str, Any]) -> Any:
    """Returns JaxMARL's object.

    Raises:
        Exception: if an argument is not allowed; each game has its own.
    """
    import jaxmarl
    from jaxmarl.environments import overcooked_layouts

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # overcooked recommends overcooked_v2
        _refuse_unknown(arguments, jaxmarl.make, name)
        layout = arguments.get("layout")
        if name == "overcooked" and layout is not None:
            if layout not in overcooked_layouts:
                raise ValueError(f"layout must be one of {', '.join(overcooked_layouts)}")
            arguments = arguments | {"layout": overcooked_layouts[layout]}
        return jaxmarl.make(name, **arguments)


def _refuse_unknown(arguments: Mapping[str, Any], make: Callable[..., Any], game: str) -> None:
    """Refuses names that no constructor of the game's class has, which some of JaxMARL's ignore, or that it sets."""
    classes = [each for each in type(make(game)).__mro__ if each is not object]
    known = dict.fromkeys(name for each in classes for name in inspect.signature(each.__init__).parameters)
    for name in ("self", "args", "kwargs", *_NOT_GIVEN):
        known.pop(name, None)
    for argument in arguments:
        if argument not in known or _is_set_by(make, game, argument):
            listed = ", ".join(name for name in known if not _is_set_by(make, game, name))
            raise ValueError(f"{argument} is unknown: known names are {listed}")


def _is_set_by(make: Callable[..., Any], game: str, argument: str) -> bool:
    """Returns True for an argument of a parent's constructor that the game's own gives itself."""
    try:
        make(game, **{argument: None})
    except TypeError as error:
        return "multiple values" in str(error) or "unexpected keyword" in str(error)
    except Exception:  # None is not allowed, but another value may be
        return False
    return False


def _described(native: Any) -> _Game:
    """Returns a game with its sizes.

    Raises:
        ValueError: if an action is not one of a number of choices, or the limit is no integer above 0.
        Exception: if the game can't be played with its options; each game has its own.
    """
    from jaxmarl.environments import MultiAgentEnv
    from jaxmarl.environments.spaces import Discrete

    spaces = [native.action_space(agent) for agent in native.agents]
    if not all(isinstance(space, Discrete) for space in spaces):
        raise ValueError("the actions are continuous; only discrete ones are possible")
    limit = getattr(native, "max_steps", 1)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_steps must be an integer above 0, but is {limit!r}")
    seen, state = jax.eval_shape(native.reset, jax.random.key(0))
    jax.eval_shape(native.step_env, jax.random.key(0), state, dict.fromkeys(native.agents, jnp.int32(0)))
    each = [seen[agent] for agent in native.agents]
    legal = None
    if hasattr(native, "get_legal_moves"):  # hanabi's name
        legal = native.get_legal_moves
    elif type(native).get_avail_actions is not MultiAgentEnv.get_avail_actions:
        legal = native.get_avail_actions
    return _Game(
        native=native,
        obs_dims=tuple(int(np.prod(obs.shape)) for obs in each),
        num_actions=tuple(int(space.n) for space in spaces),
        dtype=jnp.result_type(*(obs.dtype for obs in each)),
        legal_actions=legal,
    )
