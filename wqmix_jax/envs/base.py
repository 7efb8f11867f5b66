"""The environment protocol: a spec and three pure functions, and some more that have defaults.

A new environment is one subclass of `Environment` in one file and one yaml in ``configs/env``. All functions take and
return single, unbatched pytrees; the trainer batches them with `jax.vmap` through the ``*_batch`` methods, which an
environment that is batched by nature (a bridge to a host simulator) overrides instead.
"""

import abc
import contextlib
import importlib.metadata
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from wqmix_jax.types import Array, EnvSpec, Moment, Observation, PRNGKey, PyTree, StepOutcome

EnvState = Any


class Viewer(Protocol):
    """Draws the episodes of one environment; `wqmix_jax.envs.viewer.StateViewer` implements it with matplotlib."""

    def film(self, moments: Sequence[Moment], save_path: str, interval: int = 250) -> None:
        """Writes an animation of one episode.

        Args:
            moments: consecutive, from `wqmix_jax.runs.saved_policies.play_episode`.
            save_path: the file that is written, a GIF.
            interval: milliseconds between frames.
        """
        ...


class External:
    """What of an environment lives outside of the compiled program: of a pure one, nothing."""

    def sharding(self) -> Sharding | None:
        """The device that trains, where not any number of them can.

        Raises:
            ConfigError: where the device's runtime can't do what is needed.
        """
        return None

    def lines(self, num_seeds: int, num_envs: int) -> Iterator[str]:
        """What is printed of it before a run starts."""
        del num_seeds, num_envs
        return iter(())

    def versions(self) -> dict[str, str]:
        """Versions of the game by the names of its parts, where it is not part of this package.

        They belong to the identity of a run: runs with different ones are neither continued nor joined.
        """
        return {}

    def running(self, seeds: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """A context around a run of ``seeds``, which looks at `failure` after its compiled calls and raises it."""
        del seeds
        return contextlib.nullcontext()

    def failure(self) -> BaseException | None:
        """What ended it during a run: from then on its episodes end at once, and the run must end, too."""
        return None

    def facts(self) -> dict[str, Any]:
        """What a run's summary tells of it."""
        return {}


class ExternalPackage(External):
    """A game that another package implements in JAX: its version decides what the numbers of a run mean."""

    def __init__(self, package: str) -> None:
        """Names the package, as pip does."""
        self._package = package

    def versions(self) -> dict[str, str]:
        """The installed version of the package; "unknown" where it was not installed as a package."""
        try:
            return {self._package: importlib.metadata.version(self._package)}
        except importlib.metadata.PackageNotFoundError:
            return {self._package: "unknown"}


class Environment(abc.ABC):
    """A cooperative multi-agent task as pure functions of an ``env_state`` pytree.

    Attributes:
        viewer_class: the class that draws its episodes, ``MODULE:CLASS``, constructed with the environment; None where
            no class does. A name and not the class, because drawing needs libraries that training doesn't.
    """

    viewer_class: ClassVar[str | None] = None

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
        """What the agents and the central nets see of ``env_state``; a pure function of it.

        An agent without any available action plays action 0, which `step` should then ignore, and learns as if action 0
        were its only available one. To rely on this is fine for an agent that has left the game.
        """

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Scalars read off an episode's last state (a win, say), averaged over evaluation episodes. None by default."""
        del env_state
        return {}

    def compress(self, env_state: EnvState) -> PyTree:
        """How one step lies in the replay. Integer, bool and float leaves of any width are stored as their bytes.

        By default the observation itself, with the features in `storage_dtype`. An environment whose observation can be
        recomputed from less overrides `compress` and `decompress` together.
        """
        seen = self.observe(env_state)
        return Observation(
            obs=seen.obs.astype(self.storage_dtype),
            state=seen.state.astype(self.storage_dtype),
            avail_actions=jnp.packbits(seen.avail_actions),
        )

    def decompress(self, compressed: PyTree) -> Observation:
        """The exact inverse: the `Observation` of the state that was compressed."""
        spec = self.spec
        bits = jnp.unpackbits(compressed.avail_actions, count=spec.num_agents * spec.num_actions)
        return Observation(
            obs=compressed.obs.astype(jnp.float32),
            state=compressed.state.astype(jnp.float32),
            avail_actions=bits.reshape(spec.num_agents, spec.num_actions).astype(bool),
        )

    @property
    def storage_dtype(self) -> Any:
        """The narrowest dtype that holds every obs and state feature exactly; used by the default `compress`."""
        return jnp.float32

    def reset_batch(self, keys: PRNGKey) -> EnvState:
        """`reset` over a leading axis of keys."""
        return jax.vmap(self.reset)(keys)

    def step_batch(self, env_state: EnvState, joint_action: Array, keys: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """`step` over a leading axis."""
        return jax.vmap(self.step)(env_state, joint_action, keys)

    def viewer(self) -> Viewer | None:
        """Returns a new object of `viewer_class`, None where that is None."""
        return None if self.viewer_class is None else pkgutil.resolve_name(self.viewer_class)(self)

    # The rest is for environments that live outside of JAX, where a step may fail and games must be ended.

    @property
    def external(self) -> External:
        """What of it lives outside of the compiled program."""
        return External()

    def failed(self, env_state: EnvState) -> Array:
        """Whether the step to ``env_state`` never happened: the episode ends before it, and it is not recorded."""
        del env_state
        return jnp.bool_(False)

    def for_evaluation(self) -> Self:
        """The environment that plays evaluation episodes; itself, unless the two would share something that changes."""
        return self

    def episodes_at_once(self, num_episodes: int) -> int:
        """How many of a seed's ``num_episodes`` evaluation episodes are played side by side."""
        return num_episodes


def without_weak_types(tree: PyTree) -> PyTree:
    """The same values with strong dtypes.

    Some libraries reset to Python scalars, whose weak types would make another loop state, and another compilation,
    after the first step.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tree)
