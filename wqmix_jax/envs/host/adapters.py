"""SMAC, SMACv2 and SMAClite as simulators; `wqmix_jax.envs.host.simulator` documents their protocol.

A worker loads this file in the interpreter that has the game: Python 3.7 or newer, without this package.
"""

import copy
import difflib
import importlib
import inspect
import os
import random
import sys

import numpy as np

METRICS = ["win_rate", "dead_allies", "dead_enemies"]


class SetupError(Exception):
    """Something is not installed; the message is a complete sentence."""


class SMAC:
    """The StarCraft Multi-Agent Challenge (Samvelyan et al. 2019), https://github.com/oxwhirl/smac."""

    package, repository = "smac", "https://github.com/oxwhirl/smac.git"
    namesake = "PyPI's smac, a package for hyperparameters"
    maps_archive = "https://github.com/oxwhirl/smac/releases/download/v0.1-beta1/SMAC_Maps.zip"

    def __init__(self, seed, **options):
        """Makes the environment and looks for the game and the map; the game itself starts with the first reset.

        Args:
            seed: the only seed that the game gets.
            **options: arguments of ``StarCraft2Env``.
        """
        self.check_package()
        self.env = self.make(seed=seed, **options)
        self.game = find_game(options["map_name"], options.get("game_version"), self.maps_archive)
        self.launched = False
        self.won = self.dead_allies = self.dead_enemies = 0

    def check_package(self):
        """Refuses if the package is absent, or another package has its name."""
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
        """Makes the ``StarCraft2Env``."""
        maps = importlib.import_module("smac.env.starcraft2.maps.smac_maps")
        refuse_unknown(options["map_name"], maps.get_smac_map_registry())
        client = importlib.import_module("smac.env").StarCraft2Env
        refuse_unknown_options(options, client)
        refuse_heuristic(options)
        return client(**options)

    @property
    def client(self):
        """The ``StarCraft2Env``, which SMACv2 wraps."""
        return self.env

    def versions(self):
        """Returns the versions of package and game; numbers of different games are not comparable."""
        return dict({self.package: version_of(self.package)}, **self.game)

    def info(self):
        """Returns the sizes."""
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
        """Starts the next battle; StarCraft II ignores the seed after its launch."""
        if self.launched:
            self.count_first_battle()
        self.env.reset()  # what it returns is None in some versions
        self.launched = True
        self.refuse_restart()
        self.scale_rewards()
        self.won = self.dead_allies = self.dead_enemies = 0

    def count_first_battle(self):
        """Counts a first battle that was left before its end: otherwise the client would launch a second game."""
        self.client._episode_count = max(self.client._episode_count, 1)

    def scale_rewards(self):
        """Scales rewards by this battle's enemies, as the client intends to.

        The client adds up the enemies' health at each look at the map until its first battle has ended. So its scale
        depends on how quickly the game created the first units and, where units are drawn (SMACv2), on which battle a
        worker happened to play first: a resumed run or a replaced worker would change the rewards.
        """
        client = self.client
        points = sum(unit.health_max + unit.shield_max for unit in client.enemies.values())
        client.max_reward = client.n_enemies * client.reward_death_value + client.reward_win + points

    def step(self, joint_action):
        """Plays one step; a time limit counts as truncation only with ``continuing_episode``, as in PyMARL."""
        reward, terminated, info = self.env.step(joint_action)
        self.refuse_restart()
        if terminated and not info:
            raise RuntimeError("StarCraft II crashed, and SMAC restarted it")
        self.won = info["battle_won"]
        self.dead_allies, self.dead_enemies = info["dead_allies"], info["dead_enemies"]
        truncated = bool(info.get("episode_limit", False))
        return reward, terminated and not truncated, truncated

    def observe(self):
        """Returns the agents' observations, the state, and the available actions."""
        avail_actions = [self.env.get_avail_agent_actions(agent) for agent in range(self.env.n_agents)]
        return self.env.get_obs(), self.env.get_state(), avail_actions

    def metrics(self):
        """Returns whether the battle was won, and how many units died."""
        return dict(zip(METRICS, (self.won, self.dead_allies, self.dead_enemies)))

    def close(self):
        """Ends the game."""
        self.env.close()

    def refuse_restart(self):
        """Raises after a silent restart of the game, which leaves stale units and another scale of rewards."""
        if self.env.force_restarts:
            raise RuntimeError("StarCraft II crashed, and SMAC restarted it")


