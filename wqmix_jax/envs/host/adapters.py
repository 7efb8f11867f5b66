"""SMAC, SMACv2 and SMAClite as simulators of the host protocol; `wqmix_jax.envs.host.simulator` documents it.

Loaded by a worker, in the interpreter that has the game: Python 3.7 or newer, and nothing of this package.
"""

import importlib
import os
import random
import sys

import numpy as np

METRICS = ["win_rate", "dead_allies", "dead_enemies"]


class SetupError(Exception):
    """Something is not installed; the message is a whole sentence."""


class SMAC:
    """The StarCraft Multi-Agent Challenge (Samvelyan et al. 2019), https://github.com/oxwhirl/smac."""

    package, repository = "smac", "https://github.com/oxwhirl/smac.git"
    namesake = "PyPI's smac, a package for hyperparameters"

    def __init__(self, seed, **options):
        """Makes the environment and looks for the game and the map; the game itself starts with the first reset.

        Args:
            seed: of the game, which has no other.
            **options: those of ``StarCraft2Env``.
        """
        self.check_package()
        self.env = self.make(seed=seed, **options)
        self.game = find_game(options["map_name"], options.get("game_version"))
        self.won = self.dead_allies = self.dead_enemies = 0

    def check_package(self):
        """Refuses where the package is absent, or another one has its name."""
        name, python = self.package, sys.executable
        advice = f"pip install git+{self.repository} 'protobuf<3.21'; env.worker_python=PYTHON names another Python"
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SetupError(f"{name} can't be imported by {python} ({error}): {advice}") from error
        try:
            importlib.import_module(name + ".env")
        except ImportError as error:
            if getattr(error, "name", None) == name + ".env":
                other = f"{name} in {python} is another package ({self.namesake})"
                raise SetupError(f"{other}: pip uninstall {name}, then {advice}") from error
            raise SetupError(f"{name}.env can't be imported by {python} ({one_line(error)})") from error
        except TypeError as error:  # from a newer protobuf, for code that an older one generated
            needs = f"{name}.env can't be imported by {python}: pip install 'protobuf<3.21'"
            raise SetupError(f"{needs} ({one_line(error)})") from error

    def make(self, **options):
        """The environment itself."""
        maps = importlib.import_module("smac.env.starcraft2.maps.smac_maps")
        refuse_unknown(options["map_name"], maps.get_smac_map_registry())
        return importlib.import_module("smac.env").StarCraft2Env(**options)

    def versions(self):
        """Of the package and of the game; numbers of different games are not comparable."""
        return dict({self.package: version_of(self.package)}, **self.game)

    def info(self):
        """The sizes."""
        sizes = self.env.get_env_info()
        return {
            "num_agents": sizes["n_agents"],
            "num_actions": sizes["n_actions"],
            "obs_dim": sizes["obs_shape"],
            "state_dim": sizes["state_shape"],
            "episode_limit": sizes["episode_limit"],
            "metrics": METRICS,
        }

    def reset(self, seed):
        """The next battle; of the seed, StarCraft II takes no notice after its launch."""
        self.env.reset()  # what it returns is None in some versions
        self.refuse_restart()
        self.won = self.dead_allies = self.dead_enemies = 0

    def step(self, joint_action):
        """The reward, and how the battle ended: at its time limit only with ``continuing_episode``, as in PyMARL."""
        reward, terminated, info = self.env.step(joint_action)
        self.refuse_restart()
        if terminated and not info:
            raise RuntimeError("StarCraft II crashed, and SMAC restarted it")
        self.won = info["battle_won"]
        self.dead_allies, self.dead_enemies = info["dead_allies"], info["dead_enemies"]
        truncated = bool(info.get("episode_limit", False))
        return reward, terminated and not truncated, truncated

    def observe(self):
        """What the agents see, the state, and what each may do."""
        avail_actions = [self.env.get_avail_agent_actions(agent) for agent in range(self.env.n_agents)]
        return np.asarray(self.env.get_obs()), np.asarray(self.env.get_state()), np.asarray(avail_actions)

    def metrics(self):
        """Whether the battle was won, and how many died."""
        return dict(zip(METRICS, (self.won, self.dead_allies, self.dead_enemies)))

    def close(self):
        """Ends the game."""
        self.env.close()

    def refuse_restart(self):
        """A game that was restarted in silence leaves stale units and another scale of rewards."""
        if self.env.force_restarts:
            raise RuntimeError("StarCraft II crashed, and SMAC restarted it")


class SMACv2(SMAC):
    """SMACv2 (Ellis et al. 2023), https://github.com/oxwhirl/smacv2."""

    package, repository = "smacv2", "https://github.com/oxwhirl/smacv2.git"
    namesake = "not oxwhirl's"

    def make(self, **options):
        """The environment with its distributions of teams and positions."""
        maps = importlib.import_module("smacv2.env.starcraft2.maps.smac_maps")
        refuse_unknown(options["map_name"], maps.get_smac_map_registry())
        return importlib.import_module("smacv2.env.starcraft2.wrapper").StarCraftCapabilityEnvWrapper(**options)

    def reset(self, seed):
        """The next battle, whose teams and positions are drawn from the seed."""
        random.seed(seed)
        reseed(self.env.env_key_to_distribution_map, np.random.SeedSequence(seed))
        super().reset(seed)


