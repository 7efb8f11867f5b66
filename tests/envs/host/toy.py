"""A simulator of whole numbers for the workers: numpy alone, faults on demand."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


class Toy:
    """Two agents push a number around a circle of 97.

    Attributes:
        faults: ``[{"kind": .., "during": .., "marks": FOLDER, "times": n}]``: the first ``n`` workers that get there
            misbehave, once each.
    """

    launched = False

    def __init__(self, seed, episode_limit, faults=(), fault_step=2, launches=None, child=False, forgets_seeds=False):
        self.episode_limit, self.faults, self.fault_step = episode_limit, faults, fault_step
        self.x = self.steps = self.hits = self.resets = 0
        self.draws = np.random.default_rng(seed) if forgets_seeds else None
        self.seed, self.launches, self.child = seed, launches, child

    def info(self):
        return {
            "num_agents": 2,
            "num_actions": 3,
            "obs_dim": 3,
            "state_dim": 3,
            "episode_limit": self.episode_limit,
            "metrics": ["hits"],
        }

    def versions(self):
        return {"toy": "1.2"}

    def launch(self):
        """Starts the game in the first reset, as SMAC does."""
        self.launched = True
        if self.launches is not None:
            Path(self.launches, f"{os.getpid()}").write_text(str(self.seed))
        if self.child:
            child = subprocess.Popen(["sleep", "1000"])
            Path(self.launches, f"child-{child.pid}").touch()
        self.misbehave("launch")

    def reset(self, seed):
        self.resets += 1
        if not self.launched:
            self.launch()
        seed = seed if self.draws is None else self.draws.integers(1000)
        self.x, self.steps, self.hits = int(seed % 97), 0, 0
        self.misbehave("reset")

    def step(self, joint_action):
        assert [type(action) for action in joint_action] == [int, int]
        assert all(self.observe()[2][agent, action] for agent, action in enumerate(joint_action))
        if self.steps == self.fault_step:
            self.misbehave("step")
        self.x = (31 * self.x + joint_action[0] + 2 * joint_action[1] + 7) % 97
        self.steps += 1
        self.hits += self.x % 5 == 0
        terminated = self.x % 11 == 0
        return float(self.x % 5 - 1), terminated, not terminated and self.steps >= self.episode_limit

    def observe(self):
        obs = np.array([[self.x % 7, self.steps, agent] for agent in range(2)])
        avail = np.ones((2, 3), bool)
        avail[range(2), [(self.x + agent) % 3 for agent in range(2)]] = False
        if self.misbehaves("idle"):
            avail[1] = False
        return (obs[:, :2] if self.misbehaves("shape") else obs), np.array([self.x, self.steps, self.x // 10]), avail

    def metrics(self):
        return {"hits": float(self.hits)}

    def misbehave(self, during):
        for fault in self.faults:
            comes_later = "after" in fault and not Path(fault["marks"], fault["after"]).exists()
            comes_later |= self.resets < fault.get("from_reset", 0)
            if fault["during"] == during and not comes_later and self.takes(fault):
                getattr(self, fault["kind"])()

    def misbehaves(self, kind):
        return any(fault["kind"] == kind and self.takes(fault) for fault in self.faults if self.steps > 1)

    def takes(self, fault):
        """Returns True if this is one of the first workers to misbehave so."""
        for number in range(fault.get("times", 1)):
            try:
                Path(fault["marks"], f"{fault['kind']}-{fault['during']}-{number}").touch(exist_ok=False)
                return True
            except FileExistsError:
                continue
        return False

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self):
        print("the simulator's last words", file=sys.stderr)
        os._exit(3)

    def hang(self):
        time.sleep(1000)

    def hang_deaf(self):
        """Holds the interpreter's lock, as a stuck extension does."""
        ctypes.PyDLL(None).sleep(1000)

    def fail(self):
        raise ValueError("the toy broke")

    def nothing(self):
        pass
