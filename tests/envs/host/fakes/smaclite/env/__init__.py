"""SMAClite: plain integers, no limit, no ``get_env_info``, no counts of the dead.

Its quirks are those of the real one: any option is taken, the last actions survive a reset, and where both sides die
together it reports a win and rewards it.
"""

import gymnasium
import numpy as np
from battle import HEALTH, KILL, WIN, Battle


class SMACliteEnv(gymnasium.Env):
    def __init__(self, map_info=None, map_file=None, seed=None, use_cpp_rvo2=False, **kwargs):
        n_agents, n_enemies = map_info
        self._battle = Battle(n_agents, n_enemies, 0)
        self.n_agents, self.n_enemies, self.n_actions = n_agents, n_enemies, self._battle.n_actions
        self.obs_size, self.state_size = self._battle.get_obs_size(), self._battle.get_state_size()
        self.last_actions = np.zeros(n_agents * self.n_actions)

    @property
    def agents(self):
        return dict.fromkeys(np.flatnonzero(self._battle.allies))

    @property
    def enemies(self):
        return dict.fromkeys(np.flatnonzero(self._battle.enemies))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self._battle.rng = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002 (as there)
        self._battle.begin()
        self.max_reward = self.n_enemies * (KILL + HEALTH) + WIN
        return tuple(self._battle.get_obs()), {}

    def step(self, actions):
        assert all(type(action) is int for action in actions)
        self.last_actions = np.eye(self.n_actions)[np.array(actions)].flatten()
        reward = self._battle.fight(actions, at_once=True)
        won = not self.enemies
        reward = (reward + WIN * won) / (self.max_reward / 20)
        return tuple(self._battle.get_obs()), reward, won or not self.agents, False, {"battle_won": won}

    def get_state(self):
        state = self._battle.get_state()
        state[-len(self.last_actions) :] = self.last_actions
        return state

    def get_avail_actions(self):
        return [np.array(self._battle.get_avail_agent_actions(agent)) for agent in range(self.n_agents)]
