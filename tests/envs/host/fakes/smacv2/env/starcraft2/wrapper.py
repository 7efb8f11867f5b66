"""SMACv2's wrapper, whose distributions have separate generators, and whose reset returns nothing."""

from random import choice, shuffle

import numpy as np
from battle import StarCraft2Client

from smacv2.env.starcraft2.maps import smac_maps


class Positions:
    """A distribution whose parts draw, too, like SurroundedAndReflectPositionDistribution."""

    class Uniform:
        def __init__(self, n_units):
            self.n_units, self.rng = n_units, np.random.default_rng()

        def generate(self):
            return {"item": self.rng.integers(0, 4, self.n_units)}

    def __init__(self, config):
        self.p, self.rng = config["p"], np.random.default_rng()
        self.pos_generator = self.Uniform(config["n_units"])

    def generate(self):
        offset = self.rng.random() > self.p
        return {"ally_start_positions": {"item": (self.pos_generator.generate()["item"] + offset) % 4}}


class Teams:
    def __init__(self, config):
        self.units, self.weights, self.n_units = config["unit_types"], config["weights"], config["n_units"]
        self.n_enemies, self.rng = config["n_enemies"], np.random.default_rng()

    def generate(self):
        team = list(self.rng.choice(self.units, size=self.n_units, p=self.weights))
        shuffle(team)
        enemies = [team[index % len(team)] for index in range(self.n_enemies)]
        return {"team_gen": {"ally_team": team, "enemy_team": enemies}}


class Fixed:
    """Draws one entry of a list, or one after another; it shuffles the entries."""

    def __init__(self, config):
        self.teams, self.test_mode, self.index = config["items"], config["test_mode"], 0

    def generate(self):
        drawn = self.teams[self.index] if self.test_mode else choice(self.teams)
        self.index = (self.index + self.test_mode) % len(self.teams)
        shuffle(drawn)
        return {"health": {"item": drawn}}


class StarCraft2Env(StarCraft2Client):
    def __init__(
        self,
        map_name="8m",
        difficulty="7",
        game_version=None,
        seed=None,
        continuing_episode=False,
        obs_own_pos=False,
        conic_fov=False,
        reward_death_value=10,
        reward_win=200,
        reward_scale_rate=20,
        use_unit_ranges=False,
        min_attack_range=2,
        heuristic_ai=False,
        capability_config={},  # noqa: B006 (as there)
    ):
        limit = smac_maps.get_smac_map_registry()[map_name]["limit"]
        counts = capability_config["n_units"], capability_config["n_enemies"]
        rewards = reward_death_value, reward_win, reward_scale_rate
        self.prepare(*counts, limit, seed, continuing_episode, *rewards, slow=0)
        self.units = capability_config["team_gen"]["unit_types"]

    def reset(self, episode_config={}):  # noqa: B006 (as there)
        self.begin()
        self._battle.positions[:] = episode_config["ally_start_positions"]["item"]
        teams = episode_config["team_gen"]
        self._battle.allies[:] = [1 + self.units.index(unit) for unit in teams["ally_team"]]
        self._battle.enemies[:] = [1 + self.units.index(unit) for unit in teams["enemy_team"]]
        self._battle.allies += episode_config.get("health", {}).get("item", 0)
        self.init_units()


class StarCraftCapabilityEnvWrapper:
    def __init__(self, **kwargs):
        config = kwargs["capability_config"]
        counts = {"n_units": config["n_units"], "n_enemies": config["n_enemies"]}
        self.env_key_to_distribution_map = {
            "team_gen": Teams({**config["team_gen"], **counts}),
            "start_positions": Positions({**config["start_positions"], **counts}),
        }
        if "health" in config:
            self.env_key_to_distribution_map["health"] = Fixed(config["health"])
        self.env = StarCraft2Env(**kwargs)

    def reset(self):
        drawn = {}
        for distribution in self.env_key_to_distribution_map.values():
            drawn.update(distribution.generate())
        return self.env.reset(drawn)

    def step(self, actions):
        return self.env.step(actions)

    def __getattr__(self, name):
        return getattr(self.env, name)
