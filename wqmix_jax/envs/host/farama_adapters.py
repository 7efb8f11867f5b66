"""Tasks with the interfaces of PettingZoo and Gymnasium as simulators.

`wqmix_jax.envs.host.simulator` documents the protocol of simulators. A worker loads this file in the interpreter that
has the task's package, without this package. Agents may have different spaces: `Task` pads their rows to the largest.
"""

import abc
import copy
import difflib
import functools
import importlib
import pkgutil
import random
import sys
from typing import Any

import numpy as np

EXTRAS = {
    "pettingzoo": "pettingzoo",
    "mpe2": "pettingzoo",
    "gymnasium": "gymnasium",
    "lbforaging": "gymnasium",
    "rware": "gymnasium",
}
"""Packages, and the extras of wqmix_jax that install them."""

LIMITS = ("max_cycles", "max_steps", "max_episode_steps", "_max_episode_steps")
"""Attributes in which environments keep their time limit."""


class SetupError(Exception):
    """Something is not installed or not allowed; the message is a complete sentence."""


class Task(abc.ABC):
    """A task with one space of observations and one of actions per agent, as arrays with one row per agent.

    A subclass calls `adopt` once, and `see` after each reset and step.

    Attributes:
        env: the environment.
        name: its name, for messages.
        agents: the names of all agents in their order, for messages and as keys.
    """

    env: Any

    def __init__(self, name, reward, state, continuing_episode):
        """Keeps the options; see `wqmix_jax.envs.host.farama.FaramaEnvironment`."""
        self.name, self.reward, self.state, self.continuing_episode = name, reward, state, continuing_episode
        import_module("gymnasium", "gymnasium")
        self.spaces = importlib.import_module("gymnasium.spaces")
        self.steps = 0

    def adopt(self, agents, observation_spaces, action_spaces):
        """Takes the agents with their spaces, in order, and refuses spaces that can't be used."""
        self.agents = list(agents)
        self.action_spaces, self.observation_spaces, self.obs_sizes = list(action_spaces), [], []
        self.masked = [self.has_mask(observations) for observations in observation_spaces]
        for agent, observations, actions, masked in zip(self.agents, observation_spaces, action_spaces, self.masked):
            if not isinstance(actions, self.spaces.Discrete):
                raise SetupError(f"{self.name} has the action space {actions} for {agent}, but a Discrete is needed")
            if masked:
                observations = observations["observation"]
            try:
                self.obs_sizes.append(self.spaces.flatdim(observations))
            except (ValueError, NotImplementedError):
                raise SetupError(f"{self.name} has the observation space {observations}, whose size varies") from None
            self.observation_spaces.append(observations)
        self.action_counts = [int(actions.n) for actions in self.action_spaces]

    def has_mask(self, space):
        """Returns True for a space of dicts with an observation and a mask of actions."""
        return isinstance(space, self.spaces.Dict) and {"observation", "action_mask"} <= set(space.keys())

    def set_limit(self, episode_limit, stated, binding):
        """Sets the time limit.

        Args:
            episode_limit: the option, None where it is absent.
            stated: the limit that is used without the option, None where there is none.
            binding: the limit at which the environment ends its episodes itself, None where there is none.
        """
        if episode_limit is None and stated is None:
            raise SetupError(f"episode_limit is missing: {self.name} states no time limit; set env.episode_limit=STEPS")
        if episode_limit is not None and binding is not None and episode_limit > binding:
            refused = f"episode_limit={episode_limit} is not allowed"
            advice = "choose at most this number, or set the environment's own limit in env.options"
            raise SetupError(f"{refused}: {self.name} ends its episodes after {binding} steps; {advice}")
        self.episode_limit = stated if episode_limit is None else episode_limit

    def info(self):
        """Returns the sizes, that of the state from a first episode."""
        self.reset(0)
        return {
            "num_agents": len(self.agents),
            "num_actions": max(self.action_counts),
            "obs_dim": max(self.obs_sizes),
            "state_dim": len(self.observe()[1]),
            "episode_limit": self.episode_limit,
        }

    @abc.abstractmethod
    def reset(self, seed):
        """Starts an episode."""

    def begin(self, seed):
        """Seeds the global generators, from which some environments draw."""
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        self.steps = 0

    def see(self, observed, masks, present):
        """Keeps the observations and available actions of a step.

        Args:
            observed: the observation of each agent, in order; ignored for one that isn't present.
            masks: mask of each agent's actions, or None; one in its observation is used if this is None.
            present: bool for each agent; one that isn't present gets zeros, and action 0 as its only action.
        """
        num_agents = len(self.agents)
        self.obs = np.zeros((num_agents, max(self.obs_sizes)), np.float32)
        self.avail_actions = np.zeros((num_agents, max(self.action_counts)), bool)
        for index in range(num_agents):
            if not present[index]:
                self.avail_actions[index, 0] = True
                continue
            seen, mask = observed[index], masks[index]
            if self.masked[index]:
                mask = seen["action_mask"] if mask is None else mask
                seen = seen["observation"]
            self.obs[index, : self.obs_sizes[index]] = self.flat(index, seen)
            self.avail_actions[index, : self.action_counts[index]] = self.mask(index, mask)
        if self.state == "auto":
            state = self.state_of_env()
            self.state = "observations" if state is None or np.asarray(state).ndim > 1 else "env"  # more axes: an image

    def flat(self, index, seen):
        """Returns an agent's observation as numbers; discrete ones become one-hot."""
        flat = self.spaces.flatten(self.observation_spaces[index], seen)
        if flat.shape != (self.obs_sizes[index],):
            needed = f"{self.obs_sizes[index]} numbers are needed"
            raise ValueError(f"the observation of {self.agents[index]} has {flat.size} numbers, but {needed}")
        return flat

    def mask(self, index, mask):
        """Returns an agent's mask as an array of bools; without a mask all of its actions are available."""
        count = self.action_counts[index]
        found = np.ones(count, bool) if mask is None else np.asarray(mask).astype(bool)
        if found.shape != (count,):
            agent = self.agents[index]
            raise ValueError(f"action_mask of {agent} has shape {found.shape}, but {(count,)} is needed")
        return found

    def observe(self):
        """Returns the agents' observations, the state, and the available actions."""
        if self.state == "observations":
            return self.obs, self.obs.ravel(), self.avail_actions
        state = self.state_of_env()
        if state is None:
            raise SetupError(f"state=env is not allowed: {self.name} has no state(); choose auto or observations")
        return self.obs, np.asarray(state, np.float32).ravel(), self.avail_actions

    def state_of_env(self):
        """Returns what the environment's method ``state()`` returns, None if it has no such method."""
        state = getattr(self.env, "state", None)
        try:
            return state() if callable(state) else None
        except NotImplementedError:  # PettingZoo's classes have the method, but not all of them an implementation
            return None

    def actions(self, joint_action):
        """Returns the agents' actions as numbers of the spaces that the agents have."""
        return [int(space.start) + action for space, action in zip(self.action_spaces, joint_action)]

    def team_reward(self, rewards):
        """Returns the team's reward from those of the agents that have one, in order."""
        rewards = [float(reward) for reward in rewards]
        if self.reward == "first":
            return rewards[0] if rewards else 0.0
        return sum(rewards) / (len(self.agents) if self.reward == "mean" else 1)

    def ends(self, terminated, truncated):
        """Returns whether the episode is terminated, and whether it is truncated, from what the environment reports."""
        truncated = not terminated and (truncated or self.steps >= self.episode_limit)
        return terminated or (truncated and not self.continuing_episode), truncated and self.continuing_episode

    def close(self):
        """Closes the environment."""
        self.env.close()


