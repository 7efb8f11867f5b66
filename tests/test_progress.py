"""What is shown of a run that trains."""

import numpy as np
import pytest

from wqmix_jax import progress
from wqmix_jax.progress import make_display


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands where the list's only number says."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def shown(env_steps: list[int], clock: list[float], at: float, display: progress.Display, *returns: float) -> None:
    clock[0] = at
    lines = [{"kind": "eval", "seed": seed, "episode_return": value} for seed, value in enumerate(returns)]
    display.update(np.array(env_steps), lines)


def test_lines_now_and_then_where_stderr_is_no_terminal(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with make_display(2000, live=True) as display:
        shown([0, 0], clock, 100, display, -1.0, 2.0)
        shown([90, 100], clock, 105, display)  # too soon
        shown([500, 520], clock, 150, display, 3.0, 8.0)
        shown([2001, 2003], clock, 151, display)  # the last is always shown
    assert capfd.readouterr().err.splitlines() == [
        "2 seeds | 0 of 2,000 steps | return 0.50",
        "2 seeds | 500 of 2,000 steps | 20 steps/s | return 5.50 | 0:02:30 left",
        "2 seeds | 2,000 of 2,000 steps | 79 steps/s | return 5.50",
    ]


def test_a_bar_on_a_terminal(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with make_display(1000, live=True) as display:
        shown([0], clock, 0, display, 1.0)
        shown([250], clock, 10, display)
    assert "25% 1 seed | 250 of 1,000 steps | 25 steps/s | return 1.00 | 0:00:30 left" in capfd.readouterr().err


def test_the_pace_is_that_of_the_last_minute(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with make_display(10_000, live=False) as display:
        for chunk, at in enumerate((0, 300, 600, 900, 1200, 1260, 1320, 1380)):  # the last three took a minute each
            shown([1000 * chunk], clock, at, display)
    assert "| 17 steps/s |" in capfd.readouterr().err.splitlines()[-1]


def test_a_seed_that_failed_holds_nothing_up(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with make_display(1000, live=False) as display:
        shown([100, 100], clock, 100, display)
        shown([300], clock, 150, display)
        shown([500], clock, 160, display)
    assert capfd.readouterr().err.splitlines()[1:] == [
        "1 seed | 300 of 1,000 steps",
        "1 seed | 500 of 1,000 steps | 20 steps/s | 0:00:25 left",
    ]


def test_the_return_is_that_of_all_settings_of_a_sweep(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"kind": "eval", "seed": 0, "algo.alpha": alpha, "episode_return": value}
        for alpha, value in ((0.1, 2.0), (0.5, 6.0), (1.0, 40.0))
    ]
    with make_display(1000, live=False) as display:
        display.update(np.array([10, 10, 10]), lines)
    assert capfd.readouterr().err.strip().endswith("return 6.00")
