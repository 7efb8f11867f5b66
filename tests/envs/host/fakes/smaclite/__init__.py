"""SMAClite, registered with gymnasium: plain integers, no limit, no ``get_env_info``, no counts of the dead."""

import gymnasium
import numpy as np
from battle import Battle


class SMACliteEnv(gymnasium.Env):
    def __init__(self, n_agents=3, n_enemies=3, use_cpp_rvo2=False):
        self._battle = Battle(n_agents, n_enemies, 0)
        self.n_agents, self.n_enemies, self.n_actions = n_agents, n_enemies, self._battle.n_actions
        self.obs_size, self.state_size = self._battle.get_obs_size(), self._battle.get_state_size()

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
        return tuple(self._battle.get_obs()), {}

    def step(self, actions):
        assert all(type(action) is int for action in actions)
        reward = self._battle.fight(actions)
        return tuple(self._battle.get_obs()), reward, not (self.agents and self.enemies), False, {}

    def get_state(self):
        return self._battle.get_state()

    def get_avail_actions(self):
        return [np.array(self._battle.get_avail_agent_actions(agent)) for agent in range(self.n_agents)]


for name, units in {"3m": (3, 3), "3s5z": (8, 8)}.items():
    gymnasium.register(
        f"smaclite/{name}-v0", "smaclite:SMACliteEnv", kwargs={"n_agents": units[0], "n_enemies": units[1]}
    )
gymnasium.register("smaclite/custom-v0", "smaclite:SMACliteEnv")