class PettingZoo(Task):
    """A module with PettingZoo's ``parallel_env``, https://pettingzoo.farama.org/api/parallel."""

    def __init__(self, seed, name, options, reward, state, episode_limit, continuing_episode, folder):
        """Makes the environment; see `wqmix_jax.envs.host.farama.PettingZoo`."""
        del seed  # each episode has its own
        import_module("pettingzoo", "pettingzoo")
        super().__init__(name, reward, state, continuing_episode)
        module = import_task(name, folder, "name")
        if not callable(getattr(module, "parallel_env", None)):
            reason = "this module has no function parallel_env; games with turns can't be played"
            raise SetupError(f"name={name} is not allowed: {reason}")
        self.env = made(functools.partial(module.parallel_env, **options), name, options)
        agents = list(getattr(self.env, "possible_agents", []))
        if not agents:
            raise SetupError(f"{name} can't be used: it doesn't list its agents in possible_agents")
        spaces = [self.env.observation_space(agent) for agent in agents], [self.env.action_space(a) for a in agents]
        self.adopt(agents, *spaces)
        own = own_limit(self.env)
        self.set_limit(episode_limit, own, own)
        self.living = []

    def versions(self):
        """Returns the versions of PettingZoo and of the package that has the task."""
        return versions_of("pettingzoo", self.name)

    def reset(self, seed):
        """Starts an episode."""
        self.begin(seed)
        observed, infos = self.env.reset(seed=seed)
        self.living = list(self.env.agents)
        self.look(observed, infos, self.living)

    def step(self, joint_action):
        """Plays a step with the agents that are left; the episode ends when none is left, or at the time limit.

        It is truncated if an agent that was left until then didn't terminate.
        """
        actions = {a: action for a, action in zip(self.agents, self.actions(joint_action)) if a in self.living}
        observed, rewards, terminations, truncations, infos = self.env.step(actions)
        self.steps += 1
        left = [a for a in self.env.agents if not (terminations.get(a) or truncations.get(a))]
        over = not left
        cut = over and any(truncations.get(a) and not terminations.get(a) for a in self.living)
        self.living = left
        # The last observation of agents that were cut counts: targets bootstrap from it.
        last = [a for a in self.agents if a in observed and not terminations.get(a)]
        self.look(observed, infos, last if over else left)
        reward = self.team_reward([rewards[a] for a in self.agents if a in rewards])
        return (reward, *self.ends(over and not cut, cut))

    def look(self, observed, infos, present):
        """Keeps what the agents in ``present`` see; dicts may have any order."""
        masks = [infos.get(a, {}).get("action_mask") for a in self.agents]
        self.see([observed.get(a) for a in self.agents], masks, [a in present for a in self.agents])


