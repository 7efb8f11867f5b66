"""The environment protocol: a spec, three pure functions, and further methods that have defaults.

A new environment is one subclass of `Environment` in one file and one yaml in ``configs/env``. All functions take and
return single, unbatched pytrees; the trainer batches them with `jax.vmap` through the ``*_batch`` methods. An
environment that is batched by nature, such as the bridge to a simulator outside of JAX, overrides these instead.
"""

import abc
import contextlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from wqmix_jax.errors import ConfigError
from wqmix_jax.ops.randomness import defines_last
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
    """The part of an environment outside of the compiled program (worker processes). Pure JAX environments have none.

    This class is that of pure environments; subclasses override what they need.
    """

    def sharding(self) -> Sharding | None:
        """Returns the device that must train all seeds; None where any number of devices can share them.

        Raises:
            ConfigError: if the device's runtime lacks something that the environment needs.
        """
        return None

    def lines(self, num_seeds: int, num_envs: int) -> Iterator[str]:
        """Yields the lines that are printed before a run starts."""
        del num_seeds, num_envs
        return iter(())

    def versions(self) -> dict[str, str]:
        """Returns the versions of a game outside of this package, by the names of its parts.

        They belong to the identity of a run: runs with different versions are neither continued nor joined.
        """
        return {}

    def running(self, seeds: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Returns a context around a run of ``seeds``, which raises `failure` at its end.

        The run reads `failure` after each compiled call and leaves the context when there is one.
        """
        del seeds
        return contextlib.nullcontext()

    def failure(self) -> BaseException | None:
        """Returns the error that ended the simulators during a run, None while they work.

        After an error all episodes end immediately, and the run must end, too.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Returns entries for the run's summary."""
        return {}


class ExternalPackage(External):
    """A game that another package implements in JAX: the numbers of a run depend on its version."""

    def __init__(self, package: str) -> None:
        """Keeps the package's name, as pip spells it."""
        self._package = package

    def versions(self) -> dict[str, str]:
        """Returns the installed version of the package; "unknown" if it was not installed as a package."""
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
        """Plays ``joint_action`` (``[N]`` int32) and returns the next state and its outcome.

        It never resets: a terminal state is returned as it is.
        """

    def sample_noise(self, key: PRNGKey) -> PyTree:
        """Draws all random numbers of one step; by default they are the key itself, from which `step` draws.

        The trainer draws for many steps in one call, before it plays them: on a GPU or TPU, draws within a step cost
        more time than most environments do. An environment that has random steps and should be fast there overrides
        this and `transition` together, and defines ``step(env_state, joint_action, key)`` as ``transition(env_state,
        joint_action, sample_noise(key))``. A subclass that overrides `step` alone is played by that `step`.
        """
        return key

    def transition(self, env_state: EnvState, joint_action: Array, noise: PyTree) -> tuple[EnvState, StepOutcome]:
        """Returns what `step` returns, from random numbers that `sample_noise` has drawn."""
        return self.step(env_state, joint_action, noise)

    @abc.abstractmethod
    def observe(self, env_state: EnvState) -> Observation:
        """Returns what the agents and the central networks see of ``env_state``, as a pure function of it.

        An agent without any available action plays action 0, which `step` should then ignore, and learns as if action 0
        were its only available one. An environment may rely on this for agents that have left the game.
        """

    def metrics(self, env_state: EnvState) -> dict[str, Array]:
        """Returns scalars of an episode's last state (a win, say); evaluation averages them over its episodes."""
        del env_state
        return {}

    def compress(self, env_state: EnvState) -> PyTree:
        """Returns the form in which the replay stores ``env_state``.

        Its leaves are integers, bools or floats of any width; the replay stores their bytes. By default they are the
        observation itself, with the features in `storage_dtype` and eight available actions to a byte. An environment
        whose observation can be recomputed from less data overrides `compress` and `decompress` together.
        """
        seen = self.observe(env_state)
        return Observation(
            obs=seen.obs.astype(self.storage_dtype),
            state=seen.state.astype(self.storage_dtype),
            avail_actions=jnp.packbits(seen.avail_actions),
        )

    def decompress(self, compressed: PyTree) -> Observation:
        """Returns the `Observation` of the state that was compressed, exactly as `observe` returns it."""
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
        """Applies `reset` over a leading axis of keys."""
        return jax.vmap(self.reset)(keys)

    def step_batch(self, env_state: EnvState, joint_action: Array, keys: PRNGKey) -> tuple[EnvState, StepOutcome]:
        """Applies `step` over a leading axis."""
        return jax.vmap(self.step)(env_state, joint_action, keys)

    def viewer(self) -> Viewer | None:
        """Returns a new object of `viewer_class`, None where that is None.

        Raises:
            ConfigError: if the class can't be imported.
        """
        if self.viewer_class is None:
            return None
        try:
            viewer = pkgutil.resolve_name(self.viewer_class)
        except Exception as error:  # a user's module may raise anything
            where = f"{type(self).__name__}.viewer_class={self.viewer_class!r}"
            raise ConfigError(f"{where} can't be imported: {error}") from error
        return viewer(self)

    # The rest is for environments outside of JAX, where a step may fail and games must be ended.

    @property
    def external(self) -> External:
        """The part of the environment outside of the compiled program."""
        return External()

    def failed(self, env_state: EnvState) -> Array:
        """Returns a scalar bool, True if the step to ``env_state`` failed.

        Then the episode ends before that step, which is not recorded.
        """
        del env_state
        return jnp.bool_(False)

    def for_evaluation(self) -> Self:
        """Returns the environment that plays evaluation episodes; itself, unless both would change something shared."""
        return self

    def episodes_at_once(self, num_episodes: int) -> int:
        """Returns how many of a seed's ``num_episodes`` evaluation episodes are played in parallel."""
        return num_episodes


class Step(NamedTuple):
    """An environment's steps, for the trainer: all random numbers of a step first, then the step without any.

    Attributes:
        sample_noise: ``key -> noise``, of one environment.
        play: ``(env_state, joint_action, noise) -> (EnvState, StepOutcome)``, of a batch, leaves ``[F, ..]``.
    """

    sample_noise: Callable[[PRNGKey], PyTree]
    play: Callable[[EnvState, Array, PyTree], tuple[EnvState, StepOutcome]]


def draws_ahead(env: Environment) -> bool:
    """Returns True if the class of ``env`` defines `transition`, and no subclass of that class defines `step`."""
    return defines_last(type(env), "transition", over=("step", "step_batch"))


def step_of(env: Environment) -> Step:
    """Returns the steps of ``env``: those of `transition` if it `draws_ahead`, of `step` otherwise."""
    if draws_ahead(env):
        return Step(env.sample_noise, jax.vmap(env.transition))
    return Step(lambda key: key, env.step_batch)


def is_inside_jax(env: Environment) -> bool:
    """Returns True if nothing outside of the compiled program plays: then a step that isn't needed does no harm."""
    return type(env.external) in (External, ExternalPackage)


def without_weak_types(tree: PyTree) -> PyTree:
    """Returns the same values with strong dtypes.

    Some libraries reset to Python scalars. Their weak types would give the loop another state, and so another
    compilation, after the first step.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tree)
