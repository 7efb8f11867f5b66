"""Runs of one task side by side: what differs, by how much, and how surely."""

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.recorded import evaluated, record_run
from wqmix_jax import compare

VALUES = {
    "algo": {"_target_": "coin.IQL", "lr": 0.1},
    "env": {"_target_": "coin.Coin", "sides": 2},
    "seed": 0,
    "num_seeds": 3,
    "total_env_steps": 20,
    "sweep": {},
}


def run(folder: Path, ends: dict[int, float], last: int = 20, *, env: Any = None, **options: Any) -> Path:
    """A run whose seeds rise from 0, at 0 and 10 steps, to ``ends`` at ``last``."""
    lines = [line for seed, end in ends.items() for line in evaluated(seed, {0: 0.0, 10: 0.0, last: end})]
    record = {key: options.pop(key) for key in ("failed", "simulator", "algo_name", "version") if key in options}
    record["algo"] = record.pop("algo_name", "iql")
    values = {**VALUES, "env": {**VALUES["env"], **(env or {})}, **options}
    return record_run(folder, values, lines, **record)


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout with their blanks narrowed, and stderr."""
    code = 0
    try:
        compare.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, [re.sub(" +", " ", line).strip() for line in out.splitlines()], err


def test_two_runs_are_compared_at_the_steps_that_both_have_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until 20, where B, which rises from 10 to 30, is half as high as in the end."""
    one = run(tmp_path / "one", {0: 8.0, 1: 8.0})
    other = run(tmp_path / "other", {0: 24.0, 1: 24.0}, last=30, algo={**VALUES["algo"], "lr": 0.2}, algo_name="vdn")
    code, lines, err = printed(capsys, one, other, "--out", tmp_path / "picture.png")
    assert (code, err) == (0, "")
    assert lines[0] == f"A iql: {one} (2 seeds)"
    assert lines[1] == f"B vdn: {other} (2 seeds)"
    assert "algo.lr 0.1 0.2" in lines
    assert "algo iql vdn" in lines
    assert not any(line.startswith(("total_env_steps", "env.", "run_dir")) for line in lines)
    assert (
        "evaluation return, IQM (of fewer than 4 seeds the mean) over seeds [95% interval], until 20 environment steps:"
        in lines
    )
    assert "A 2 8 [8, 8] 2 [2, 2]" in lines  # 0 until 10 steps, then 4 on average
    assert "an interval without width means that all seeds ended alike; it says nothing about other seeds" in lines
    assert "B 2 12 [12, 12] 3 [3, 3]" in lines
    assert "B 4 [4, 4] 1 [1, 1] 1 [1, 1] 0.333" in lines  # two of six orders
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_curves_intervals_and_chances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kw: drawn.append(self) or Path(path).touch())
    one, other = run(tmp_path / "one", {0: 8.0, 1: 6.0}), run(tmp_path / "other", {0: 4.0, 1: 7.0})
    compare.main([str(one), str(other), "--out", str(tmp_path / "picture.png")])
    curves, final, better = drawn[0].axes
    assert [text.get_text() for text in curves.get_legend().get_texts()][:2] == ["A one (2 seeds)", "B other (2 seeds)"]
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("environment steps", "evaluation return")
    points = [line.get_xdata()[0] for line in final.lines if line.get_marker() != "None"]
    assert [float(point) for point in points] == [7.0, 5.5]
    assert [label.get_text() for label in better.get_yticklabels()] == ["B"]
    assert float(better.lines[1].get_xdata()[0]) == 0.25  # one pair of four
    marked = [line.get_color() for line in curves.lines if line.get_marker() != "None"]
    assert len(marked) == len(set(marked)) == 2


def test_the_legend_tells_runs_of_one_algorithm_apart(tmp_path: Path) -> None:
    algo = VALUES["algo"]
    runs = [
        run(tmp_path / "slow", {0: 1.0}),
        run(tmp_path / "fast", {0: 2.0}, algo={**algo, "lr": 0.2}),
        run(tmp_path / "other", {0: 3.0}, algo_name="vdn"),
    ]
    groups = compare.find_groups(runs)
    assert [compare._title(name, groups) for name in groups] == ["A iql, lr=0.1", "B iql, lr=0.2", "C vdn"]
    many = {**algo, "lr": 0.2, "gamma": 0.5, "batch_size": 7}
    groups = compare.find_groups([runs[0], run(tmp_path / "all_else", {0: 2.0}, algo=many), runs[2]])
    assert [compare._title(name, groups) for name in groups] == ["A slow", "B all_else", "C vdn"]
    again = run(tmp_path / "elsewhere" / "slow", {1: 2.0})  # another folder of the same name, which says nothing
    groups = compare.find_groups([runs[0], again])
    assert [compare._title(name, groups) for name in groups] == ["A iql", "B iql"]


def test_seeds_that_failed_are_left_out_and_parts_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "one" / "host_0", {0: 8.0}, host=0)
    run(tmp_path / "one" / "host_1", {1: 10.0, 2: 99.0}, host=1, failed=[2])
    other = run(tmp_path / "other", {0: 4.0, 1: 4.0, 2: 5.0, 3: 5.0})
    code, lines, _ = printed(capsys, tmp_path / "one", other, "--out", tmp_path / "picture.png")
    assert code == 0
    assert lines[0].endswith("host_0, " + f"{tmp_path}/one/host_1 (2 seeds, 1 failed and left out)")
    assert any(line.startswith("A 2 9 [8, 10] ") for line in lines)
    assert any(line.startswith("B 4 4.5 [4, 5] ") for line in lines)


