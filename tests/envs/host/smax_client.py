"""SMAX with the interface of SMAC's client, in a worker: a real battle for the bridge, without StarCraft II.

Battles are computed eight wide, of which one is real, because XLA's results depend on the width in their last bits.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.config import load_group
from wqmix_jax.envs.host import adapters
from wqmix_jax.options import build

WIDTH = 8

jax.config.update("jax_disable_most_optimizations", True)


def make(map_name, episode_limit):
    return build("env", load_group("env", "smax") | {"map": map_name, "episode_limit": episode_limit})


def look(env, state):
    seen = env.observe(state)
    return seen.obs, seen.state, seen.avail_actions, env.metrics(state)


class SmaxClient:
    """The part of ``StarCraft2Env`` that the adapter uses."""

    def __init__(self, map_name, episode_limit, seed):
        env = make(map_name, episode_limit)
        self.spec, self.n_agents = env.spec, env.spec.num_agents
        self.force_restarts = self._episode_count = 0
        self._seed, self._episode_steps = seed, 0
        self._reset = jax.jit(jax.vmap(env.reset))
        self._step = jax.jit(jax.vmap(env.step))
        self._look = jax.jit(jax.vmap(lambda state: look(env, state)))

    def seed(self, seed):
        self._seed = seed

    def get_env_info(self):
        sizes = self.spec
        return {
            "state_shape": sizes.state_dim,
            "obs_shape": sizes.obs_dim,
            "n_actions": sizes.num_actions,
            "n_agents": sizes.num_agents,
            "episode_limit": sizes.episode_limit,
        }

    def _keys(self, number):
        return jnp.repeat(jax.random.fold_in(jax.random.key(self._seed), number)[None], WIDTH)

    def _see(self):
        self._seen = jax.tree.map(lambda leaf: np.asarray(leaf)[0], self._look(self._state))

    def reset(self):
        self._episode_steps = 0
        self._state = self._reset(self._keys(0))
        self._see()

    def step(self, actions):
        self._episode_steps += 1
        wide = jnp.tile(jnp.asarray(actions, jnp.int32), (WIDTH, 1))
        self._state, outcome = self._step(self._state, wide, self._keys(self._episode_steps))
        self._see()
        reward, terminated, truncated = (np.asarray(leaf)[0] for leaf in outcome)
        *_, metrics = self._seen
        info = {"battle_won": bool(metrics["win_rate"])}
        info.update({name: int(metrics[name]) for name in ("dead_allies", "dead_enemies")})
        info.update({"episode_limit": True} if truncated else {})
        return float(reward), bool(terminated or truncated), info

    def get_obs(self):
        return list(self._seen[0])

    def get_state(self):
        return self._seen[1]

    def get_avail_agent_actions(self, agent_id):
        return [int(available) for available in self._seen[2][agent_id]]

    def close(self):
        pass


class Smax(adapters.SMAC):
    """The adapter of SMAC over it; the packages that it looks for are not needed."""

    def __init__(self, seed, map_name, episode_limit):
        self.env, self.game, self.launched = SmaxClient(map_name, episode_limit, seed), {}, False

    def reset(self, seed):
        self.env.seed(seed)
        super().reset(seed)

    def scale_rewards(self):
        """Does nothing: SMAX scales its rewards itself."""
