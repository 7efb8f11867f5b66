"""Bridged toys, and the processes that must have ended after them."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wqmix_jax.envs.host.bridge import HostEnvironment
from wqmix_jax.envs.host.supervisor import Supervisor
from wqmix_jax.options import build

HERE = Path(__file__).parent

WORKERS = {
    "worker_python": None,
    "eval_envs": 2,
    "launch_timeout": 60,
    "reset_timeout": 60,
    "step_timeout": 60,
    "max_restarts": 4,
    "restart_window": 1e6,
}


def toy(*, episode_limit: int = 5, workers: dict[str, Any] | None = None, **changes: Any) -> HostEnvironment:
    """Returns the toy in workers."""
    simulator = {"simulator": f"{HERE / 'toy.py'}:Toy", "options": {"episode_limit": episode_limit, **changes}}
    target = "wqmix_jax.envs.host.bridge.HostEnvironment"
    return build("env", {"_target_": target, **WORKERS, **(workers or {}), **simulator})


ARRAYS = ("obs", "state", "avail_actions", "metrics", "reward", "terminated", "truncated", "failed")


def called(supervisor: Supervisor, command: str, *args: Any) -> tuple[np.ndarray, ...]:
    """Returns copies of the `ARRAYS` after a call to the pool of training."""
    getattr(supervisor, command)("training", *args)
    return tuple(supervisor.arrays("training")[name].copy() for name in ARRAYS)


def idle_where(ended: np.ndarray, joint_action: Any) -> np.ndarray:
    """Returns the joint actions, negative where an episode has ended."""
    return np.where(ended[:, None], -1, joint_action)


def launched(folder: Path) -> list[int]:
    """Returns the processes of toys with ``launches=folder``, and their children."""
    return [int(path.name.removeprefix("child-")) for path in folder.iterdir()]


def await_gone(pids: Iterable[int]) -> None:
    """Returns once none of the processes runs; a zombie has ended and only waits for its parent."""
    for _ in range(3000):
        if not any(runs(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"still there: {[pid for pid in pids if runs(pid)]}")


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
