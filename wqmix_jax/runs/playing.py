"""Greedy episodes of a run's policies: figures of many, and a picture of one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.envs.base import Environment, Viewer
from wqmix_jax.errors import RunError
from wqmix_jax.networks.functional import compute_in
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.records.atomic import atomic
from wqmix_jax.runs.saved_policies import GREEDY, GreedyPolicy, play_episode
from wqmix_jax.training.compile_cache import cache_faults_in_one_line
from wqmix_jax.training.devices import jax_precision
from wqmix_jax.training.rollout import Figures, greedy_episodes
from wqmix_jax.types import Moment, PRNGKey, PyTree


def play_policies(
    env: Environment, policies: Mapping[str, GreedyPolicy], *, episodes: int, seed: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Plays greedy episodes with each of a run's policies; compiled once for all of them.

    Args:
        env: the environment.
        policies: the policies by their names; they differ in parameters and swept values alone.
        episodes: number of episodes of each policy.
        seed: seed of the episodes' random numbers, the same for all policies.

    Yields:
        The policy's name, and its figures ``[episodes]`` by their names in the records.

    Raises:
        RunError: if the environment failed in all episodes of a policy.
    """
    first = next(iter(policies.values()))
    key = jax.random.key(seed, impl="threefry2x32")
    precision = jax_precision(first.matmul_precision, jax.default_backend())
    env.external.sharding()  # refuses if the host can't be called

    @jax.jit
    def play(params: PyTree, hp: PyTree, ctx: Context, keys: PRNGKey) -> Figures:
        with pinned_draws(), jax.default_matmul_precision(precision), compute_in(first.compute_dtype):
            return greedy_episodes(env, first.algo, params, hp, ctx, keys, num_episodes=episodes)

    for name, policy in policies.items():
        hp = hyperparams(policy.algo)  # with the member's own values of swept options
        one_seed = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (policy.params, hp, GREEDY, key))
        with env.external.running([seed]), cache_faults_in_one_line():
            played = jax.tree.map(lambda leaf: np.asarray(leaf)[0], play(*one_seed))
        if not played.whole.any():
            which = f" of seed {name}" if name else ""
            raise RunError(f"all {episodes} episodes{which} failed in the simulator: the warnings above say why")
        figures = {"episode_return": played.episode_return, "episode_length": played.episode_length, **played.metrics}
        yield name, {figure: values[played.whole] for figure, values in figures.items()}


def film_episode(env: Environment, policy: GreedyPolicy, viewer: Viewer, path: Path, *, seed: int) -> list[Moment]:
    """Plays a greedy episode and draws it; the file is replaced when the picture is complete.

    Args:
        env: the environment.
        policy: the agents.
        viewer: draws the environment's states.
        path: a GIF.
        seed: seed of the episode's random numbers.

    Returns:
        All moments of the episode.
    """
    moments = play_episode(env, policy, jax.random.key(seed, impl="threefry2x32"))
    with atomic(path) as temporary:
        viewer.film(moments, str(temporary))
    return moments
