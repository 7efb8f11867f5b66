"""Cooperative games of one payoff table, such as the non-monotonic ones of the paper's section 3 (Rashid et al. 2020).

A game has one step, or repeats the same table for several.
"""

from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic import PlainValidator

from wqmix_jax.envs.base import Environment
from wqmix_jax.envs.payoffs import as_tuples, available_actions, payoff_tensor
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome


class EnvState(NamedTuple):
    """The number of steps played.

    Attributes:
        steps: int32 scalar, 0 before the first joint action.
    """

    steps: Array


def _checked(payoff: Any) -> Any:
    """Returns the payoff as nested tuples, so that the options stay hashable."""
    return as_tuples(payoff_tensor(payoff).tolist())


@options
class MatrixGame(Environment):
    """A game of one shared payoff per joint action.

    Attributes:
        payoff: the reward of every joint action as a nested list, one level per agent; or the name of a game of the
            literature: ``table1`` or ``table2``, those of the paper, ``climbing``, ``penalty_-100``, ``qtran``,
            ``qplex_1``, ``qplex_3``, ``pymarl2_mild``, ``pymarl2_harsh`` or ``pymarl2_safe``.
        steps: how often the game is played in an episode. A game of one step terminates; a repeated game is cut after
            so many steps, and its observation stays the same.
    """

    payoff: Annotated[Any, PlainValidator(_checked)]
    steps: PositiveInt

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`; agents with fewer actions than others are padded with unavailable ones."""
        shape = np.shape(self.payoff)
        return EnvSpec(num_agents=len(shape), num_actions=max(shape), obs_dim=1, state_dim=1, episode_limit=self.steps)

    def reset(self, key: PRNGKey) -> EnvState:
        """Returns the only first state."""
        del key
        return EnvState(steps=jnp.zeros((), jnp.int32))

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Pays ``payoff[joint_action]``."""
        del key
        payoff = jnp.array(self.payoff, jnp.float32)
        following = EnvState(steps=env_state.steps + jnp.int32(1))
        ends, never = following.steps >= self.steps, jnp.zeros((), bool)
        outcome = StepOutcome(
            reward=payoff[tuple(joint_action)],
            terminated=ends if self.steps == 1 else never,
            truncated=never if self.steps == 1 else ends,
        )
        return following, outcome

    def observe(self, env_state: EnvState) -> Observation:
        """Returns one constant feature, 1, for each agent and the state."""
        del env_state
        return Observation(
            obs=jnp.ones((self.spec.num_agents, 1), jnp.float32),
            state=jnp.ones(1, jnp.float32),
            avail_actions=jnp.asarray(available_actions(np.shape(self.payoff))),
        )

    @property
    def storage_dtype(self) -> Any:
        """A byte holds the constant feature."""
        return jnp.uint8