class SMAClite:
    """SMAClite (Michalski et al. 2023), https://github.com/uoe-agents/smaclite; it needs no StarCraft II."""

    def __init__(self, seed, map_name, episode_limit, **options):
        """Makes the environment of a map; ``options`` are those of ``gymnasium.make``."""
        try:
            gymnasium = importlib.import_module("gymnasium")
            importlib.import_module("smaclite")  # registers its maps
        except ImportError as error:
            advice = "pip install git+https://github.com/uoe-agents/smaclite.git"
            raise SetupError(f"smaclite can't be imported by {sys.executable} ({error}): {advice}") from error
        maps = {name[9:-3] for name in gymnasium.registry if name.startswith("smaclite/")}
        refuse_unknown(map_name, maps - {"custom"})
        self.env = gymnasium.make(f"smaclite/{map_name}-v0", disable_env_checker=True, **options).unwrapped
        self.episode_limit = episode_limit
        self.obs = ()

    def versions(self):
        """Of the package."""
        return {"smaclite": version_of("smaclite")}

    def info(self):
        """The sizes; SMAClite itself knows no time limit."""
        return {
            "num_agents": self.env.n_agents,
            "num_actions": self.env.n_actions,
            "obs_dim": self.env.obs_size,
            "state_dim": self.env.state_size,
            "episode_limit": self.episode_limit,
            "metrics": METRICS,
        }

    def reset(self, seed):
        """The next battle; SMAClite draws from the global generators."""
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        self.obs, _ = self.env.reset(seed=seed)

    def step(self, joint_action):
        """The reward, and whether a side is dead."""
        self.obs, reward, terminated, truncated, _ = self.env.step(joint_action)
        return reward, terminated, truncated

    def observe(self):
        """What the agents see, the state, and what each may do."""
        return np.stack(self.obs), np.asarray(self.env.get_state()), np.asarray(self.env.get_avail_actions())

    def metrics(self):
        """Whether the battle was won, and how many died: units leave its dicts when they do."""
        allies, enemies = len(self.env.agents), len(self.env.enemies)
        dead = self.env.n_agents - allies, self.env.n_enemies - enemies
        return dict(zip(METRICS, (allies > 0 and enemies == 0, *dead)))

    def close(self):
        """Closes its window, if there is one."""
        self.env.close()


def refuse_unknown(name, names):
    """Refuses a map that the package doesn't have."""
    if name not in names:
        raise SetupError(f"map={name} is not allowed: choose one of {', '.join(sorted(names))}")


def find_game(map_name, game_version):
    """The version of the installed game, found without starting it.

    Raises:
        SetupError: where the game or the map's file is missing.
    """
    maps, run_configs = importlib.import_module("pysc2.maps"), importlib.import_module("pysc2.run_configs")
    advice = "install it and set SC2PATH to its folder"
    try:
        config = run_configs.get(version=game_version)
    except Exception as error:  # pysc2's own class has moved between its versions
        raise SetupError(f"StarCraft II is not found ({one_line(error)}): {advice}") from error
    if not os.path.isdir(config.data_dir):
        raise SetupError(f"StarCraft II is not found at {config.data_dir}: {advice}")
    try:
        config.map_data(maps.get(map_name).path)
    except Exception as error:
        copy = f"copy SMAC_Maps into {os.path.join(config.data_dir, 'Maps')}"
        raise SetupError(f"the file of map={map_name} is not found ({one_line(error)}): {copy}") from error
    return {"StarCraft II": describe(config)}


def describe(config):
    """``4.6.2 (build 69232)``; of the newest build where pysc2 doesn't know which version it is."""
    game_version = getattr(config.version, "game_version", None)
    build = getattr(config.version, "build_version", None)
    if not build or game_version == "latest":
        folder = os.path.join(config.data_dir, "Versions")
        builds = [name[4:] for name in os.listdir(folder) if name.startswith("Base")] if os.path.isdir(folder) else []
        build = max(map(int, builds)) if builds else build
        game_version = None if game_version == "latest" else game_version
    return f"{game_version} (build {build})" if game_version else f"build {build}"


def reseed(distributions, sequence):
    """Gives every generator inside SMACv2's distributions a stream of its own: they are born with random ones."""
    held = list(distributions.values())
    for found, child in zip(held, sequence.spawn(len(held))):
        if hasattr(found, "rng"):
            found.rng = np.random.default_rng(child)
        if hasattr(found, "__dict__"):
            parts = {name: part for name, part in vars(found).items() if hasattr(part, "generate")}
            reseed(parts, child)


def version_of(package):
    """As installed."""
    try:
        return importlib.import_module("importlib.metadata").version(package)
    except ImportError:  # Python 3.7 has no such module; or the package was only put on the path
        return "unknown"


def one_line(error):
    """An error's text."""
    return " ".join(str(error).split())
