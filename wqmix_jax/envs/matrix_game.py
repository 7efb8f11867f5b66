"""Cooperative games of one step, such as the non-monotonic ones of section 3 of the paper (Rashid et al. 2020)."""

from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic import PlainValidator

from wqmix_jax.envs.base import Environment
from wqmix_jax.envs.payoffs import payoff_tensor
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, StepOutcome


class EnvState(NamedTuple):
    """The number of steps played.

    Attributes:
        steps: int32 scalar, 0 before the joint action and 1 after it.
    """

    steps: Array


def _checked(payoff: Any) -> Any:
    """Returns the payoff as nested tuples, so that the options stay hashable."""
    table = payoff_tensor(payoff)
    if len(set(table.shape)) > 1:
        raise ValueError(f"each of the {table.ndim} agents needs the same number of actions, got {table.shape}")
    return _as_tuples(table.tolist())


def _as_tuples(nested: Any) -> Any:
    return tuple(map(_as_tuples, nested)) if isinstance(nested, list) else nested


@options
class MatrixGame(Environment):
    """A game of one joint action and one shared payoff.

    Attributes:
        payoff: the reward of every joint action as a nested list, one level per agent and equally many actions on each;
            or ``table1`` or ``table2``, those of the paper.
    """

    payoff: Annotated[Any, PlainValidator(_checked)]

    @property
    def spec(self) -> EnvSpec:
        """See `EnvSpec`."""
        shape = np.shape(self.payoff)
        return EnvSpec(num_agents=len(shape), num_actions=shape[0], obs_dim=1, state_dim=1, episode_limit=1)

    def reset(self, key: PRNGKey) -> EnvState:
        """Returns the only first state."""
        del key
        return EnvState(steps=jnp.zeros((), jnp.int32))

    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Pays ``payoff[joint_action]`` and terminates the task."""
        del key
        payoff = jnp.array(self.payoff, jnp.float32)
        outcome = StepOutcome(
            reward=payoff[tuple(joint_action)],
            terminated=jnp.ones((), bool),
            truncated=jnp.zeros((), bool),
        )
        return EnvState(steps=env_state.steps + jnp.int32(1)), outcome

    def observe(self, env_state: EnvState) -> Observation:
        """Returns one constant feature, 1, for each agent and the state; every action is allowed."""
        del env_state
        num_agents, num_actions = self.spec.num_agents, self.spec.num_actions
        return Observation(
            obs=jnp.ones((num_agents, 1), jnp.float32),
            state=jnp.ones(1, jnp.float32),
            avail_actions=jnp.ones((num_agents, num_actions), bool),
        )

    @property
    def storage_dtype(self) -> Any:
        """A byte holds the constant feature."""
        return jnp.uint8