class Gymnasium(Task):
    """A task that is registered with Gymnasium and has one entry per agent in all its tuples and lists.

    Level-based foraging and the robot warehouse (Papoudakis et al. 2021) have this interface.
    """

    def __init__(self, seed, name, module, options, reward, state, episode_limit, continuing_episode, folder):
        """Makes the environment; see `wqmix_jax.envs.host.farama.Gymnasium`."""
        del seed
        super().__init__(name, reward, state, continuing_episode)
        gymnasium = importlib.import_module("gymnasium")
        self.module = module
        if module is not None:
            import_task(module, folder, "module")
        try:
            spec = copy.deepcopy(gymnasium.spec(name))
        except gymnasium.error.Error as error:
            advice = "" if module is not None else "; env.module=MODULE imports the module that registers it"
            raise SetupError(f"name={name} is not allowed: {one_line(error).rstrip('.')}{advice}") from error
        # Its wrapper would end the episode at the limit; `step` does so, too, and env.episode_limit may be larger.
        stated, spec.max_episode_steps = spec.max_episode_steps, None
        spec.kwargs.update(options)
        self.outer = made(functools.partial(gymnasium.make, spec, disable_env_checker=True), name, options)
        self.env = self.outer.unwrapped
        spaces = self.outer.observation_space, self.outer.action_space
        if not all(isinstance(space, self.spaces.Tuple) for space in spaces) or len(spaces[0]) != len(spaces[1]):
            needed = "a task for several agents needs a Tuple with one space per agent for both"
            raise SetupError(f"name={name} is not allowed: its spaces are {spaces[0]} and {spaces[1]}, but {needed}")
        self.adopt([f"agent {index}" for index in range(len(spaces[0]))], *spaces)
        self.own_limit = own_limit(self.env)
        limits = [limit for limit in (stated, self.own_limit) if limit is not None]
        self.set_limit(episode_limit, min(limits, default=None), self.own_limit)

    def versions(self):
        """Returns the versions of Gymnasium and of the package that has the task."""
        return versions_of("gymnasium", *filter(None, [self.module]))

    def reset(self, seed):
        """Starts an episode."""
        self.begin(seed)
        self.look(*self.outer.reset(seed=seed))

    def step(self, joint_action):
        """Plays a step; an episode that ends at the environment's own limit is truncated.

        Level-based foraging and the robot warehouse report their time limit as a termination.
        """
        observed, rewards, terminated, truncated, info = self.outer.step(tuple(self.actions(joint_action)))
        self.steps += 1
        self.look(observed, info)
        terminated, truncated = bool(np.all(terminated)), bool(np.all(truncated))
        if self.own_limit is not None and self.steps >= self.own_limit:
            terminated = False
        return (self.team_reward(self.one_each("rewards", rewards)), *self.ends(terminated, truncated))

    def look(self, observed, info):
        """Keeps what the agents see."""
        masks = info.get("action_mask") if isinstance(info, dict) else None
        everyone = [True] * len(self.agents)
        masks = [None] * len(self.agents) if masks is None else self.one_each("action_mask", masks)
        self.see(self.one_each("observations", observed), masks, everyone)

    def one_each(self, what, values):
        """Returns the values as a list, which needs one entry per agent."""
        if not isinstance(values, (list, tuple)) and np.ndim(values) == 0:
            raise ValueError(f"{what} is one value, but one per agent is needed")
        if len(values) != len(self.agents):
            raise ValueError(f"{what} has {len(values)} entries, but {len(self.agents)} agents play")
        return list(values)

    def close(self):
        """Closes the environment."""
        self.outer.close()


