"""Learning curves: median and quartiles over seeds, as in the paper's figures."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from wqmix_jax.records.atomic import atomic
from wqmix_jax.records.metrics import load_header, load_metrics
from wqmix_jax.records.run_dir import failed_members
from wqmix_jax.records.statistics import Estimate, quartiles, seed_curves
from wqmix_jax.training.host_loop import Line
from wqmix_jax.training.members import labels_of, member_name, setting_name

CURVE_FILE = "learning_curve.png"

# From the Okabe-Ito palette, distinguishable with any colour vision; its yellow is left out as too faint on white.
COLOURS = ("#D55E00", "#0072B2", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "os^vDPX*"
LINE_STYLES = ("-", "--", "-.", ":")

# Label and limits; a win rate's limits are its whole range, so that the pictures of two runs can be compared.
_METRICS = {"episode_return": ("evaluation return", (None, None)), "win_rate": ("win rate", (-0.02, 1.02))}


class Style(NamedTuple):
    """The look of one line.

    Attributes:
        colour: the colour of the line and its shade.
        marker: matplotlib's marker on the line.
        line: matplotlib's line style.
    """

    colour: str
    marker: str
    line: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Returns a style for each label; labels with the same beginning (``QMIX, 50k``, ``QMIX, 1M``) share a colour.

    No two of 32 lines of one colour look the same. The first four of each of the first eight families also differ when
    printed in grey.
    """
    families: dict[str, list[str]] = {}
    for label in labels:
        families.setdefault(label.split(",")[0], []).append(label)
    found: dict[str, Style] = {}
    for index, family in enumerate(families.values()):
        colour = COLOURS[index % len(COLOURS)]
        before = sum(style.colour == colour for style in found.values())
        for number, label in enumerate(family, before):
            marker = MARKERS[(index + number // len(LINE_STYLES)) % len(MARKERS)]
            found[label] = Style(colour, marker, LINE_STYLES[number % len(LINE_STYLES)])
    return found


def plot_run(run_dir: str | os.PathLike[str]) -> Path:
    """Draws ``learning_curve.png`` from a run's ``metrics.jsonl`` and returns its path; the run may still train.

    Seeds that failed are left out, unless all seeds of a line did. Without any evaluation the axes are empty.
    """
    folder = Path(run_dir)
    failed = failed_members(folder)
    header, records = load_header(folder), load_metrics(folder, kind="eval")
    settings: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        settings.setdefault(setting_name(record), []).append(record)
    names = [name for name in _METRICS if all(name in record for record in records)][: len(_METRICS) if records else 1]
    figure = new_figure(6.4, 3.9 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for name, axes in zip(names, panels, strict=True):
        _draw_settings(axes, settings, failed, name)
        decorate(axes, name)
        if settings:
            axes.legend(frameon=False)
    task = " ".join(str(header[key]) for key in ("env", "map") if key in header)
    panels[0].set_title(f"{header['algo']} on {task}")
    panels[-1].set_xlabel("environment steps")
    return save_figure(figure, folder / CURVE_FILE)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 150) -> Path:
    """Writes the figure in the format of the path's ending, with ``dpi`` dots per inch, see `atomic`."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=dpi)
    return path


def draw_band(
    axes: Axes, env_steps: np.ndarray, estimate: Estimate, style: Style, label: str, shade: str | None = None
) -> None:
    """Draws a line, and shades its interval where there is one.

    Args:
        axes: the axes to draw on.
        env_steps: ``[P]``, the x-axis.
        estimate: the line and its interval, ``[P]`` each.
        style: the look of both.
        label: the line's label in the legend.
        shade: the shade's label; without it the shade has no entry in the legend.
    """
    # Markers at equal distances need a finite point, which a curve that consists of failed evaluations doesn't have.
    every = 0.15 if np.isfinite(estimate.value).any() else None
    dashes = {"marker": style.marker, "markersize": 5, "markevery": every, "linestyle": style.line}
    axes.plot(env_steps, estimate.value, color=style.colour, linewidth=1.8, label=label, **dashes)
    if np.any(estimate.low != estimate.high) and np.isfinite(estimate.low).any():
        # Shades overlap, so they are faint; thin edges show which line each belongs to.
        axes.fill_between(
            env_steps, estimate.low, estimate.high, label=shade, color=style.colour, alpha=0.12, linewidth=0
        )
        for edge in (estimate.low, estimate.high):
            axes.plot(env_steps, edge, color=style.colour, linewidth=0.6, alpha=0.6, linestyle=style.line)


def decorate(axes: Axes, metric: str) -> None:
    """Sets labels and limits of axes that show ``metric`` over environment steps."""
    label, limits = _METRICS.get(metric, (metric, (None, None)))
    axes.set_ylabel(label)
    axes.set_ylim(*limits)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def metric_label(metric: str) -> str:
    """Returns the axis label of a metric."""
    return _METRICS[metric][0] if metric in _METRICS else metric


def seeds_label(num_seeds: int) -> str:
    """Returns ``1 seed``, ``3 seeds``."""
    return f"{num_seeds} seed" if num_seeds == 1 else f"{num_seeds} seeds"


def _draw_settings(
    axes: Axes, settings: Mapping[str, Sequence[dict[str, Any]]], failed: Mapping[str, Line], metric: str
) -> None:
    """Draws a line for every combination of swept values; most runs have a single one."""
    looks = styles(list(settings))
    for setting, records in settings.items():
        sound = [record for record in records if member_name(labels_of(record)) not in failed]
        curves = seed_curves(sound or records, metric)
        num_seeds, num_failed = curves.values.shape[1], sum(setting_name(line) == setting for line in failed.values())
        seeds = f"median of {num_seeds} seeds" if num_seeds > 1 else "1 seed"
        seeds += f", {num_failed} failed" if num_failed else ""
        label = f"{setting}: {seeds}" if setting else seeds
        shade = "25-75% quartiles" if num_seeds > 1 and len(settings) == 1 else None
        draw_band(axes, curves.env_steps, quartiles(curves.values), looks[setting], label, shade)
