"""The paper's figures as data: ``experiments/configs/figures/fig2.yaml`` to ``fig9.yaml``, and the runs of each figure.

A figure has panels (one set of axes each) and lines (one algorithm each). A run's overrides are the figure's, then the
panel's, then the line's, then those that the panel adds to that line. Values are written out even if they equal an
algorithm's defaults: a figure keeps the paper's settings if the defaults change.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

import pydantic
import yaml

from wqmix_jax.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
FIGURES = CONFIGS / "figures"

Overrides = list[str]


class Panel(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One set of axes.

    Attributes:
        overrides: options of all its runs, as on the command line.
        lines: further options of some of the figure's lines, by their labels.
    """

    overrides: Overrides = []
    lines: dict[str, Overrides] = {}


class Figure(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One figure of the paper.

    Attributes:
        title: the title above the panels.
        metric: the field of the evaluation records that is drawn.
        lowest: the lower end of the metric's axis; lower values are not drawn.
        env: the environments on which the figure can be trained; the first is the paper's.
        overrides: options of all its runs.
        lines: each line's overrides, by its label in the legend.
        further: lines that the paper's figure lacks, which are trained and drawn only if they are asked for.
        panels: the panels by their titles.
        authors: files with curves of the authors' code, by line.
        passes: values of the metric; the data report when each seed first reaches them.
        searched: the values among which the paper chose a line's settings, by line and key.
    """

    title: str
    metric: Literal["episode_return", "win_rate"]
    env: list[str]
    overrides: Overrides
    lines: dict[str, Overrides]
    further: dict[str, Overrides] = {}
    panels: dict[str, Panel]
    authors: dict[str, str] = {}
    passes: list[float] = []
    lowest: float | None = None
    searched: dict[str, dict[str, list[float]]]

    @property
    def all_lines(self) -> dict[str, Overrides]:
        """The paper's lines, then the further ones."""
        return self.lines | self.further

    @pydantic.model_validator(mode="after")
    def _names_known_lines(self) -> Self:
        named = {label for panel in self.panels.values() for label in panel.lines} | {*self.searched, *self.authors}
        if unknown := sorted(named - set(self.all_lines)):
            raise ValueError(f"lines={unknown} is not allowed: the figure's lines are {', '.join(self.all_lines)}")
        if twice := sorted(set(self.lines) & set(self.further)):
            raise ValueError(f"further={twice} is not allowed: these are lines of the paper's figure")
        return self


class Run(NamedTuple):
    """One line of one panel.

    Attributes:
        panel: the panel's title.
        line: the line's label.
        overrides: arguments of `wqmix_jax.load_config` or of the command line; the caller adds seeds and ``run_dir``.
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
        """The line's label, with the panel's title except for its task: ``CW-QMIX, alpha = 0.1``."""
        return ", ".join(part for part in [*self.panel.split(", "), self.line] if part != self.task)

    @property
    def folder(self) -> Path:
        """The folder of its runs inside ``OUT``: ``3s5z/qmix_qstar``, or ``qmix_qstar`` if there are no maps."""
        panel, line = _file_name(self.panel), _file_name(self.line)
        return Path(line) if panel == self.env else Path(panel, line)

    def _chosen(self, key: str) -> str | None:
        """Returns the value of the last override of a key."""
        pairs = (override.partition("=") for override in self.overrides)
        return {name: value for name, _, value in pairs}.get(key)


def _file_name(title: str) -> str:
    """Returns a title as the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "_", title.lower().replace("*", "star").replace(" + ", "_")).strip("_")


def figure_names() -> list[str]:
    """Returns the figures that have a yaml: ``["fig2", .., "fig9"]``."""
    return sorted(path.stem for path in FIGURES.glob("*.yaml"))


def load_figure(name: str) -> Figure:
    """Reads ``experiments/configs/figures/NAME.yaml``.

    Raises:
        ConfigError: if there is no such figure.
    """
    if name not in figure_names():
        raise ConfigError(f"figure={name} is not allowed: choose one of {', '.join(figure_names())}")
    return Figure(**yaml.safe_load((FIGURES / f"{name}.yaml").read_text()))


def runs(figure: Figure, env: str | None = None) -> list[Run]:
    """Returns all runs of a figure on one of its environments, by default the paper's; those of further lines are last.

    Raises:
        ConfigError: if the figure has no such environment.
    """
    env = figure.env[0] if env is None else env
    if env not in figure.env:
        raise ConfigError(f"env={env} is not allowed: this figure is drawn on {' or '.join(figure.env)}")
    scale = ("env.max_return=20",) if env == "smax" else ()  # SMAC's scale, for which the paper chose its settings
    shared = (f"env={env}", *scale, *figure.overrides)
    return [
        Run(title, label, (*shared, *panel.overrides, *line, *panel.lines.get(label, [])))
        for lines in (figure.lines, figure.further)
        for title, panel in figure.panels.items()
        for label, line in lines.items()
    ]
