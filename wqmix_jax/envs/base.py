"""The environment protocol: five pure functions and a spec.

A new environment is one subclass of `Environment` in one file and one yaml in ``configs/env``. All functions take and
return single, unbatched pytrees; the trainer batches them with `jax.vmap` through the ``*_batch`` methods, which an
environment that is batched by nature (a bridge to a host simulator) overrides instead.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array, EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

EnvState = Any


class Environment(abc.ABC):
    """A cooperative multi-agent task as pure functions of an ``env_state`` pytree."""

    @property
    @abc.abstractmethod
    def spec(self) -> EnvSpec:
        """The static sizes of this environment."""

    @abc.abstractmethod
    def reset(self, key: PRNGKey) -> EnvState:
        """Draws the first state of an episode."""

    @abc.abstractmethod
    def step(self, env_state: EnvState, joint_action: Array, key: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Plays ``joint_action`` (``[N]`` int32) and never resets: the terminal state is returned as it is."""

    @abc.abstractmethod
    def observe(self, env_state: EnvState) -> Observation:
        """What the agents and the central nets see of ``env_state``; a pure function of it."""

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Scalars read off an episode's last state (a win, say), averaged over evaluation episodes. None by default."""
        del env_state
        return {}

    def pack(self, env_state: EnvState) -> PyTree:
        """How one step lies in the replay. Integer, bool and float leaves of any width are stored as their bytes.

        By default the observation itself, with the features in `storage_dtype`. An environment whose observation can be
        recomputed from less overrides `pack` and `unpack` together.
        """
        seen = self.observe(env_state)
        return Observation(
            obs=seen.obs.astype(self.storage_dtype),
            state=seen.state.astype(self.storage_dtype),
            avail_actions=jnp.packbits(seen.avail_actions),
        )

    def unpack(self, packed: PyTree) -> Observation:
        """The exact inverse: the `Observation` of the state that was packed."""
        spec = self.spec
        bits = jnp.unpackbits(packed.avail_actions, count=spec.num_agents * spec.num_actions)
        return Observation(
            obs=packed.obs.astype(jnp.float32),
            state=packed.state.astype(jnp.float32),
            avail_actions=bits.reshape(spec.num_agents, spec.num_actions).astype(bool),
        )

    @property
    def storage_dtype(self) -> Any:
        """The narrowest dtype that holds every obs and state feature exactly; used by the default `pack`."""
        return jnp.float32

    def reset_batch(self, keys: PRNGKey) -> EnvState:
        """`reset` over a leading axis of keys."""
        return jax.vmap(self.reset)(keys)

    def step_batch(self, env_state: EnvState, joint_action: Array, keys: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """`step` over a leading axis."""
        return jax.vmap(self.step)(env_state, joint_action, keys)


def without_weak_types(tree: PyTree) -> PyTree:
    """The same values with strong dtypes.

    Some libraries reset to Python scalars, whose weak types would make another loop state, and another compilation,
    after the first step.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tree)
