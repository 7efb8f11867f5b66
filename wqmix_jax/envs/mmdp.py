"""Small cooperative games of several states: a payoff table and a table of next states for each of them.

Deterministic and fully observed, such as the two-step game of QMIX (Rashid et al. 2018, arXiv 1803.11485).
"""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import PlainValidator

from wqmix_jax.envs.base import Environment
from wqmix_jax.envs.payoffs import as_tuples, available_actions, payoff_tensor
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

END = -1
"""The next state of a joint action that ends the game."""

MAX_STATES = 65536
"""The replay stores a state's number in two bytes."""


class Game(NamedTuple):
    """The tables of a game with ``X`` states.

    Attributes:
        payoff: the reward in every state for every joint action, one level for the states and one per agent.
        next_state: the state that follows, in the same form; `END` ends the game.
        start: the first state.
        steps: the limit on an episode's steps; None where the game has none.
    """

    payoff: Any
    next_state: Any
    start: int
    steps: int | None = None


def _everywhere(value: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns a table of two agents with two actions that has one value everywhere."""
    return ((value, value), (value, value))


PRESETS = {
    # QMIX, section 5.1. The first agent's action chooses between state 2A, worth 7, and 2B, whose optimum is worth 8.
    "two_step": Game(
        payoff=(_everywhere(0.0), _everywhere(7.0), ((0.0, 1.0), (1.0, 8.0))),
        next_state=(((1, 1), (2, 2)), _everywhere(END), _everywhere(END)),
        start=0,
        steps=2,
    ),
    # QPLEX (Wang et al. 2021, arXiv 2008.01062), appendix: `mmdp_game_1.py` of the authors' code with the values of its
    # yaml. The game starts in the second state and leaves it, for good, only if both agents play their second action.
    "two_state": Game(
        payoff=(_everywhere(0.0), ((1.0, 0.0), (0.0, 0.0))),
        next_state=(_everywhere(0), ((1, 1), (1, 0))),
        start=1,
        steps=100,
    ),
}
"""The games of the literature by name."""


class EnvState(NamedTuple):
    """The place in a game.

    Attributes:
        state: int32 scalar, the number of the state.
        steps: int32 scalar, the joint actions played so far.
    """

    state: Array
    steps: Array


def _checked(game: Any) -> Game:
    """Returns the tables as nested tuples, so that the options stay hashable."""
    if isinstance(game, Game):
        return game
    if isinstance(game, str) and game in PRESETS:
        return PRESETS[game]
    if not isinstance(game, Mapping) or set(game) != {"payoff", "next_state", "start"}:
        raise ValueError(f"a preset is one of {', '.join(PRESETS)}, anything else has payoff, next_state and start")
    if isinstance(game["payoff"], str):
        raise ValueError("payoff must be a nested list, one level for the states and one per agent")
    payoff = payoff_tensor(game["payoff"])
    if payoff.ndim < 2:
        raise ValueError("payoff must have one level for the states and one per agent")
    num_states = len(payoff)
    if num_states > MAX_STATES:
        raise ValueError(f"at most {MAX_STATES} states are possible")
    next_state = _next_states(game["next_state"], payoff.shape)
    if type(game["start"]) is not int or not 0 <= game["start"] < num_states:
        raise ValueError(f"start must be a state, 0 to {num_states - 1}")
    return Game(as_tuples(payoff.tolist()), as_tuples(next_state.tolist()), game["start"])


def _next_states(nested: Any, shape: tuple[int, ...]) -> np.ndarray:
    allowed = f"next_state must have payoff's form, with states 0 to {shape[0] - 1}, or {END} for the end of the game"
    try:
        table = np.asarray(nested)
    except ValueError:
        raise ValueError(allowed) from None
    if table.shape != shape or table.dtype.kind != "i" or not ((table >= END) & (table < shape[0])).all():
        raise ValueError(allowed)
    return table


@options
class MMDP(Environment):
    """A deterministic game of several states, each with its payoff table.

    Attributes:
        game: ``two_step`` (QMIX's) or ``two_state`` (QPLEX's); or a mapping with ``payoff`` and ``next_state``, nested
            lists with one level for the states and one per agent, where a next state of -1 ends the game, and
            ``start``, the first state.
        episode_limit: steps after which an episode is cut; null is the game's: 2 in ``two_step``, 100 in ``two_state``.
    """

    game: Annotated[Any, PlainValidator(_checked)]
    episode_limit: PositiveInt | None

    @pydantic.model_validator(mode="after")
    def _ends(self) -> Self:
        if self._limit is None:
            raise ValueError("episode_limit=None is not allowed: only the presets have a limit; give a number of steps")
        return self

    @property
    def _limit(self) -> int | None:
        return self.game.steps if self.episode_limit is None else self.episode_limit

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`; agents with fewer actions than others are padded with unavailable ones."""
        num_states, *shape = np.shape(self.game.payoff)
        return EnvSpec(len(shape), max(shape), num_states, num_states, self._limit or 0)

    def reset(self, key: PRNGKey) -> EnvState:
        """Returns the only first state."""
        del key
        return EnvState(state=jnp.int32(self.game.start), steps=jnp.int32(0))

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Pays the joint action's entry in the table of the state; a game that has ended keeps its last state."""
        del key
        entry = (env_state.state, *joint_action)
        following = jnp.array(self.game.next_state, jnp.int32)[entry]
        steps = env_state.steps + jnp.int32(1)
        terminated = following == END
        outcome = StepOutcome(
            reward=jnp.array(self.game.payoff, jnp.float32)[entry],
            terminated=terminated,
            truncated=~terminated & (steps >= self.spec.episode_limit),
        )
        return EnvState(jnp.where(terminated, env_state.state, following), steps), outcome

    def observe(self, env_state: EnvState) -> Observation:
        """Returns the state, one-hot, to each agent and as the global state."""
        return self.decompress(self.compress(env_state))

    def compress(self, env_state: EnvState) -> Array:
        """Returns the number of the state."""
        return env_state.state.astype(jnp.uint16)

    def decompress(self, compressed: PyTree) -> Observation:
        """See `Environment.decompress`."""
        num_states, *shape = np.shape(self.game.payoff)
        state = jax.nn.one_hot(compressed, num_states, dtype=jnp.float32)
        obs = jnp.broadcast_to(state[None], (len(shape), num_states))
        return Observation(obs, state, avail_actions=jnp.asarray(available_actions(shape)))
