"""What a simulator outside of JAX must do, to be driven by a worker."""

from collections.abc import Sequence
from typing import Any, Protocol


class Simulator(Protocol):
    """One game; a worker process makes one object of such a class and calls nothing else of it.

    The class needs no base, and its file nothing of this package: it runs in the interpreter ``env.worker_python``.
    Its constructor takes ``seed`` and the options of the yaml by name, and is quick: a game starts in the first reset.
    An exception from any method makes a failed step, which is not learned from, and a new worker. Optional beside
    those below are ``metrics() -> dict`` (a float for each name in ``info()["metrics"]``, of the episode so far),
    ``versions() -> dict`` (recorded in each run) and ``close()``.
    """

    def info(self) -> dict[str, Any]:
        """The sizes: num_agents, num_actions, obs_dim, state_dim, episode_limit; and metrics, a list of names."""
        ...

    def reset(self, seed: int) -> None:
        """Begins an episode; one that draws all it draws from ``seed`` makes runs that can be repeated exactly."""
        ...

    def step(self, joint_action: list[int]) -> tuple[float, bool, bool]:
        """Plays one step and returns ``reward, terminated, truncated``, as `wqmix_jax.types.StepOutcome` tells them.

        It never begins the next episode by itself.
        """
        ...

    def observe(self) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """What is seen now: obs ``[N, O]``, state ``[D]`` and avail_actions ``[N, A]``, of an ended episode too.

        All numbers are finite. Until the episode ends, every agent needs at least one available action; an agent
        without any is an error of the simulator. The rows of an agent that has left hold any finite observation, by
        custom zeros, and one available action, which does nothing.
        """
        ...
