"""The progress of a run, as a bar and as lines."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from wqmix_jax.runs import progress
from wqmix_jax.runs.progress import make_display


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the list's only number."""
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
        "2 seeds | 0 of 2,000 steps | eval return 0.50",
        "2 seeds | 500 of 2,000 steps | 20 steps/s | eval return 5.50 | 0:02:30 left",
        "2 seeds | 2,000 of 2,000 steps | 79 steps/s | eval return 5.50",
    ]


def test_a_bar_on_a_terminal(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with make_display(1000, live=True) as display:
        shown([0], clock, 0, display, 1.0)
        shown([250], clock, 10, display)
    err = capfd.readouterr().err
    assert "compiling" in err
    assert (
        "25%  250 of 1,000 steps  25 steps/s  eval return 1.00  0:00:30 left" in err
    )  # 80 columns, as rich assumes here


LONG = 100_000_000
"""Steps of a run whose figures are long."""


@pytest.mark.parametrize(
    ("width", "with_wins", "words"),
    [
        (60, False, "25%  eval return -12.50  1 day, 10:43:20 left"),
        (80, False, "25%  1,200 steps/s  eval return -12.50  1 day, 10:43:20 left"),
        (100, False, "25%  1,200 steps/s  eval return -12.50  1 day, 10:43:20 left"),
        (
            120,
            False,
            "25%  2 seeds  25,000,000 of 100,000,000 steps  1,200 steps/s  eval return -12.50  1 day, 10:43:20 left",
        ),
        (60, True, "25%  win rate 0.75  1 day, 10:43:20 left"),
        (80, True, "25%  eval return -12.50  win rate 0.75  1 day, 10:43:20 left"),
        (100, True, "25%  1,200 steps/s  eval return -12.50  win rate 0.75  1 day, 10:43:20 left"),
    ],
)
def test_the_bar_and_the_time_left_are_whole_at_every_width(
    clock: list[float], width: int, with_wins: bool, words: str
) -> None:
    """A quarter of the steps in ten and a half hours of the clock."""
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    display = progress._Bar(LONG, console)
    with display:
        for at, steps, wins in ((0, 0, 0.0), (41_666 + 2 / 3, LONG // 4, 0.75)):
            clock[0] = at
            lines = [{"kind": "eval", "seed": seed, "episode_return": -12.5} for seed in (0, 1)]
            display.update(np.array([steps] * 2), [line | ({"win_rate": wins} if with_wins else {}) for line in lines])
    shown_line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).splitlines()[-1]
    assert len(shown_line) <= width
    found = re.fullmatch(r". ([━╸╺ ]+) (\S.*)", shown_line)
    assert found
    assert found[2].rstrip() == words
    assert found[1].count("━") >= 2
    assert len(found[1]) >= progress.NARROWEST_BAR


def test_the_win_rate_is_that_of_the_last_evaluation(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    def evaluation(wins: float) -> list[progress.Line]:
        return [{"kind": "eval", "seed": 0, "episode_return": 1.0, "win_rate": wins}]

    with make_display(1000, live=False) as display:
        display.update(np.array([0]), evaluation(0.25))
        clock[0] += 20
        display.update(np.array([100]), evaluation(0.75))
        clock[0] += 20
        display.update(np.array([200]), [])
    err = capfd.readouterr().err.splitlines()
    assert [re.findall("win rate [0-9.]+", line) for line in err] == [["win rate 0.25"], *[["win rate 0.75"]] * 2]


def test_a_display_is_shown_where_somebody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def display(shown: bool | None) -> str:
        return type(progress.make_optional_display(10, shown=shown)).__name__

    assert (display(None), display(True), display(False)) == ("_Nothing", "_Lines", "_Nothing")
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    assert (display(None), display(True), display(False)) == ("_Bar", "_Bar", "_Nothing")
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda _: None)  # without ipywidgets
    assert display(None) == "_Lines"
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    assert (display(None), display(False)) == ("_Bar", "_Nothing")


def test_what_goes_to_a_file_is_not_taken_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with make_display(1000, live=True):
        print("a record")
    assert capfd.readouterr().out == "a record\n"


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
    assert capfd.readouterr().err.strip().endswith("eval return 6.00")
