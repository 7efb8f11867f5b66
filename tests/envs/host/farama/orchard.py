"""Tasks registered with Gymnasium in the style of level-based foraging: tuples of spaces, a list of rewards."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Orchard(gymnasium.Env):
    """Two pickers; the episode terminates after ``picked`` steps, or, as in foraging, after ``max_steps``."""

    def __init__(self, picked=99, max_steps=4, masks=False, has_state=False, missing=False):
        self.picked, self.masks, self.missing = picked, masks, missing
        if max_steps is not None:
            self.max_steps = max_steps
        if has_state:
            self.state = lambda: np.array([self.place, self.time])
        self.action_space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)])
        self.observation_space = spaces.Tuple([spaces.Box(0, 99, (2,)), spaces.Box(0, 99, (1,))])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = int(self.np_random.integers(90)), 0
        return self.seen(), self.info()

    def step(self, actions):
        assert isinstance(actions, tuple)
        assert self.action_space.contains(actions)
        self.time += 1
        ended = self.time >= self.picked or self.time == getattr(self, "max_steps", None)
        rewards = [1.0, 10.0][: 1 if self.missing else 2]
        return self.seen(), rewards, ended, False, self.info()

    def seen(self):
        return np.array([self.place, self.time], np.float32), np.array([self.time], np.float32)

    def info(self):
        return {"action_mask": [[1, 0], [0, 1, 1]]} if self.masks else {}


gymnasium.register("Orchard-v0", entry_point=Orchard)
gymnasium.register("OrchardLimited-v0", entry_point=Orchard, max_episode_steps=3, kwargs={"max_steps": None})