class SMACv2(SMAC):
    """SMACv2 (Ellis et al. 2023), https://github.com/oxwhirl/smacv2."""

    package, repository = "smacv2", "https://github.com/oxwhirl/smacv2.git"
    namesake = "not oxwhirl's"
    maps_archive = "https://github.com/oxwhirl/smacv2/releases/download/maps/SMAC_Maps.zip"

    def __init__(self, seed, **options):
        """Makes the environment, as `SMAC` does, and copies its distributions before the first draw."""
        super().__init__(seed, **options)
        self.undrawn = copy.deepcopy(self.env.env_key_to_distribution_map)

    def make(self, **options):
        """Makes the environment with its distributions of teams and positions."""
        maps = importlib.import_module("smacv2.env.starcraft2.maps.smac_maps")
        refuse_unknown(options["map_name"], maps.get_smac_map_registry())
        wrapper = importlib.import_module("smacv2.env.starcraft2.wrapper")
        refuse_unknown_options(options, wrapper.StarCraft2Env)
        refuse_heuristic(options)
        return wrapper.StarCraftCapabilityEnvWrapper(**options)

    @property
    def client(self):
        """See `SMAC.client`."""
        return self.env.env

    def reset(self, seed):
        """Starts the next battle, whose teams and positions are drawn from the seed alone."""
        random.seed(seed)
        # Some distributions shuffle their own lists, so a draw would depend on those before it.
        self.env.env_key_to_distribution_map = copy.deepcopy(self.undrawn)
        reseed(self.env.env_key_to_distribution_map, np.random.SeedSequence(seed))
        super().reset(seed)


class SMAClite:
    """SMAClite (Michalski et al. 2023), https://github.com/uoe-agents/smaclite; it needs no StarCraft II."""

    def __init__(self, seed, map_name, episode_limit, **options):
        """Makes the environment of a map; ``options`` are those of ``SMACliteEnv``."""
        gymnasium = self.check_packages()
        maps = {name[9:-3] for name in gymnasium.registry if name.startswith("smaclite/")}
        if not maps:
            raise SetupError(f"smaclite in {sys.executable} is of the time before gymnasium: {self.advice}")
        refuse_unknown(map_name, maps - {"custom"})
        if "max_episode_steps" in options:
            raise SetupError("options={max_episode_steps: ..} is not allowed: env.episode_limit is the time limit")
        refuse_unknown_options(options, importlib.import_module("smaclite.env").SMACliteEnv, "map_info", "map_file")
        self.env = gymnasium.make(f"smaclite/{map_name}-v0", disable_env_checker=True, **options).unwrapped
        self.episode_limit = episode_limit
        self.obs, self.won = (), False

    advice = "pip install -U git+https://github.com/uoe-agents/smaclite.git"

    def check_packages(self):
        """Returns gymnasium after SMAClite has registered its maps there."""
        try:
            gymnasium = importlib.import_module("gymnasium")
            importlib.import_module("smaclite")
        except ImportError as error:
            raise SetupError(f"smaclite can't be imported by {sys.executable} ({error}): {self.advice}") from error
        except OSError as error:  # rtree 1.0.0, which SMAClite asks for, has no library for Python 3.11 and newer
            if "libspatialindex" not in str(error):
                raise
            advice = "pip install -U 'rtree>=1.0.1'; pip's complaint that smaclite requires rtree 1.0.0 can be ignored"
            raise SetupError(f"smaclite can't be imported by {sys.executable} ({error}): {advice}") from error
        return gymnasium

    def versions(self):
        """Returns the version of the package."""
        return {"smaclite": version_of("smaclite")}

    def info(self):
        """Returns the sizes; SMAClite itself has no time limit."""
        return {
            "num_agents": self.env.n_agents,
            "num_actions": self.env.n_actions,
            "obs_dim": self.env.obs_size,
            "state_dim": self.env.state_size,
            "episode_limit": self.episode_limit,
            "metrics": METRICS,
        }

    def reset(self, seed):
        """Starts the next battle; SMAClite draws from the global generators."""
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        # The state holds the last actions, and no version of SMAClite clears them.
        self.env.last_actions = np.zeros(self.env.n_agents * self.env.n_actions)
        self.obs, _ = self.env.reset(seed=seed)
        self.won = False

    def step(self, joint_action):
        """Plays one step, which terminates the battle when a side is dead."""
        self.obs, reward, terminated, truncated, info = self.env.step(joint_action)
        # Older versions don't report it; all versions reward a win if no enemy is left, even if no ally is left either.
        self.won = info.get("battle_won", not self.env.enemies)
        return reward, terminated, truncated

    def observe(self):
        """Returns the agents' observations, the state, and the available actions."""
        return self.obs, self.env.get_state(), self.env.get_avail_actions()

    def metrics(self):
        """Returns whether SMAClite counts the battle as won, and how many units died: dead ones leave its dicts."""
        dead = self.env.n_agents - len(self.env.agents), self.env.n_enemies - len(self.env.enemies)
        return dict(zip(METRICS, (self.won, *dead)))

    def close(self):
        """Closes its window, if there is one."""
        self.env.close()


