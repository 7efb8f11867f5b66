"""A small battle with the rules of SMAC's client, for the fakes of its packages."""

import collections
import os
from pathlib import Path

import numpy as np

HEALTH, KILL, WIN = 3, 10, 200

Unit = collections.namedtuple("Unit", "health_max shield_max")


class Battle:
    """Units in a row shoot at one another; a unit that is shot loses a point; enemies draw their targets."""

    def __init__(self, n_agents, n_enemies, seed):
        self.n_agents, self.n_enemies = n_agents, n_enemies
        self.n_actions = 6 + n_enemies
        self.rng = np.random.default_rng(seed)
        self.begin()

    def begin(self):
        self.allies = np.full(self.n_agents, HEALTH)
        self.enemies = np.full(self.n_enemies, HEALTH)
        self.positions = self.rng.integers(0, 4, self.n_agents)
        self.last_action = np.zeros((self.n_agents, self.n_actions))

    def get_obs_agent(self, agent):
        if self.allies[agent] == 0:
            return np.zeros(self.get_obs_size(), np.float32)
        seen = [self.allies[agent], self.positions[agent], *self.enemies]
        return np.array(seen, np.float32) / 4

    def get_obs(self):
        return [self.get_obs_agent(agent) for agent in range(self.n_agents)]

    def get_state(self):
        parts = self.allies, self.enemies, self.positions, self.last_action.flatten()
        return np.concatenate(parts).astype(np.float32)

    def get_obs_size(self):
        return 2 + self.n_enemies

    def get_state_size(self):
        return 2 * self.n_agents + self.n_enemies + self.n_agents * self.n_actions

    def get_avail_agent_actions(self, agent):
        if self.allies[agent] == 0:
            return [1] + [0] * (self.n_actions - 1)
        position = self.positions[agent]
        moves = [0, 1, int(position < 3), int(position > 0), 0, 0]
        return moves + [int(health > 0) for health in self.enemies]

    def fight(self, actions, *, at_once=False, kill=KILL):
        """Plays one step and returns the points that the enemies lost and those for the dead; the dying still shoot."""
        for agent, action in enumerate(actions):
            assert self.get_avail_agent_actions(agent)[action] == 1, f"Agent {agent} cannot perform action {action}"
            assert action != 0 or self.allies[agent] == 0, "No-op only available for dead agents."
        self.last_action = np.eye(self.n_actions)[np.array(actions)]
        before = self.enemies.copy()
        for agent, action in enumerate(actions):
            self.positions[agent] += (action == 2) - (action == 3)
            if action >= 6:
                self.enemies[action - 6] = max(0, self.enemies[action - 6] - 1)
        alive = np.flatnonzero(self.allies)
        if (before if at_once else self.enemies).any() and len(alive):
            self.allies[self.rng.choice(alive)] -= 1
        return float((before - self.enemies).sum() + kill * ((before > 0) & (self.enemies == 0)).sum())


class StarCraft2Client:
    """Behaviour that `StarCraft2Env` of SMAC and SMACv2 share: when it launches, how it ends, and how it hides a crash.

    Its quirks are those of the real one: the first battle that ends, not the first reset, is the last to launch a game
    and to add to the scale of the rewards, and each look at the map adds to it again.
    """

    def prepare(self, n_agents, n_enemies, episode_limit, seed, continuing_episode, death_value, win, scale_rate, slow):
        self.n_agents, self.n_enemies, self.episode_limit = n_agents, n_enemies, episode_limit
        self._seed, self.continuing_episode = seed, continuing_episode
        self.reward_death_value, self.reward_win, self.reward_scale_rate = death_value, win, scale_rate
        self.max_reward = n_enemies * death_value + win
        self.n_actions = 6 + n_enemies
        self._episode_count = self._episode_steps = self._total_steps = self.force_restarts = self._resets = 0
        self._battle, self.enemies, self.slow, self.launches = None, {}, slow, 0

    def _launch(self):
        self.launches += 1
        assert self.launches <= int(os.environ.get("FAKE_SC2_LAUNCHES", "9")), "one more game"
        self._battle = Battle(self.n_agents, self.n_enemies, self._seed)

    def init_units(self):
        """Looks at the map, twice where the game is slow to create its units."""
        for _ in range(1 + self.slow):
            self.enemies = {index: Unit(int(health), 0) for index, health in enumerate(self._battle.enemies)}
            if self._episode_count == 0:
                self.max_reward += sum(unit.health_max + unit.shield_max for unit in self.enemies.values())

    def full_restart(self):
        self._launch()
        self.force_restarts += 1

    def _crashes(self, during, count):
        """Returns True once where ``FAKE_SC2_CRASH`` asks for it: ``step:2:FOLDER`` at the second step of all."""
        when, number, folder = os.environ.get("FAKE_SC2_CRASH", "never:0:").split(":")
        if when != during or count != int(number):
            return False
        try:
            Path(folder, f"crashed-{during}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def begin(self):
        self._episode_steps = 0
        if self._episode_count == 0:
            self._launch()
        else:
            self._battle.begin()
        self._resets += 1
        if self._crashes("reset", self._resets):
            self.full_restart()  # and continues with stale units

    def step(self, actions):
        actions = [int(action) for action in actions]
        self._total_steps += 1
        if self._crashes("step", self._total_steps):
            self.full_restart()
            return 0, True, {}
        reward = self._battle.fight(actions, kill=self.reward_death_value)
        self._episode_steps += 1
        allies, enemies = self._battle.allies, self._battle.enemies
        info = {"battle_won": False, "dead_allies": (allies == 0).sum(), "dead_enemies": (enemies == 0).sum()}
        terminated = False
        if not allies.any() or not enemies.any():
            terminated, info["battle_won"] = True, not enemies.any()
            reward += self.reward_win * info["battle_won"]
        elif self._episode_steps >= self.episode_limit:
            terminated = True
            if self.continuing_episode:
                info["episode_limit"] = True
        self._episode_count += terminated
        return reward / (self.max_reward / self.reward_scale_rate), terminated, info

    def get_obs(self):
        return self._battle.get_obs()

    def get_state(self):
        return self._battle.get_state()

    def get_avail_agent_actions(self, agent_id):
        return self._battle.get_avail_agent_actions(agent_id)

    def get_env_info(self):
        sizes = Battle(self.n_agents, self.n_enemies, 0)
        return {
            "state_shape": sizes.get_state_size(),
            "obs_shape": sizes.get_obs_size(),
            "n_actions": self.n_actions,
            "n_agents": self.n_agents,
            "episode_limit": self.episode_limit,
        }

    def close(self):
        self._battle = None