def import_module(module, package):
    """Imports a module.

    Raises:
        SetupError: if that fails; the message says which package has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise not_imported(module, module, package, error) from error


def not_imported(subject, module, package, error):
    """Returns the error for a module that can't be imported; the message starts with ``subject``."""
    advice = advice_for(module, package)
    return SetupError(f"{subject} can't be imported by {sys.executable} ({one_line(error)}): {advice}")


def advice_for(module, package):
    """Returns the way to get a module."""
    top, _, rest = module.partition(".")
    if top == "pettingzoo" and rest:  # each family of tasks needs further packages
        return f"pip install 'pettingzoo[{rest.partition('.')[0]}]'"
    if top in EXTRAS:
        return f"pip install {package}, or install the extra {EXTRAS[top]} of wqmix_jax"
    return "install the package that has it, or start in the folder of the module"


def import_task(name, folder, option):
    """Imports the module of a task, from ``folder`` if its file is there.

    Raises:
        SetupError: if that fails.
    """
    if folder is not None:
        sys.path.insert(0, folder)
    parent, _, last = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and parent and error.name == name:  # its package is installed
            close = difflib.get_close_matches(last, submodules(parent), n=1)
            hint = f"; did you mean {parent}.{close[0]}?" if close else ""
            raise SetupError(f"{option}={name} is not allowed: {parent} has no module {last}{hint}") from error
        package = name.partition(".")[0]
        is_known = package == "pettingzoo" or package in EXTRAS  # then a package is missing, and the option is right
        subject = name if is_known else f"{option}={name} is not allowed: it"
        raise not_imported(subject, name, package, error) from error


def submodules(package):
    """Returns the names of the modules in a package."""
    return [found.name for found in pkgutil.iter_modules(getattr(importlib.import_module(package), "__path__", []))]


def made(make, name, options):
    """Returns the environment.

    Raises:
        SetupError: if its options, or a package that is missing, are the reason that it can't be made.
    """
    try:
        return make()
    except Exception as error:  # each environment has its own
        given = f" with env.options={options}" if options else ""
        raise SetupError(f"{name} can't be made{given}: {type(error).__name__}: {one_line(error)}") from error


def own_limit(env):
    """Returns the steps after which the environment ends its episodes itself, None if it doesn't say so."""
    env = env.unwrapped
    for holder in (env, getattr(env, "env", None)):  # some keep the game in an attribute
        for name in LIMITS:
            limit = getattr(holder, name, None)
            if isinstance(limit, (int, np.integer)) and not isinstance(limit, bool) and limit > 0:
                return int(limit)
    return None


def versions_of(*modules):
    """Returns the versions of the installed packages that have the modules."""
    metadata, found = importlib.import_module("importlib.metadata"), {}
    for module in modules:
        package = module.partition(".")[0]
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a module in a folder
            continue
    return found


def one_line(error):
    """Returns an error's text in one line."""
    return " ".join(str(error).split())