def refuse_unknown(name, names):
    """Refuses a map that the package doesn't have."""
    if name not in names:
        raise SetupError(f"map={name} is not allowed: choose one of {', '.join(sorted(names))}")


def refuse_unknown_options(options, client, *taken):
    """Refuses options that the constructor of ``client`` doesn't name: it may ignore them silently.

    Args:
        options: the arguments, by name.
        client: the class.
        taken: names of arguments that are no options.
    """
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(client).parameters
    known = [name for name in parameters if parameters[name].kind in kinds and name not in (*taken, "seed")]
    for name in sorted(options.keys() - {*known, "seed"}):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise SetupError(f"options={{{name}: ..}} is not allowed: {client.__name__} has no such option; {hint}")


def refuse_heuristic(options):
    """Refuses the client's own player, whose actions would be recorded as the agents'."""
    if options.get("heuristic_ai"):
        raise SetupError("options={heuristic_ai: true} is not allowed: it replaces the agents' actions")


def find_game(map_name, game_version, maps_archive):
    """Returns the version of the installed game, found without starting it.

    Raises:
        SetupError: if the game, its executable or the map's file is missing.
    """
    maps, run_configs = importlib.import_module("pysc2.maps"), importlib.import_module("pysc2.run_configs")
    advice = "install it and set SC2PATH to its folder"
    try:
        config = run_configs.get(version=game_version)
    except Exception as error:  # pysc2's own class has moved between its versions
        raise SetupError(f"StarCraft II is not found ({one_line(error)}): {advice}") from error
    if not os.path.isdir(config.data_dir):
        raise SetupError(f"StarCraft II is not found at {config.data_dir}: {advice}")
    game = describe(config)
    refuse_executable(executable(config), advice)
    try:
        config.map_data(maps.get(map_name).path)
    except Exception as error:
        folder = os.path.join(config.data_dir, "Maps", "SMAC_Maps")
        unpack = f"put the .SC2Map files of {maps_archive} into {folder}"
        raise SetupError(f"the file of map={map_name} is not found ({one_line(error)}): {unpack}") from error
    return {"StarCraft II": game}


def describe(config):
    """Returns ``4.6.2 (build 69232)``, or the build alone if pysc2 doesn't know the version."""
    game_version = getattr(config.version, "game_version", None)
    build = build_of(config)
    return f"{game_version} (build {build})" if game_version not in (None, "latest") else f"build {build}"


def build_of(config):
    """Returns the number of the build that plays; the newest if pysc2 doesn't name one."""
    version, folder = config.version, os.path.join(config.data_dir, "Versions")
    build = getattr(version, "build_version", None)
    if build and getattr(version, "game_version", None) != "latest":
        return build
    builds = [name[4:] for name in os.listdir(folder) if name.startswith("Base")] if os.path.isdir(folder) else []
    return max(map(int, builds)) if builds else build


def executable(config):
    """Returns the path where pysc2 looks for the game's program."""
    name = getattr(config, "_exec_name", "SC2_x64")
    return os.path.join(config.data_dir, "Versions", f"Base{build_of(config) or 0:05}", name)


def refuse_executable(path, advice):
    """Refuses a program that can't be started: an archive unpacked in part, or a copy without its permissions."""
    if not os.path.isfile(path):
        raise SetupError(f"StarCraft II is not complete: there is no {path}: {advice}")
    if not os.access(path, os.X_OK):
        raise SetupError(f"StarCraft II can't be started: {path} is not executable: chmod +x {path}")


def reseed(distributions, sequence):
    """Seeds every generator inside SMACv2's distributions differently: they are created with random seeds."""
    held = list(distributions.values())
    for found, child in zip(held, sequence.spawn(len(held))):
        if hasattr(found, "rng"):
            found.rng = np.random.default_rng(child)
        if hasattr(found, "index") and hasattr(found, "teams"):  # it goes through a list of teams in order
            found.index = int(np.random.default_rng(child).integers(len(found.teams)))
        if hasattr(found, "__dict__"):
            parts = {name: part for name, part in vars(found).items() if hasattr(part, "generate")}
            reseed(parts, child)


def version_of(package):
    """Returns the installed version of a package."""
    try:
        return importlib.import_module("importlib.metadata").version(package)
    except ImportError:  # Python 3.7 lacks the module; or the package is on the path but not installed
        return "unknown"


def one_line(error):
    """Returns an error's text in one line."""
    return " ".join(str(error).split())
