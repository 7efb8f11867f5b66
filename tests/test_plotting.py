"""Curves over seeds whose evaluations stand at different environment steps."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from wqmix_jax.logger import MetricsFile, create_metrics
from wqmix_jax.plotting import learning_curve, plot_run


def evaluated(seed: int, points: dict[int, float], **more: float) -> list[dict[str, Any]]:
    """Eval records of one seed, its returns by environment steps."""
    return [
        {"kind": "eval", "seed": seed, "env_steps": steps, "episode_return": value, **more}
        for steps, value in points.items()
    ]


def test_each_seed_is_interpolated_on_its_own_steps_and_none_is_continued() -> None:
    records = evaluated(0, {0: 0.0, 10: 10.0, 20: 20.0}) + evaluated(1, {0: 2.0, 5: 2.0, 18: 28.0})
    curve = learning_curve(records)
    assert curve.env_steps.tolist() == [0, 5, 10, 18]
    both = np.array([[0.0, 5.0, 10.0, 18.0], [2.0, 2.0, 12.0, 28.0]])
    np.testing.assert_allclose(curve.median, both.mean(0))
    np.testing.assert_allclose(curve.low, np.percentile(both, 25, axis=0))
    np.testing.assert_allclose(curve.high, np.percentile(both, 75, axis=0))


def test_one_seed_is_its_own_median() -> None:
    curve = learning_curve(evaluated(3, {0: -1.0, 7: 4.0}))
    assert curve.median.tolist() == curve.low.tolist() == curve.high.tolist() == [-1.0, 4.0]


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_a_win_rate_gets_a_panel_of_its_own(num_seeds: int, tmp_path: Path) -> None:
    heights = []
    for more in ({}, {"win_rate": 0.5}):
        run_dir = tmp_path / str(len(more))
        run_dir.mkdir()
        create_metrics(run_dir, version="0", algo="iql", env="coin", seeds=range(num_seeds))
        with MetricsFile(run_dir, num_bytes=0) as metrics:
            for seed in range(num_seeds):
                metrics.write(evaluated(seed, {0: 0.0, 10: seed, 20: float("nan")}, **more))
        heights.append(matplotlib.image.imread(plot_run(run_dir)).shape[0])
        assert sorted(path.name for path in run_dir.iterdir()) == ["learning_curve.png", "metrics.jsonl", "run.json"]
    assert heights[1] > 1.8 * heights[0]
