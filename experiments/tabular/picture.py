"""Draws ``shares.png`` from ``exact.jsonl`` and ``deep.jsonl``: ``python -m experiments.tabular.picture``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.tabular.games import FOLDER, Share, read

# The Okabe-Ito palette and markers of their own: told apart with any colour vision, and in grey.
STYLES = {
    "uniform": ("QMIX (alpha = 1)", "#000000", ""),
    "central": ("idealised central (eq. 4)", "#0072B2", "o"),
    "optimistic": ("optimistic (eq. 5)", "#D55E00", "s"),
    "practical_central": ("central as trained (eq. 10)", "#009E73", "^"),
    "qmix": ("QMIX", "#000000", ""),
    "cw_qmix": ("CW-QMIX", "#009E73", "^"),
    "ow_qmix": ("OW-QMIX", "#D55E00", "s"),
}
RIGHT = {"argmax": "the optimum is in the argmax set", "greedy": "the agents play the optimum"}


def main() -> None:
    print(draw([FOLDER / "exact.jsonl", FOLDER / "deep.jsonl"], FOLDER / "shares.png"))


def draw(files: Sequence[Path], picture: Path) -> Path:
    """One row of panels for each file that is there: what is right against alpha."""
    files = [file for file in files if file.exists()]
    figure = Figure(figsize=(10, 3.9 * len(files)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(files), len(RIGHT), sharey=True, squeeze=False)
    for file, row in zip(files, panels, strict=True):
        shares = read(file)
        trained = any(share.name == "qmix" for share in shares)
        source = "trained networks" if trained else "exact projections"
        for axes, (field, title) in zip(row, RIGHT.items(), strict=True):
            _panel(axes, shares, field)
            axes.set_title(f"{source}, {shares[0].games} games: {title}", fontsize=10)
        row[0].set_ylabel("share of random games")
        row[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(picture, dpi=110)
    return picture


def _panel(axes: Any, shares: Sequence[Share], field: str) -> None:
    for name in dict.fromkeys(share.name for share in shares):
        label, colour, marker = STYLES[name]
        mine = sorted((share for share in shares if share.name == name), key=lambda share: share.alpha)
        heights = [getattr(share, field) for share in mine]
        if len(mine) == 1:
            axes.axhline(heights[0], color=colour, linestyle="--", linewidth=1.4, label=label)
        else:
            axes.plot([share.alpha for share in mine], heights, color=colour, marker=marker, markersize=5, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("alpha")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
