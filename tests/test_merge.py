"""Parts of a run are joined if they only differ in their seeds, and tables list different runs separately."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from wqmix_jax import load_metrics, merge, table
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.metrics import MetricsFile, create_metrics, load_header
from wqmix_jax.records.run_dir import SUMMARY_FILE, read_config, read_summary, save_config
from wqmix_jax.runs import session


def part(folder: Path, seeds: list[int], returns: list[float], **options: Any) -> Path:
    """A finished run without training."""
    folder.mkdir(parents=True)
    create_metrics(folder, version="0", algo="iql", env="coin", members=[{"seed": seed} for seed in seeds])
    values = {"algo": {"lr": 1e-3}, "env": {}, "seed": 0, "num_seeds": 3, "hosts": 2, "host": 0, "total_env_steps": 9}
    save_config(folder, {**values, "run_dir": str(folder), **options})
    line = {"kind": "eval", "env_steps": 9, "learner_steps": 1, "episodes": 2, "episode_length": 1.0}
    lines = [
        line | {"seed": seed, "episode_return": value} for seed, value in zip(seeds, returns, strict=bool(returns))
    ]
    with MetricsFile(folder, num_bytes=0) as metrics:
        metrics.write(lines)
    final = {str(line["seed"]): line for line in lines}
    (folder / SUMMARY_FILE).write_text(json.dumps({"status": "finished", "failed": [], "final": final}))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two hosts."""
    part(tmp_path / "run" / "host_0", [0], [1.0])
    part(tmp_path / "run" / "host_1", [1, 2], [2.0, 4.0], host=1)
    return tmp_path / "run"


def test_parts_are_joined(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    merge.main([str(run_dir), "--out", str(out)])
    assert capsys.readouterr().err == ""
    assert [(line["seed"], line["episode_return"]) for line in load_metrics(out)] == [(0, 1.0), (1, 2.0), (2, 4.0)]
    assert load_header(out)["seeds"] == [0, 1, 2]
    config = read_config(out)
    assert (config["seed"], config["num_seeds"], config["hosts"], config["host"]) == (0, 3, 1, 0)
    assert set(read_summary(out)["final"]) == {"0", "1", "2"}
    assert (out / "learning_curve.png").is_file()
    with pytest.raises(ConfigError, match="it was merged from"):
        session.resume(out, {})


def test_a_missing_host_and_an_unfinished_one_are_told(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "host_1" / SUMMARY_FILE).write_text(json.dumps({"status": "running", "failed": [], "final": {}}))
    merge.main([str(run_dir / "host_1"), "--out", str(tmp_path / "merged")])
    err = capsys.readouterr().err
    assert f"warning: {run_dir / 'host_1'} is not finished (running)" in err
    assert "warning: of 2 hosts these are missing: 0" in err
    assert read_summary(tmp_path / "merged")["status"] == "running"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seeds": [1], "algo": {"lr": 2e-3}}, "other has algo.lr=0.002 and"),
        ({"seeds": [1], "total_env_steps": 10}, "other has total_env_steps=10 and"),
        ({"seeds": [0]}, "seed 0 is in both"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    other: dict[str, Any], message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = other.pop("seeds")
    part(tmp_path / "other", seeds, [0.0], **other)
    with pytest.raises(SystemExit) as ended:
        merge.main([str(run_dir / "host_0"), str(tmp_path / "other"), "--out", str(tmp_path / "merged")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def set_version(folder: Path, version: str) -> None:
    """Makes it look as if it had been trained in that version of StarCraft II."""
    header = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(header | {"simulator": {"StarCraft II": version}}))


def test_versions_of_a_game_are_not_joined(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host, version in ((0, "4.6.2"), (1, "4.10")):
        set_version(run_dir / f"host_{host}", version)
    with pytest.raises(SystemExit) as ended:
        merge.main([str(run_dir), "--out", str(tmp_path / "merged")])
    assert ended.value.code == 2
    assert "host_1 has StarCraft II=4.10\n" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    rows = table.table([run_dir / "host_0", run_dir / "host_1"])
    assert [(row["version of StarCraft II"], row["seeds"]) for row in rows] == [("4.6.2", 1), ("4.10", 2)]


def test_a_game_whose_version_was_not_recorded_yet_is_joined_with_a_warning(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_dir / "host_0", run_dir / "host_1", part(tmp_path / "third", [3], [8.0])]
    header = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps(header | {"simulator": {"jaxmarl": "0.2.0"}}))
    merge.merge(runs[:2], tmp_path / "merged")
    message = f"warning: {runs[0]} doesn't record its version of jaxmarl, and {runs[1]} has jaxmarl=0.2.0"
    assert message in capsys.readouterr().err
    assert "simulator" not in load_header(tmp_path / "merged")  # it is not known of all parts
    merge.merge([runs[1], runs[0]], tmp_path / "again")
    assert "simulator" not in load_header(tmp_path / "again")

    header = json.loads((runs[2] / "run.json").read_text())
    (runs[2] / "run.json").write_text(json.dumps(header | {"simulator": {"jaxmarl": "0.3.0"}}))
    with pytest.raises(ConfigError, match=r"host_1 has jaxmarl=0\.2\.0, and .*third has jaxmarl=0\.3\.0"):
        merge.merge(runs, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_hosts_may_have_their_simulators_in_different_places(run_dir: Path, tmp_path: Path) -> None:
    part(tmp_path / "elsewhere", [3], [8.0], env={"worker_python": "/opt/smac/bin/python"})
    runs = [run_dir / "host_0", tmp_path / "elsewhere"]
    assert [row["seeds"] for row in table.table(runs)] == [2]
    merge.merge(runs, tmp_path / "merged")
    assert load_header(tmp_path / "merged")["seeds"] == [0, 3]


def test_nothing_is_overwritten(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge.main([str(run_dir), "--out", str(run_dir)])
    assert f"error: --out={run_dir} is not allowed: it isn't empty\n" == capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "nonsense\n", "metrics.jsonl is damaged"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "[]", "config.yaml is damaged: it holds no options"),
        ("summary.json", "{", "summary.json is damaged"),
    ],
)
def test_a_damaged_part_is_named_and_nothing_is_written(
    name: str, text: str, message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "host_1" / name).write_text(text)
    for command in (merge.main, table.main):
        with pytest.raises(SystemExit) as ended:
            command([str(run_dir), *(["--out", str(tmp_path / "merged")] if command is merge.main else [])])
        assert ended.value.code == 2
        assert f"{run_dir / 'host_1' / message}" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_table_has_a_row_per_setting(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part(tmp_path / "other", [0], [8.0], algo={"lr": 2e-3})
    table.main([str(run_dir), str(tmp_path / "other"), "--csv", str(tmp_path / "table.csv")])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert shown[0][:5] == ["algo.lr", "seeds", "failed", "env_steps", "episode_return"]
    assert [(row["algo.lr"], row["seeds"], row["episode_return"]) for row in rows] == [
        ("0.001", "3", "2"),
        ("0.002", "1", "8"),
    ]
    assert (rows[0]["episode_return_q25"], rows[0]["episode_return_q75"]) == ("1.5", "3")


def test_different_tasks_are_told_apart_in_a_table(tmp_path: Path) -> None:
    one = part(tmp_path / "one", [0], [1.0], env={"map": "3m"}, eval_episodes=32)
    other = part(
        tmp_path / "other", [0], [2.0], algo={"lr": 2e-3, "mixer": "vdn"}, env={"map": "3s5z"}, eval_episodes=8
    )
    header = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**header, "algo": "vdn"}))
    rows = table.table([one, other])
    columns = {"algo", "env.map", "eval_episodes"}  # and not algo.lr, which belongs to different algorithms
    assert [{name: row[name] for name in columns} for row in rows] == [
        {"algo": "iql", "env.map": "3m", "eval_episodes": "32"},
        {"algo": "vdn", "env.map": "3s5z", "eval_episodes": "8"},
    ]
    assert not any(name.startswith("algo.") for row in rows for name in row)


