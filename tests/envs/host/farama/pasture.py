"""A task with PettingZoo's parallel interface: sheep that leave, masks, different spaces, dicts in another order.

It has whole numbers only and draws its first positions from the seed. Its module is imported by workers.
"""

import numpy as np
from gymnasium import spaces

ORDER = ("shepherd", "sheep_0", "sheep_1")

OBSERVED = {
    "shepherd": spaces.Tuple([spaces.Box(-9, 99, (2, 2), np.float64), spaces.Discrete(3, start=1)]),
    "sheep_0": spaces.MultiBinary(3),
    "sheep_1": spaces.MultiDiscrete([2, 3]),
}

ACTIONS = {"shepherd": spaces.Discrete(4), "sheep_0": spaces.Discrete(2, start=5), "sheep_1": spaces.Discrete(3)}


class Pasture:
    """Sheep 0 terminates after ``leaves`` steps, all others after ``terminates`` or are truncated after ``max_cycles``.

    Rewards are 1 for the shepherd, 10 for sheep 0 and 100 for sheep 1, each as long as it is there.
    """

    def __init__(
        self,
        leaves=2,
        terminates=99,
        max_cycles=4,
        masks="infos",
        has_state=True,
        image=False,
        spaces=(),
        keeps_agents=False,
    ):
        self.possible_agents, self.agents = list(ORDER), []
        self.leaves, self.terminates, self.masks = leaves, terminates, masks
        if max_cycles is not None:
            self.max_cycles = max_cycles
        self.has_state, self.image, self.keeps_agents = has_state, image, keeps_agents
        self.spaces, self.received = dict(spaces), []

    @property
    def unwrapped(self):
        return self

    def observation_space(self, agent):
        if self.spaces.get(agent) == "sequence":
            return spaces.Sequence(spaces.Discrete(2))
        if self.masks == "observations":
            mask = spaces.MultiBinary(int(ACTIONS[agent].n))
            return spaces.Dict({"action_mask": mask, "observation": OBSERVED[agent]})
        if self.masks == "part":
            return spaces.Dict({"action_mask": spaces.MultiBinary(int(ACTIONS[agent].n))})
        return OBSERVED[agent]

    def action_space(self, agent):
        return ACTIONS[agent] if self.spaces.get(agent) != "continuous" else spaces.Box(0, 1, (2,))

    def reset(self, seed=None, options=None):
        self.start, self.steps = int(np.random.default_rng(seed).integers(90)), 0
        self.agents, self.received = list(ORDER), []
        return self.seen(ORDER), self.infos(ORDER)

    def step(self, actions):
        here = list(self.agents)
        assert set(actions) == set(here)
        assert all(type(action) is int and ACTIONS[agent].contains(action) for agent, action in actions.items())
        self.received.append(actions)
        self.steps += 1
        over = self.steps >= self.terminates
        ended = {a: over or (a == "sheep_0" and self.steps == self.leaves) for a in here}
        cut = {a: not ended[a] and self.steps == getattr(self, "max_cycles", None) for a in here}
        if not self.keeps_agents:
            self.agents = [a for a in here if not (ended[a] or cut[a])]
        rewards = {a: 10.0 ** ORDER.index(a) for a in reversed(here)}
        return self.seen(here), rewards, ended, cut, self.infos(here)

    def seen(self, here):
        """Returns the observations, the last agent first."""
        values = {
            "shepherd": (np.array([[self.start, self.steps], [-1, 7]]), 1 + self.steps % 3),
            "sheep_0": np.array([1, self.steps % 2, 1], np.int8),
            "sheep_1": np.array([self.steps % 2, self.steps % 3]),
        }
        if self.masks == "observations":
            values = {a: {"observation": value, "action_mask": self.mask(a)} for a, value in values.items()}
        if self.masks == "part":
            values = {a: {"action_mask": self.mask(a)} for a in ORDER}
        return {a: values[a] for a in reversed(list(here))}

    def infos(self, here):
        return {a: {"action_mask": self.mask(a)} if self.masks == "infos" else {} for a in reversed(list(here))}

    def mask(self, agent):
        """Returns a mask without the action whose number is that of the step."""
        return (np.arange(ACTIONS[agent].n) != self.steps).astype(np.int8)

    def state(self):
        if not self.has_state:
            raise NotImplementedError
        state = np.array([self.start, self.steps])
        return state[None] if self.image else state

    def close(self):
        pass


def parallel_env(**options):
    return Pasture(**options)
