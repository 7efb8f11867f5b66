"""Runs that are killed again and again end as if nothing had happened."""

import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.running import last_checkpoint, popen, process, timeless
from wqmix_jax import load_metrics

NUM_KILLS = 30

SMALL = (
    "+algo=iql",
    "env=predator_prey",
    "env.world_shape=[4,4]",
    "env.episode_limit=10",
    "algo.batch_size=4",
    "algo.buffer_size=16",
    "algo.hidden_dim=8",
    "num_seeds=2",
    "total_env_steps=6000",
    "eval_interval=200",
    "eval_episodes=2",
    "chunk_iterations=5",
    "checkpoint.every=50",
)
"""Saved after every chunk, of 50 steps at most."""

CLOCKS = {"seconds", "wall_seconds", "metrics_bytes", "run"}


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = process(*SMALL, f"run_dir={straight}")
    assert done.returncode == 0, done.stderr
    when, kills, started_over, torn = random.Random(0), 0, 0, 0
    while True:
        known = (killed / "config.yaml").exists()
        running = popen(*((f"resume={killed}",) if known else (*SMALL, f"run_dir={killed}")))
        started_over += not known
        if kills < NUM_KILLS:
            _wait_for_saves(
                running, killed / "checkpoints", when.randrange(3), or_seconds=when.choice([3, 600, 600, 600])
            )
            time.sleep(when.uniform(0, 0.3))
            kills += running.poll() is None
            running.kill()
        out, err = running.communicate(timeout=1500)
        torn += any((killed / "checkpoints").glob("*tmp*"))
        if running.returncode == 0:
            break
        assert running.returncode == -signal.SIGKILL, err
        assert "can't be used" not in err
    print(f"{kills} kills, {started_over} starts, {torn} in the middle of a save: {out.splitlines()[-1]}")
    assert kills == NUM_KILLS
    assert timeless(load_metrics(killed)) == timeless(load_metrics(straight))
    saved, expected = last_checkpoint(killed), last_checkpoint(straight)
    for name in saved.keys() - CLOCKS:
        np.testing.assert_array_equal(saved[name], expected[name], err_msg=name)


def _wait_for_saves(running: subprocess.Popen[str], folder: Path, number: int, *, or_seconds: float) -> None:
    """Returns when so many checkpoints have been begun since the first new one, or after some seconds: at its start."""
    known, until = set(_saves(folder)), time.monotonic() + or_seconds
    while len(_saves(folder) - known) <= number and time.monotonic() < until and running.poll() is None:
        time.sleep(0.02)


def _saves(folder: Path) -> set[str]:
    return {path.name.split(".")[0] for path in folder.iterdir()} if folder.is_dir() else set()
