"""The protocol of a simulator outside of JAX, as a worker drives it."""

from collections.abc import Sequence
from typing import Any, Protocol


class Simulator(Protocol):
    """One game; a worker process makes one object of such a class and calls only the methods named here.

    The class needs no base class, and its file imports nothing of this package: it runs in the interpreter
    ``env.worker_python``. Its constructor takes ``seed`` and the options of the yaml by name, and is quick: a game
    starts in the first reset. After an exception from any method the worker is replaced, and the failed step is not
    learned from. Three more methods are optional: ``metrics() -> dict`` (a float for each name in
    ``info()["metrics"]``, for the episode so far), ``versions() -> dict`` (recorded in each run) and ``close()``.
    """

    def info(self) -> dict[str, Any]:
        """Returns num_agents, num_actions, obs_dim, state_dim, episode_limit; optionally metrics, a list of names."""
        ...

    def reset(self, seed: int) -> None:
        """Begins an episode; runs can be repeated exactly if all its randomness comes from ``seed``."""
        ...

    def step(self, joint_action: list[int]) -> tuple[float, bool, bool]:
        """Plays one step and returns ``reward, terminated, truncated``; see `wqmix_jax.types.StepOutcome`.

        It never begins the next episode by itself.
        """
        ...

    def observe(self) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Returns obs ``[N, O]``, state ``[D]`` and avail_actions ``[N, A]``, also after the end of an episode.

        All numbers are finite. Until the episode ends, every agent needs at least one available action; an agent
        without any is an error of the simulator. The rows of an agent that has left hold any finite observation,
        usually zeros, and one available action, which does nothing.
        """
        ...