def test_seeds_without_an_evaluation_are_told(tmp_path: Path) -> None:
    part(tmp_path / "begun", [1, 2], [])
    [row] = table.table([part(tmp_path / "one", [0], [4.0]), tmp_path / "begun"])
    assert (row["seeds"], row["not evaluated yet"], row["episode_return"]) == (3, 2, "4")


def test_seeds_that_are_there_twice_are_not_counted_twice(run_dir: Path, tmp_path: Path) -> None:
    again, other = part(tmp_path / "again", [0], [8.0]), part(tmp_path / "other", [0], [8.0], algo={"lr": 2e-3})
    parts = sorted(path.parent for path in run_dir.rglob("run.json"))
    rows = table.table([*parts, again, other])
    assert [(row.get("run"), row["algo.lr"], row["seeds"]) for row in rows] == [
        *((str(path), "0.001", len(load_header(path)["seeds"])) for path in parts),
        (str(again), "0.001", 1),
        (None, "0.002", 1),
    ]


def test_a_table_that_can_not_be_written_is_refused_first(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "a.csv", f"there is no folder {tmp_path / 'no'}"),
    ):
        with pytest.raises(SystemExit) as ended:
            table.main([str(run_dir), "--csv", str(path)])
        assert ended.value.code == 2
        shown = capsys.readouterr()
        assert shown.err == f"error: argument --csv: {path} is not allowed: {message}\n"
        assert shown.out == ""


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        table.main([str(tmp_path)])
    assert "there is no run in it" in capsys.readouterr().err


def test_runs_from_before_sweeps_are_tabled(tmp_path: Path) -> None:
    folder = part(tmp_path / "run", [0, 1], [2.0, 4.0])
    header = json.loads((folder / "run.json").read_text())
    del header["members"]
    (folder / "run.json").write_text(json.dumps(header))
    [row] = table.table([folder])
    assert (row["seeds"], row["episode_return"]) == (2, "3")


@pytest.mark.parametrize(
    ("statuses", "joined"),
    [
        (("finished", "finished"), "finished"),
        (("finished", "stopped"), "stopped"),
        (("stopped", "interrupted"), "running"),
    ],
)
def test_the_status_is_that_of_all_parts(statuses: tuple[str, ...], joined: str) -> None:
    assert merge._joined([{"status": status} for status in statuses])["status"] == joined
