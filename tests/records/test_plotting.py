"""Curves over seeds that are evaluated at different environment steps."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests import recorded
from wqmix_jax.records.metrics import MetricsFile, create_metrics
from wqmix_jax.records.plotting import plot_run, styles
from wqmix_jax.records.statistics import quartiles, seed_curves


def evaluated(seed: int, points: dict[int, float], **more: float) -> list[dict[str, Any]]:
    """Returns eval records of one seed, given its returns by environment steps."""
    return [
        {"kind": "eval", "seed": seed, "env_steps": steps, "episode_return": value, **more}
        for steps, value in points.items()
    ]


def test_each_seed_is_interpolated_on_its_own_steps_and_none_is_continued() -> None:
    records = evaluated(0, {0: 0.0, 10: 10.0, 20: 20.0}) + evaluated(1, {0: 2.0, 5: 2.0, 18: 28.0})
    curves = seed_curves(records, "episode_return")
    median, low, high = quartiles(curves.values)
    assert curves.env_steps.tolist() == [0, 5, 10, 18]
    both = np.array([[0.0, 5.0, 10.0, 18.0], [2.0, 2.0, 12.0, 28.0]])
    np.testing.assert_allclose(median, both.mean(0))
    np.testing.assert_allclose(low, np.percentile(both, 25, axis=0))
    np.testing.assert_allclose(high, np.percentile(both, 75, axis=0))


def test_one_seed_is_its_own_median() -> None:
    median, low, high = quartiles(seed_curves(evaluated(3, {0: -1.0, 7: 4.0}), "episode_return").values)
    assert median.tolist() == low.tolist() == high.tolist() == [-1.0, 4.0]


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_a_win_rate_gets_a_panel_of_its_own(num_seeds: int, tmp_path: Path) -> None:
    heights = []
    for more in ({}, {"win_rate": 0.5}):
        run_dir = tmp_path / str(len(more))
        run_dir.mkdir()
        create_metrics(
            run_dir, version="0", algo="iql", env="coin", members=[{"seed": seed} for seed in range(num_seeds)]
        )
        with MetricsFile(run_dir, num_bytes=0) as metrics:
            for seed in range(num_seeds):
                metrics.write(evaluated(seed, {0: 0.0, 10: seed, 20: float("nan")}, **more))
        heights.append(matplotlib.image.imread(plot_run(run_dir)).shape[0])
        assert sorted(path.name for path in run_dir.iterdir()) == ["learning_curve.png", "metrics.jsonl", "run.json"]
    assert heights[1] > 1.8 * heights[0]


def test_a_win_rate_stands_on_an_axis_from_0_to_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: figures.append(figure) or save(figure, *args, **kw)
    )
    create_metrics(tmp_path, version="0", algo="iql", env="coin", map_name="heads", members=[{"seed": 0}])
    with MetricsFile(tmp_path, num_bytes=0) as metrics:
        metrics.write(evaluated(0, {0: 3.0, 10: 4.0}, win_rate=0.25))
    plot_run(tmp_path)
    returns, win_rate = figures[0].axes
    assert returns.get_title() == "iql on coin heads"
    assert win_rate.get_ylim() == (-0.02, 1.02)
    assert returns.get_ylim()[0] > 2.5
    assert win_rate.lines[0].get_ydata().tolist() == [0.25, 0.25]


def test_swept_values_have_lines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: figures.append(figure) or Path(path).touch())
    members = [{"seed": seed, "algo.alpha": alpha} for alpha in (0.1, 0.5) for seed in (0, 1)]
    create_metrics(tmp_path, version="0", algo="ow_qmix", env="coin", members=members)
    with MetricsFile(tmp_path, num_bytes=0) as metrics:
        for label in members:
            metrics.write([line | label for line in evaluated(label["seed"], {0: 0.0, 10: 10 * label["algo.alpha"]})])
    plot_run(tmp_path)
    [axes] = figures[0].axes
    assert axes.get_title() == "ow_qmix on coin"
    assert [line.get_label() for line in axes.lines] == ["alpha=0.1: median of 2 seeds", "alpha=0.5: median of 2 seeds"]
    assert [line.get_ydata()[-1] for line in axes.lines] == [1.0, 5.0]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()


@pytest.mark.parametrize(
    ("failed", "label", "last"),
    [
        ([2], "median of 2 seeds, 1 failed", (20, 3.0)),
        ([0, 2], "1 seed, 2 failed", (20, 4.0)),
        ([0, 1, 2], "median of 3 seeds, 3 failed", (10, 1.0)),
    ],
)
def test_a_seed_that_failed_does_not_cut_the_others_off(
    failed: list[int],
    label: str,
    last: tuple[int, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: figures.append(figure) or Path(path).touch())
    lines = evaluated(0, {0: 0.0, 20: 2.0}) + evaluated(1, {0: 0.0, 20: 4.0}) + evaluated(2, {0: 0.0, 10: -9.0})
    plot_run(recorded.record_run(tmp_path / "run", {}, lines, failed=failed))
    line = figures[0].axes[0].lines[0]
    assert line.get_label() == label
    assert (line.get_xdata()[-1], line.get_ydata()[-1]) == last


@pytest.mark.parametrize("lines", [[], evaluated(0, {0: float("nan"), 10: float("nan")}, win_rate=float("nan"))])
def test_evaluations_that_all_failed_and_none_at_all_can_be_drawn(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    assert plot_run(recorded.record_run(tmp_path / "run", {}, lines)).stat().st_size > 0


def test_lines_of_a_large_sweep_look_different() -> None:
    labels = [f"alpha={alpha}, lr={lr}" for alpha in range(8) for lr in range(9)]
    assert len(set(styles(labels).values())) == len(labels)
    assert len({style.colour for label, style in styles(labels).items() if label.startswith("alpha=3,")}) == 1
    in_grey = {style[1:] for label, style in styles(labels).items() if label[-1] in "0123"}
    assert len(in_grey) == 8 * 4
    many = [f"alpha={alpha}, lr={lr}" for alpha in range(20) for lr in range(3)]
    assert len(set(styles(many).values())) == len(many)
