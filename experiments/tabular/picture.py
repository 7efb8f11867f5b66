"""Draws ``shares.png`` from the files of `exact` and `deep`: ``python -m experiments.tabular.picture``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.tabular.games import FOLDER, Share, read
from wqmix_jax.cli.command import command

# The Okabe-Ito palette, and a marker for each: distinct for any colour vision, and in grey.
STYLES = {
    "uniform": ("QMIX (alpha = 1)", "#000000", ""),
    "central": ("idealised central (eq. 4)", "#0072B2", "o"),
    "optimistic": ("optimistic (eq. 5)", "#D55E00", "s"),
    "practical_central": ("central as trained (eq. 10)", "#009E73", "^"),
    "qmix": ("QMIX (alpha = 1)", "#000000", ""),
    "cw_qmix": ("CW-QMIX", "#009E73", "^"),
    "ow_qmix": ("OW-QMIX", "#D55E00", "s"),
}
TRAINED_AS = {"qmix": "uniform", "ow_qmix": "optimistic", "cw_qmix": "practical_central"}
"""The exact weighting of each algorithm's loss."""

RIGHT = {"argmax": "the optimum is in the argmax set", "greedy": "the agents play the optimum"}


@command
def main() -> None:
    """Draws the picture and prints its path."""
    print(draw(FOLDER / "shares.png"))


def draw(picture: Path) -> Path:
    """Draws exact projections above; below trained networks, with exact projections of the same games as thin lines."""
    exact, deep, same_games = (read(FOLDER / f"{name}.jsonl") for name in ("exact", "deep", "exact_same_games"))
    figure = Figure(figsize=(10, 7.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(RIGHT), sharex=True, sharey=True)
    for row, shares, source in zip(panels, (exact, deep), ("exact projections", "trained networks"), strict=True):
        for axes, (field, title) in zip(row, RIGHT.items(), strict=True):
            _decorate(axes)
            _curves(axes, shares, field)
            axes.set_title(f"{source}, {shares[0].games} games: {title}", fontsize=10)
        row[0].set_ylabel("share of random games")
    for axes, field in zip(panels[1], RIGHT, strict=True):
        _curves(axes, [share for share in same_games if share.name in TRAINED_AS.values()], field, is_reference=True)
        axes.set_xlabel("alpha")
    for row in panels:
        row[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(picture, dpi=110)
    return picture


def _curves(axes: Any, shares: Sequence[Share], field: str, *, is_reference: bool = False) -> None:
    for name in dict.fromkeys(share.name for share in shares):
        label, colour, marker = STYLES[name]
        matching = sorted((share for share in shares if share.name == name), key=lambda share: share.alpha)
        heights = [getattr(share, field) for share in matching]
        line = {"color": colour, "linewidth": 1.6, "label": label}
        if is_reference:
            line |= {"linewidth": 1.2, "linestyle": ":", "label": "exact, same games" if len(matching) == 1 else None}
        if len(matching) == 1:
            axes.axhline(heights[0], **{"linestyle": "--"} | line)
        else:
            axes.plot([share.alpha for share in matching], heights, marker="" if is_reference else marker, **line)


def _decorate(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
