"""The paper's figures as data: ``configs/experiment/fig2.yaml`` to ``fig9.yaml``, and the runs that each consists of.

A figure has panels (one set of axes each) and lines (one algorithm each). A run's overrides are the figure's, then the
panel's, then the line's, then what the panel adds to that line. Values are spelt out even where they are an
algorithm's own defaults: a figure keeps the paper's settings whatever becomes of those.
"""

from typing import Literal, NamedTuple, Self

import pydantic

from wqmix_jax.config import CONFIG_DIR, ConfigError, load_group

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
        env: the environments that it can be drawn on; the first is the paper's own.
        overrides: what all its runs share.
        lines: each line's overrides, by its label in the legend.
        panels: by their titles.
        searched: the values among which the paper chose a line's settings, by line and key.
    """

    title: str
    metric: Literal["episode_return", "win_rate"]
    env: list[str]
    overrides: Overrides
    lines: dict[str, Overrides]
    panels: dict[str, Panel]
    searched: dict[str, dict[str, list[float]]]

    @pydantic.model_validator(mode="after")
    def _names_known_lines(self) -> Self:
        named = {label for panel in self.panels.values() for label in panel.lines} | set(self.searched)
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
    return [
        Run(title, label, (f"env={env}", *figure.overrides, *panel.overrides, *line, *panel.lines.get(label, [])))
        for title, panel in figure.panels.items()
        for label, line in figure.lines.items()
    ]