def test_the_values_of_a_sweep_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        line
        for lr in (0.1, 0.2)
        for seed in (0, 1)
        for line in evaluated(seed, {0: 0.0, 10: 10 * lr}, **{"algo.lr": lr})
    ]
    folder = record_run(tmp_path / "swept", {**VALUES, "sweep": {"lr": [0.1, 0.2]}}, lines)
    code, lines, _ = printed(capsys, folder, "--out", tmp_path / "picture.png")
    assert code == 0
    assert "algo.lr 0.1 0.2" in lines
    assert any(line.startswith("B 2 2 [2, 2] 1 [1, 1]") for line in lines)
    code, _, err = printed(capsys, folder, "--metric", "algo.lr")
    assert code == 2
    assert "metric=algo.lr is not allowed: all of these runs have episode_length, episode_return" in err


def test_seeds_of_another_version_of_this_library_are_not_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "both" / "one", {0: 8.0, 1: 8.0})
    run(tmp_path / "both" / "other", {2: 8.0, 3: 8.0}, version="1")
    code, lines, _ = printed(capsys, tmp_path / "both", "--out", tmp_path / "picture.png")
    assert code == 0
    assert [line.split(":")[0] for line in lines[:2]] == ["A iql", "B iql"]
    assert "version of wqmix_jax 0 1" in lines


def test_a_game_whose_version_was_not_recorded_yet_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = run(tmp_path / "old", {0: 8.0, 1: 8.0})
    new = run(tmp_path / "new", {0: 8.0, 1: 8.0}, simulator={"jaxmarl": "0.2.0"})
    newer = run(tmp_path / "newer", {0: 8.0, 1: 8.0}, simulator={"jaxmarl": "0.3.0"})
    code, lines, err = printed(capsys, old, new, "--out", tmp_path / "picture.png")
    assert code == 0
    assert err == (
        f"warning: {old} doesn't record its version of jaxmarl, "
        f"and {new} has jaxmarl=0.2.0: these may be different games\n"
    )
    assert "version of jaxmarl - 0.2.0" in lines
    code, _, err = printed(capsys, old, new, newer, "--out", tmp_path / "picture.png")
    assert code == 2
    assert f"{new} has jaxmarl=0.2.0, and {newer} has jaxmarl=0.3.0: figures of different games" in err


@pytest.mark.parametrize(
    ("changes", "arguments", "complaint"),
    [
        ({"env": {"sides": 3}}, (), "has env.sides=2, and .*other has env.sides=3: figures of different tasks"),
        (
            {"simulator": {"StarCraft II": "4.10"}},
            (),
            "has StarCraft II=unknown, and .*other has StarCraft II=4.10: figures of",
        ),
        (
            {},
            ("--metric", "win_rate"),
            "metric=win_rate is not allowed: all of these runs have episode_length, episode_",
        ),
        ({}, ("--out", "picture.pgf"), "--out: picture.pgf is not allowed: it must end with ."),
        ({}, ("--out", "picture.doc"), "--out: picture.doc is not allowed: it must end with ."),
        ({}, ("--out", "picture"), "--out: picture is not allowed: it must end with ."),
        ({}, ("--out", "new/picture.png"), "--out: new/picture.png is not allowed: there is no folder new"),
        ({"failed": [0]}, (), "other can't be compared: all of its seeds failed"),
    ],
)
def test_what_can_not_be_compared_is_refused_in_one_line(
    changes: dict[str, Any],
    arguments: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = run(tmp_path / "one", {0: 1.0}), run(tmp_path / "other", {0: 2.0}, **changes)
    code, _, err = printed(capsys, one, other, *arguments)
    assert code == 2
    assert re.search(f"^error: .*{complaint}", err)
    assert err.count("\n") == 1


def test_how_workers_run_is_no_other_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "one", {0: 1.0}, env={"eval_envs": 1})
    other = run(tmp_path / "other", {0: 2.0}, env={"eval_envs": 4})
    code, lines, _ = printed(capsys, one, other, "--out", tmp_path / "picture.png")
    assert code == 0
    assert "env.eval_envs 1 4" in lines
    assert "A 1 1 [-] 0.25 [-]" in lines  # no interval from one seed


def test_runs_without_an_evaluation_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = run(tmp_path / "parts" / "begun", {})
    one, other = run(tmp_path / "parts" / "one", {0: 1.0}), run(tmp_path / "other", {0: 2.0})
    code, lines, err = printed(capsys, begun, one, other)
    assert (code, lines, err) == (2, [], f"error: {begun} can't be compared: it has no evaluations yet\n")
    code, lines, err = printed(capsys, tmp_path / "parts", other, "--out", tmp_path / "picture.png")
    assert (code, err) == (0, f"warning: {begun} has no evaluations yet and is left out\n")
    assert lines[0] == f"A iql: {one} (1 seed)"


def test_folders_that_are_no_two_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "parts" / "one", {0: 1.0})
    assert printed(capsys, one)[::2] == (2, f"error: {one} can't be compared: two runs with evaluations are needed\n")
    run(tmp_path / "parts" / "two", {0: 1.0})
    code, _, err = printed(capsys, tmp_path / "parts", one)
    assert code == 2
    assert "seed 0 is in both" in err
    code, _, err = printed(capsys, tmp_path / "nothing", one)
    assert code == 2
    assert "there is no run in it" in err
