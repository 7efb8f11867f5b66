"""SMACv2's wrapper, whose distributions have generators of their own, and whose reset returns nothing."""

from random import shuffle

import numpy as np
from battle import StarCraft2Client

from smacv2.env.starcraft2.maps import smac_maps


class Positions:
    """With parts that draw, too, as SurroundedAndReflectPositionDistribution has."""

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
        self.rng = np.random.default_rng()

    def generate(self):
        team = list(self.rng.choice(self.units, size=self.n_units, p=self.weights))
        shuffle(team)
        return {"team_gen": {"ally_team": team}}


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
        use_unit_ranges=False,
        min_attack_range=2,
        capability_config={},  # noqa: B006 (as there)
    ):
        limit = smac_maps.get_smac_map_registry()[map_name]["limit"]
        counts = capability_config["n_units"], capability_config["n_enemies"]
        self.prepare(*counts, limit, seed, continuing_episode, 1.0)
        self.units = capability_config["team_gen"]["unit_types"]

    def reset(self, episode_config={}):  # noqa: B006 (as there)
        self.begin()
        self._battle.positions[:] = episode_config["ally_start_positions"]["item"]
        team = episode_config["team_gen"]["ally_team"]
        self._battle.allies[:] = [1 + self.units.index(unit) for unit in team]


class StarCraftCapabilityEnvWrapper:
    def __init__(self, **kwargs):
        config = kwargs["capability_config"]
        counts = {"n_units": config["n_units"], "n_enemies": config["n_enemies"]}
        self.env_key_to_distribution_map = {
            "team_gen": Teams({**config["team_gen"], **counts}),
            "start_positions": Positions({**config["start_positions"], **counts}),
        }
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
