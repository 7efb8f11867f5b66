"""What a user sees of a run that trains: a live bar on a terminal, now and then a line elsewhere."""

import collections
import datetime
import sys
import time
from typing import Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from wqmix_jax.loop import Line
from wqmix_jax.members import labels_of, member_name

SECONDS_BETWEEN_LINES = 10.0

SECONDS_OF_PACE, FEWEST_CHUNKS = 60.0, 4
"""How far back steps per second are counted: this long, and no fewer chunks."""


class Display(Protocol):
    """Shows how far a run is; used in a ``with`` block."""

    def __enter__(self) -> Self:
        """Starts to show."""
        ...

    def __exit__(self, *_: object) -> None:
        """Leaves the last state behind."""
        ...

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        """Takes the environment steps ``[S]`` of seeds that have not failed, and the lines that were just written."""
        ...


def make_display(total_env_steps: int, *, live: bool) -> Display:
    """A bar where ``live`` and stderr is a terminal, else lines."""
    return _Bar(total_env_steps) if live and sys.stderr.isatty() else _Lines(total_env_steps)


class _Pace:
    """Words for how fast a run goes, over the last minute."""

    def __init__(self, total_env_steps: int) -> None:
        self.total = total_env_steps
        self.slowest = 0
        self._samples: collections.deque[tuple[float, int, int]] = collections.deque()
        self._returns: dict[str, float] = {}
        self._num_seeds = 1

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        self.slowest = min(int(env_steps.min()), self.total)
        if len(env_steps) != self._num_seeds:  # the steps of a seed that has failed are no longer counted
            self._samples.clear()
        self._num_seeds = len(env_steps)
        self._samples.append((time.perf_counter(), int(env_steps.sum()), self.slowest))
        while len(self._samples) > FEWEST_CHUNKS and self._samples[-1][0] - self._samples[0][0] > SECONDS_OF_PACE:
            self._samples.popleft()
        evaluated = (line for line in lines if line["kind"] == "eval")
        self._returns |= {member_name(labels_of(line)): line["episode_return"] for line in evaluated}

    def __str__(self) -> str:
        seeds = "1 seed" if self._num_seeds == 1 else f"{self._num_seeds} seeds"
        words = [seeds, f"{self.slowest:,} of {self.total:,} steps"]
        (start, steps_then, slowest_then), (now, steps_now, slowest_now) = self._samples[0], self._samples[-1]
        if now > start and slowest_now > slowest_then:
            words.append(f"{(steps_now - steps_then) / (now - start):,.0f} steps/s")
        if self._returns:
            words.append(f"return {np.median(list(self._returns.values())):.2f}")
        if now > start and self.total > slowest_now > slowest_then:
            seconds = (self.total - slowest_now) * (now - start) / (slowest_now - slowest_then)
            words.append(f"{datetime.timedelta(seconds=round(seconds))} left")
        return " | ".join(words)


class _Bar:
    def __init__(self, total_env_steps: int) -> None:
        self._pace = _Pace(total_env_steps)
        text = TextColumn("{task.percentage:>3.0f}% {task.description}", markup=False)
        self._progress = Progress(SpinnerColumn(), BarColumn(), text, console=Console(stderr=True))
        self._task = self._progress.add_task("compiling", total=total_env_steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        self._pace.update(env_steps, lines)
        self._progress.update(self._task, completed=self._pace.slowest, description=str(self._pace))


class _Lines:
    def __init__(self, total_env_steps: int) -> None:
        self._pace = _Pace(total_env_steps)
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        self._pace.update(env_steps, lines)
        now = time.perf_counter()
        if now >= self._next or self._pace.slowest >= self._pace.total:
            self._next = now + SECONDS_BETWEEN_LINES
            print(self._pace, file=sys.stderr, flush=True)
