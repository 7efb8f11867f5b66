"""Draws a figure: on the left median and quartiles as in the paper, on the right the IQM with its interval."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.figure_data import Line, curves
from wqmix_jax.records.plotting import Style, decorate, draw_band, new_figure, save_figure, seeds_label
from wqmix_jax.records.statistics import iqm_estimate, iqm_name, quartiles


def draw(
    path: Path,
    lines: Sequence[Line],
    metric: str,
    title: Sequence[str],
    looks: Mapping[str, Style],
    authors: Mapping[str, Path],
    lowest: float | None = None,
) -> Path:
    """Draws all panels, one below the other.

    Args:
        path: the file of the picture.
        lines: the lines of all panels that have records.
        metric: the field of the records that is drawn.
        title: the lines of the title.
        looks: the style of each line, by its label.
        authors: files with curves of the authors' code, by line.
        lowest: the lower end of the metric's axis.

    Returns:
        ``path``.
    """
    panels = list(dict.fromkeys(line.run.panel for line in lines))
    figure = new_figure(14, 0.8 + 3.9 * len(panels))
    figure.suptitle("\n".join(textwrap.fill(line, 150) for line in title), fontsize=11)
    for panel, (paper, mean) in zip(panels, figure.subplots(len(panels), 2, squeeze=False, sharey="row"), strict=True):
        for line in (line for line in lines if line.run.panel == panel):
            drawn, look = curves(line, metric), looks[line.run.line]
            draw_band(paper, drawn.env_steps, quartiles(drawn.values), look, _label(line))
            draw_band(mean, drawn.env_steps, iqm_estimate(drawn.values), look, _label(line))
        last = max(line.records[-1]["env_steps"] for line in lines if line.run.panel == panel)
        for label in (label for label in authors if any(line.run.line == label for line in lines)):
            _draw_authors(paper, authors[label], looks[label], label, last)
        fewest = min(line.num_seeds for line in lines if line.run.panel == panel)
        for axes, statistic in (
            (paper, "median, 25-75% quartiles"),
            (mean, f"{iqm_name(fewest)}, 95% bootstrap interval"),
        ):
            axes.set_title(f"{panel}: {statistic}", fontsize=10)
            axes.set_xlabel("environment steps")
            decorate(axes, metric)
        if lowest is not None:
            _end_below(paper, mean, lowest)
        mean.set_ylabel("")
        handles, labels = paper.get_legend_handles_labels()
        mean.legend(handles, labels, frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save_figure(figure, path, dpi=110)


def _end_below(paper: Axes, mean: Axes, lowest: float) -> None:
    """Cuts the shared axis at ``lowest``, with matplotlib's margin above the visible values; unless none is visible."""
    highest = max(axes.dataLim.y1 for axes in (paper, mean))
    if highest > lowest:
        paper.set_ylim(lowest, highest + paper.get_ymargin() * (highest - lowest))


def _label(line: Line) -> str:
    failed = f", {len(line.failed)} failed" if line.failed else ""
    return f"{line.run.line} ({seeds_label(line.num_seeds)}{failed})"


def _draw_authors(axes: Axes, path: Path, style: Style, label: str, last: int) -> None:
    """Draws a curve of the authors' code up to the step ``last``; the file's first line has its settings."""
    header, *points = map(json.loads, path.read_text().splitlines())
    shown = [(point["env_steps"], point["episode_return"]) for point in points if point["env_steps"] <= last]
    steps, returns = np.array(shown).reshape(-1, 2).T
    label = f"{label}, authors' code,\n  epsilon over {header['epsilon_anneal_time'] // 1000}k (1 seed)"
    axes.plot(steps, returns, color=style.colour, linewidth=1.2, linestyle=":", label=label)
