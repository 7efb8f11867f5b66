"""The picture of a run: median and quartiles over seeds, as in the paper's figures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from wqmix_jax.logger import load_header, load_metrics

CURVE_FILE = "learning_curve.png"

_BLUE, _ORANGE = "#0072B2", "#D55E00"  # of the Okabe-Ito palette, told apart with any colour vision
# Label, colour and limits; a win rate's are all that it can be, so that the pictures of two runs can be compared.
_PANELS = {
    "episode_return": ("evaluation return", _BLUE, (None, None)),
    "win_rate": ("win rate", _ORANGE, (-0.02, 1.02)),
}


class Curve(NamedTuple):
    """One figure over training, ``[P]`` each.

    Attributes:
        env_steps: where the others stand.
        low: lower quartile over seeds.
        median: over seeds.
        high: upper quartile over seeds.
    """

    env_steps: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray


def learning_curve(records: Sequence[dict[str, Any]], name: str = "episode_return") -> Curve:
    """Median and quartiles of ``name`` over the seeds of eval records.

    Each seed is interpolated on its own environment steps, and nothing is drawn past the seed that came least far.
    """
    seeds = sorted({record["seed"] for record in records})
    series = [_series(records, seed, name) for seed in seeds]
    last = min(steps[-1] for steps, _ in series)
    grid = np.unique(np.concatenate([steps[steps <= last] for steps, _ in series]))
    values = np.stack([np.interp(grid, steps, figures) for steps, figures in series])
    return Curve(grid, *np.percentile(values, (25, 50, 75), axis=0))


def plot_run(run_dir: str | os.PathLike[str]) -> Path:
    """Draws ``learning_curve.png`` from a run's ``metrics.jsonl``, as far as it has come, and returns its path."""
    folder = Path(run_dir)
    header, records = load_header(folder), load_metrics(folder, kind="eval")
    names = [name for name in _PANELS if all(name in record for record in records)]
    figure = Figure(figsize=(6.4, 3.9 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for name, axes in zip(names, panels, strict=True):
        _draw(axes, learning_curve(records, name), *_PANELS[name], num_seeds=len(header["seeds"]))
    panels[0].set_title(f"{header['algo']} on {header['env']}")
    panels[-1].set_xlabel("environment steps")
    path = folder / CURVE_FILE
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    return temporary.replace(path)


def _series(records: Sequence[dict[str, Any]], seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["env_steps"], record[name]) for record in records if record["seed"] == seed]
    steps, figures = np.asarray(points, np.float64).T
    return steps, figures


def _draw(axes: Any, curve: Curve, name: str, colour: str, limits: tuple[Any, Any], *, num_seeds: int) -> None:
    label = f"median of {num_seeds} seeds" if num_seeds > 1 else "1 seed"
    axes.plot(curve.env_steps, curve.median, color=colour, linewidth=1.8, label=label)
    if num_seeds > 1:
        shade = {"color": colour, "alpha": 0.25, "linewidth": 0}
        axes.fill_between(curve.env_steps, curve.low, curve.high, label="25-75% quartiles", **shade)
    axes.set_ylabel(name)
    axes.set_ylim(*limits)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
