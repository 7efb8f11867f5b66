"""The progress of a run: a live bar on a terminal or in a notebook, a line now and then elsewhere."""

import collections
import datetime
import importlib.util
import sys
import time
from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from wqmix_jax.training.host_loop import Line
from wqmix_jax.training.members import labels_of, member_name

SECONDS_BETWEEN_LINES = 10.0

SECONDS_OF_PACE, FEWEST_CHUNKS = 60.0, 4
"""The time over which steps per second are counted, and the least number of chunks."""

NARROWEST_BAR, WIDEST_BAR = 10, 40
"""Widths in columns of the terminal."""

DROPPED_FIRST = ("seeds", "steps", "pace", "return", "win rate")
"""Figures that a narrow terminal leaves out, in this order; the percentage and the time left always fit."""


class Display(Protocol):
    """Shows the progress of a run; used in a ``with`` block."""

    def __enter__(self) -> Self:
        """Starts the display."""
        ...

    def __exit__(self, *_: object) -> None:
        """Ends the display; its last state stays visible."""
        ...

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        """Takes the environment steps ``[S]`` of seeds that have not failed, and the lines that were just written."""
        ...

    def note(self, text: str) -> None:
        """Shows a stage of the run before the first update."""
        ...


def make_display(total_env_steps: int, *, live: bool) -> Display:
    """Makes a bar if ``live`` and a terminal (stderr) or a notebook can show it, else lines."""
    bar = live and (sys.stderr.isatty() or (_in_notebook() and importlib.util.find_spec("ipywidgets") is not None))
    return _Bar(total_env_steps, Console(stderr=True)) if bar else _Lines(total_env_steps)


def make_optional_display(total_env_steps: int, *, shown: bool | None) -> Display:
    """Makes a display that shows nothing unless ``shown``; by default it shows on a terminal and in a notebook."""
    if shown is None:
        shown = sys.stderr.isatty() or _in_notebook()
    return make_display(total_env_steps, live=True) if shown else _Nothing()


def _in_notebook() -> bool:
    return Console(stderr=True).is_jupyter


class _Pace:
    """Describes how fast a run trains, over the last minute."""

    def __init__(self, total_env_steps: int) -> None:
        self.total = total_env_steps
        self.slowest = 0
        self._samples: collections.deque[tuple[float, int, int]] = collections.deque()
        self._evaluated: dict[str, Line] = {}  # the last evaluation of each member
        self._num_seeds = 1

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        self.slowest = min(int(env_steps.min()), self.total)
        if len(env_steps) != self._num_seeds:  # the steps of a seed that has failed are no longer counted
            self._samples.clear()
        self._num_seeds = len(env_steps)
        self._samples.append((time.perf_counter(), int(env_steps.sum()), self.slowest))
        while len(self._samples) > FEWEST_CHUNKS and self._samples[-1][0] - self._samples[0][0] > SECONDS_OF_PACE:
            self._samples.popleft()
        for line in lines:
            if line["kind"] == "eval":
                self._evaluated[member_name(labels_of(line))] = line

    def parts(self) -> dict[str, str]:
        """Returns the figures to show by their names, in the order in which they are shown."""
        parts = {
            "seeds": "1 seed" if self._num_seeds == 1 else f"{self._num_seeds} seeds",
            "steps": f"{self.slowest:,} of {self.total:,} steps",
        }
        (start, steps_then, slowest_then), (now, steps_now, slowest_now) = self._samples[0], self._samples[-1]
        if now > start and slowest_now > slowest_then:
            parts["pace"] = f"{(steps_now - steps_then) / (now - start):,.0f} steps/s"
        if self._evaluated:
            parts["return"] = f"eval return {self._median('episode_return'):.2f}"
        if any("win_rate" in line for line in self._evaluated.values()):
            parts["win rate"] = f"win rate {self._median('win_rate'):.2f}"
        if now > start and self.total > slowest_now > slowest_then:
            seconds = (self.total - slowest_now) * (now - start) / (slowest_now - slowest_then)
            parts["left"] = f"{datetime.timedelta(seconds=round(seconds))} left"
        return parts

    def _median(self, name: str) -> float:
        return float(np.median([line[name] for line in self._evaluated.values() if name in line]))


class _Bar:
    """One line that fits the console: a bar, the percentage, the figures that there is room for, and the time left."""

    def __init__(self, total_env_steps: int, console: Console) -> None:
        self._pace = _Pace(total_env_steps)
        self._stage, self._parts = "compiling", dict[str, str]()
        self._spinner, self._console = Spinner("dots"), console
        # Text that is printed meanwhile appears above the bar, unless stdout is a file or a pipe.
        redirect = sys.stdout.isatty() or console.is_jupyter
        self._live = Live(console=console, get_renderable=self._line, refresh_per_second=10, redirect_stdout=redirect)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        self._pace.update(env_steps, lines)
        share = self._pace.slowest / self._pace.total
        self._parts = {"percentage": f"{share:.0%}", **self._pace.parts()}

    def note(self, text: str) -> None:
        self._stage = text

    def _line(self) -> RenderableType:
        width = self._console.width - len("s ") - len(" ")  # the spinner, and a blank behind the bar
        words = fitting(self._parts, width - NARROWEST_BAR) if self._parts else self._stage
        total = self._pace.total if self._parts else None  # None: it pulses
        bar = ProgressBar(
            total=total, completed=self._pace.slowest, width=max(NARROWEST_BAR, min(WIDEST_BAR, width - len(words)))
        )
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(self._spinner, bar, Text(words, no_wrap=True, overflow="crop"))
        return line


def fitting(parts: Mapping[str, str], width: int) -> str:
    """Joins as many of the parts as fit into ``width``, and leaves out others in the order of `DROPPED_FIRST`."""
    left = dict(parts)
    for name in DROPPED_FIRST:
        if len(text := "  ".join(left.values())) <= width:
            return text
        left.pop(name, None)
    return "  ".join(left.values())


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
            print(" | ".join(self._pace.parts().values()), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Nothing:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, env_steps: np.ndarray, lines: list[Line]) -> None:
        pass

    def note(self, text: str) -> None:
        pass
