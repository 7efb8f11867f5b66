"""The paper's figures as data: ``configs/experiment/fig2.yaml`` to ``fig9.yaml``, and the runs that each consists of.

A figure has panels (one set of axes each) and lines (one algorithm each). A run's overrides are the figure's, then the
panel's, then the line's, then what the panel adds to that line. Values are spelt out even where they are an
algorithm's own defaults: a figure keeps the paper's settings whatever becomes of those.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

import pydantic

from wqmix_jax.config import load_group
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR

Overrides = list[str]


class Panel(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One set of axes.

    Attributes:
        overrides: what all its runs share, as on the command line.
        lines: what it adds to some of the figure's lines, by their names.
    """

    overrides: Overrides = []
    lines: dict[str, Overrides] = {}


class Figure(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One figure of the paper.

    Attributes:
        title: what it shows.
        metric: what is drawn, a field of the evaluation records.
        lowest: where the axis ends below; what lies lower is not drawn.
        env: the environments that it can be drawn on; the first is the paper's own.
        overrides: what all its runs share.
        lines: each line's overrides, by its label in the legend.
        panels: by their titles.
        authors: files with curves of the authors' code, by line.
        passes: values of the metric of which the data tell when each seed first reaches them.
        searched: the values among which the paper chose a line's settings, by line and key.
    """

    title: str
    metric: Literal["episode_return", "win_rate"]
    env: list[str]
    overrides: Overrides
    lines: dict[str, Overrides]
    panels: dict[str, Panel]
    authors: dict[str, str] = {}
    passes: list[float] = []
    lowest: float | None = None
    searched: dict[str, dict[str, list[float]]]

    @pydantic.model_validator(mode="after")
    def _names_known_lines(self) -> Self:
        named = {label for panel in self.panels.values() for label in panel.lines} | {*self.searched, *self.authors}
        if unknown := sorted(named - set(self.lines)):
            raise ValueError(f"lines={unknown} is not allowed: the figure's lines are {', '.join(self.lines)}")
        return self


class Run(NamedTuple):
    """One line of one panel.

    Attributes:
        panel: the panel's title.
        line: the line's label.
        overrides: for `wqmix_jax.load_config` or the command line; seeds and ``run_dir`` are the caller's.
    """

    panel: str
    line: str
    overrides: tuple[str, ...]

    @property
    def algo(self) -> str:
        """The name of the algorithm's yaml."""
        return self._chosen("+algo") or ""

    @property
    def env(self) -> str:
        """The name of the environment's yaml."""
        return self._chosen("env") or ""

    @property
    def task(self) -> str:
        """The map, or the panel's title where there are no maps."""
        return self._chosen("env.map") or self.panel

    @property
    def label(self) -> str:
        """The line's label, and what else the panel's title says than its task: ``CW-QMIX, alpha = 0.1``."""
        return ", ".join(part for part in [*self.panel.split(", "), self.line] if part != self.task)

    @property
    def folder(self) -> Path:
        """Where it is kept, inside the figure's folder: ``3s5z/qmix_qstar``."""
        return Path(_plain(self.panel), _plain(self.line))

    def _chosen(self, key: str) -> str | None:
        """The value of the last override of a key."""
        pairs = (override.partition("=") for override in self.overrides)
        return {name: value for name, _, value in pairs}.get(key)


def _plain(title: str) -> str:
    """A title as a file's name."""
    return re.sub(r"[^a-z0-9.]+", "_", title.lower().replace("*", "star").replace(" + ", "_")).strip("_")


def figure_names() -> list[str]:
    """The figures that have a yaml: ``["fig2", .., "fig9"]``."""
    return sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


def load_figure(name: str) -> Figure:
    """Reads ``configs/experiment/NAME.yaml``.

    Raises:
        ConfigError: if there is no such figure.
    """
    if name not in figure_names():
        raise ConfigError(f"figure={name} is not allowed: choose one of {', '.join(figure_names())}")
    return Figure(**load_group("experiment", name))


def runs(figure: Figure, env: str | None = None) -> list[Run]:
    """All runs of a figure, on one of its environments (the paper's own by default).

    Raises:
        ConfigError: if the figure can't be drawn on ``env``.
    """
    env = figure.env[0] if env is None else env
    if env not in figure.env:
        raise ConfigError(f"env={env} is not allowed: this figure is drawn on {' or '.join(figure.env)}")
    scale = ("env.max_return=20",) if env == "smax" else ()  # SMAC's, for which the paper chose its settings
    shared = (f"env={env}", *scale, *figure.overrides)
    return [
        Run(title, label, (*shared, *panel.overrides, *line, *panel.lines.get(label, [])))
        for title, panel in figure.panels.items()
        for label, line in figure.lines.items()
    ]
