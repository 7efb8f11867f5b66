"""Speed of steps of simulators in worker processes: ``python -m experiments.bridge_benchmark``.

Compares the bridge with a short version of PyMARL's method: one process per environment behind a pipe, which pickles
every action and observation, and a loop over the processes. Both play the same simulator, which only returns arrays of
the size of SMAC's 3s5z. The bridge is called from a compiled loop, so its time includes the callback.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.config import load_group
from wqmix_jax.options import build

NUM_AGENTS, NUM_ACTIONS, OBS_DIM, STATE_DIM = 8, 14, 128, 216
NUM_WORKERS = (1, 4, 8)
STEPS, REPETITIONS = 500, 11
RESULT = Path(__file__).parent / "bridge_benchmark.json"


class Still:
    """A simulator whose arrays never change and whose episodes never end."""

    def __init__(self, seed: int) -> None:
        self._seen = (
            np.full((NUM_AGENTS, OBS_DIM), 0.5, np.float32),
            np.full(STATE_DIM, 0.5, np.float32),
            np.ones((NUM_AGENTS, NUM_ACTIONS), np.int64),
        )

    def info(self) -> dict[str, Any]:
        sizes = {"num_agents": NUM_AGENTS, "num_actions": NUM_ACTIONS, "obs_dim": OBS_DIM, "state_dim": STATE_DIM}
        return {**sizes, "episode_limit": STEPS}

    def reset(self, seed: int) -> None:
        pass

    def step(self, joint_action: list[int]) -> tuple[float, bool, bool]:
        return 1.0, False, False

    def observe(self) -> Any:
        return self._seen


@command
def main() -> None:
    """Measures both methods, prints the table and writes the numbers."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=out_file, default=RESULT, help="a JSON file for the numbers")
    chosen = parser.parse_args()
    measured = {str(count): median_seconds(count) for count in NUM_WORKERS}
    seconds = {name: {count: by_method[name] for count, by_method in measured.items()} for name in METHODS}
    record = {
        "command": "python -m experiments.bridge_benchmark",
        "milliseconds_per_batched_step": {
            name: {count: round(1000 * value, 3) for count, value in by_count.items()}
            for name, by_count in seconds.items()
        },
        "batched_steps_per_second": {
            name: {count: round(1 / value) for count, value in by_count.items()} for name, by_count in seconds.items()
        },
        "medians_of": REPETITIONS,
        "steps": STEPS,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "versions": {"jax": jax.__version__, "python": platform.python_version(), "numpy": np.__version__},
    }
    chosen.json.write_text(json.dumps(record, indent=2) + "\n")
    show(record["milliseconds_per_batched_step"])


@contextlib.contextmanager
def bridge(num_workers: int) -> Iterator[Callable[[], Any]]:
    """Yields a function that plays `STEPS` batched steps in a compiled loop."""
    here = Path(__file__)
    values = {
        "simulator": f"{here}:{Still.__name__}",
        "options": {},
        "worker_python": None,
        **load_group("env", "_host"),
    }
    env = build("env", {"_target_": "wqmix_jax.envs.host.bridge.HostEnvironment", **values})
    keys = jax.random.split(jax.random.key(0), num_workers)
    joint_action = jnp.zeros((num_workers, NUM_AGENTS), jnp.int32)

    @jax.jit
    def play(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: (env.step_batch(s, joint_action, keys)[0], None), state, length=STEPS)[0]

    with env.external.running([0]):
        state = jax.jit(env.reset_batch)(keys)
        yield lambda: jax.block_until_ready(play(state))


@contextlib.contextmanager
def pipe_and_pickle(num_workers: int) -> Iterator[Callable[[], Any]]:
    """Yields a function that plays `STEPS` batched steps with PyMARL's method."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(num_workers):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs,), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    joint_action = np.zeros(NUM_AGENTS, np.int64)

    def play() -> None:
        for _ in range(STEPS):
            for pipe in pipes:
                pipe.send(("step", joint_action))
            batch = [pipe.recv() for pipe in pipes]
            for name in ("state", "avail_actions", "obs"):  # PyMARL converts them for its batch
                np.stack([data[name] for data in batch])

    try:
        yield play
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(("close", None))
            process.join()


def serve(pipe: Any) -> None:
    """Runs one of PyMARL's workers, which sends lists of arrays in a pickled dict."""
    simulator = Still(0)
    while True:
        command, joint_action = pipe.recv()
        if command == "close":
            return
        reward, terminated, _ = simulator.step(joint_action)
        obs, state, avail_actions = simulator.observe()
        pipe.send(
            {
                "state": state,
                "avail_actions": [row.tolist() for row in avail_actions],
                "obs": list(obs),
                "reward": reward,
                "terminated": terminated,
                "info": {},
            }
        )


METHODS = {"bridge": bridge, "pipe_and_pickle": pipe_and_pickle}


def median_seconds(num_workers: int) -> dict[str, float]:
    """Returns each method's median seconds per batched step; they take turns, so that other load affects both."""
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    with contextlib.ExitStack() as stack:
        plays = {name: stack.enter_context(method(num_workers)) for name, method in METHODS.items()}
        for name in [*plays] * (REPETITIONS + 1):
            started = time.perf_counter()
            plays[name]()
            times[name].append((time.perf_counter() - started) / STEPS)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first compiles


def show(milliseconds: dict[str, dict[str, float]]) -> None:
    """Prints the table."""
    table = Table("workers", *milliseconds, title="milliseconds per batched step")
    for count in NUM_WORKERS:
        table.add_row(str(count), *(f"{by_count[str(count)]:.3f}" for by_count in milliseconds.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
