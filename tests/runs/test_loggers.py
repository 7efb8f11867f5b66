"""``metrics.jsonl`` as it is written and read, and the loggers fed from it: W&B for real, but offline."""

import csv
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from tests.running import ROOT, TINY, killed_after, main, shared_programs
from wqmix_jax import load_metrics
from wqmix_jax.config import LoggerOptions
from wqmix_jax.errors import ConfigError, install_extra
from wqmix_jax.records.metrics import HEADER_FILE, METRICS_FILE, MetricsFile, create_metrics, load_header
from wqmix_jax.runs import loggers
from wqmix_jax.runs.loggers import CSV_FILE, SUPERSEDED, TENSORBOARD_DIR, Loggers
from wqmix_jax.training.members import labels_of, member_name

LINES = [
    {"kind": kind, "seed": seed, "env_steps": steps, "learner_steps": 0, "episodes": steps, "episode_return": value}
    for kind, seed, steps, value in (
        ("eval", 0, 0, 0.0),
        ("eval", 1, 0, 1.5),
        ("train", 0, 3, -2.25),
        ("train", 1, 2, math.inf),
        ("eval", 0, 3, math.nan),
        ("eval", 1, 2, 0.1),
    )
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    create_metrics(tmp_path, version="0", algo="iql", env="coin", members=[{"seed": 0}, {"seed": 1}])
    with MetricsFile(tmp_path, num_bytes=0) as metrics:
        metrics.write(LINES[:2])
        metrics.write(LINES[2:])
    return tmp_path


def test_what_is_written_is_read(run_dir: Path) -> None:
    read = load_metrics(run_dir)
    assert len(read) == len(LINES)
    for line, expected in zip(read, LINES, strict=True):
        assert list(line) == list(expected)
        finite = {key: value for key, value in expected.items() if key != "episode_return"}
        assert finite.items() <= line.items()
        value = expected["episode_return"]
        assert line["episode_return"] == pytest.approx(value if math.isfinite(value) else math.nan, abs=0, nan_ok=True)


def test_every_line_is_plain_json(run_dir: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for text in (run_dir / METRICS_FILE).read_text().splitlines():
        json.loads(text, parse_constant=refuse)


def test_records_by_kind_and_seed(run_dir: Path) -> None:
    assert [line["kind"] for line in load_metrics(run_dir, kind="train")] == ["train", "train"]
    assert [line["env_steps"] for line in load_metrics(run_dir, seed=1)] == [0, 2, 2]
    assert [line["env_steps"] for line in load_metrics(str(run_dir), kind="eval", seed=0)] == [0, 3]


def test_a_torn_last_line_is_left_out(run_dir: Path) -> None:
    whole = load_metrics(run_dir, kind="train")
    with open(run_dir / METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "se')
    assert load_metrics(run_dir, kind="train") == whole


@pytest.mark.parametrize("line", ["{nonsense", "[3]", '{"kind": "eval"}'])
def test_a_damaged_file_is_named(run_dir: Path, line: str) -> None:
    with open(run_dir / METRICS_FILE, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is damaged"):
        load_metrics(run_dir)


def test_another_schema_is_refused(run_dir: Path) -> None:
    path = run_dir / HEADER_FILE
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match=r"run\.json has schema=2; this version of wqmix_jax reads schema 1"):
        load_metrics(run_dir)
    for text in ("", "[]", '{"schema": 1}', '{"schema": 1, "version": "0", "algo": "iql", "env": "coin", "seeds": 3}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"run\.json is damaged"):
            load_metrics(run_dir)


@pytest.mark.parametrize("name", [HEADER_FILE, METRICS_FILE])
def test_a_missing_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} can't be read: No such file"):
        load_metrics(run_dir)


def test_the_file_is_cut_where_a_checkpoint_says(run_dir: Path) -> None:
    data = (run_dir / METRICS_FILE).read_bytes()
    length = sum(map(len, data.splitlines(keepends=True)[:2]))
    with MetricsFile(run_dir, num_bytes=length) as metrics:
        assert metrics.num_bytes == length
        metrics.write(LINES[2:])
        metrics.sync()
        assert metrics.num_bytes == len(data)
    assert (run_dir / METRICS_FILE).read_bytes() == data
    with MetricsFile(run_dir, num_bytes=0):
        assert load_metrics(run_dir) == []
    with pytest.raises(ConfigError, match="it is shorter than when the last checkpoint was written"):
        MetricsFile(run_dir, num_bytes=length)


FILES = {"tensorboard": True, "csv": True}


def options(mode: Any, **changes: Any) -> LoggerOptions:
    """W&B in some mode, TensorBoard and CSV."""
    return LoggerOptions(**({"wandb": mode, "project": "test", "group": "curves", "progress": False} | FILES | changes))


def test_offline_runs_hold_what_metrics_hold(run_dir: Path) -> None:
    with Loggers(run_dir, options("offline"), {"algo": {"lr": 0.5}}) as runs:
        runs.sync()
        append(run_dir, [LINES[0] | {"env_steps": 9, "episodes": 9}])
    wandb.teardown()  # as at a process's end: its service has written everything once this returns
    token = load_header(run_dir)["run"]
    for seed in (0, 1):
        [run] = (record.run for record in wandb_records(run_dir, seed) if record.HasField("run"))
        assert (run.run_id, run.run_group, run.project) == (f"{token}-{seed}", "curves", "test")
        assert run.display_name == f"curves_seed{seed}"
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["algo"] == {"lr": 0.5}
        assert config["seed"] == seed
    assert_one_curve(run_dir)


def append(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with MetricsFile(run_dir, num_bytes=(run_dir / METRICS_FILE).stat().st_size) as metrics:
        metrics.write(lines)


def cut_to(run_dir: Path, count: int) -> None:
    """As a checkpoint does that knows of so many records."""
    data = b"".join((run_dir / METRICS_FILE).read_bytes().splitlines(keepends=True)[:count])
    with MetricsFile(run_dir, num_bytes=len(data)):
        pass


def assert_files(run_dir: Path) -> None:
    """Checks that the CSV file and the event files have every record once."""
    records = load_metrics(run_dir)
    with open(run_dir / CSV_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: text for name, text in row.items() if text} for row in rows] == [
        {name: str(value) for name, value in record.items()} for record in records
    ]
    expected: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for record in records:
        labels = labels_of(record)
        for name in record.keys() - labels.keys() - {"kind", "env_steps", "learner_steps", "episodes"}:
            curve = expected.setdefault(member_name(labels), {}).setdefault(f"{record['kind']}/{name}", [])
            curve.append((record["env_steps"], str(np.float32(record[name]))))
    folders = [path for path in (run_dir / TENSORBOARD_DIR).iterdir() if path.is_dir()]
    assert {folder.name: curves(folder) for folder in folders} == expected


def curves(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """The only event file of a folder, as TensorBoard reads it: step and value by tag."""
    [path] = folder.iterdir()
    read = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    return {
        tag: [(event.step, str(np.float32(event.value))) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def assert_one_curve(run_dir: Path) -> None:
    """Checks that ``wandb sync`` finds one file per seed, with every record once, and so do the readers of files."""
    assert_files(run_dir)
    assert len({path.resolve() for path in run_dir.glob("wandb/*/*.wandb")}) == 2, "without the link latest-run"
    for seed in (0, 1):
        logged = [record.history for record in wandb_records(run_dir, seed) if record.HasField("history")]
        lines = load_metrics(run_dir, seed=seed)
        steps = [2 * line["episodes"] + (line["kind"] == "eval") for line in lines]
        assert [record.step.num for record in logged] == steps == sorted(set(steps))
        for values, line in zip(map(history, logged), lines, strict=True):
            assert values["env_steps"] == line["env_steps"]
            name = f"{line['kind']}/episode_return"
            if math.isfinite(line["episode_return"]):
                assert values[name] == line["episode_return"]


def test_a_run_that_is_resumed_offline_is_one_curve(run_dir: Path) -> None:
    for more in (
        [],
        [LINES[4] | {"env_steps": 9, "episodes": 9}],
        [LINES[5] | {"env_steps": 11, "episodes": 11}, LINES[2] | {"env_steps": 12, "episodes": 12}],
    ):
        with Loggers(run_dir, options("offline"), {}) as runs:
            runs.sync()
            append(run_dir, more)
        wandb.teardown()
        assert_one_curve(run_dir)
    assert len(list((run_dir / "wandb" / SUPERSEDED).glob("*/*.wandb"))) == 4


def test_a_run_for_which_wandb_is_switched_on_when_it_is_resumed_is_one_curve(run_dir: Path) -> None:
    with Loggers(run_dir, options("disabled"), {}) as runs:
        runs.sync()
    with Loggers(run_dir, options("offline"), {}) as runs:
        append(run_dir, [LINES[4] | {"env_steps": 9, "episodes": 9}])
        runs.sync()
    wandb.teardown()
    assert_one_curve(run_dir)


def hand_over_and_die(run_dir: str) -> None:
    """Writes in a separate process the records so far and some more, and ends with ``kill -9``."""
    with Loggers(Path(run_dir), options("offline"), {}) as runs:
        runs.sync()
        append(
            Path(run_dir), [LINES[4] | {"env_steps": 9, "episodes": 9}, LINES[5] | {"env_steps": 11, "episodes": 11}]
        )
        runs.sync()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_was_killed_after_its_last_checkpoint_is_one_curve(run_dir: Path) -> None:
    code = f"from tests.runs.test_loggers import hand_over_and_die; hand_over_and_die({str(run_dir)!r})"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(load_metrics(run_dir)) == len(LINES) + 2
    cut_to(run_dir, 4)
    with Loggers(run_dir, options("offline"), {}) as runs:
        append(
            run_dir,
            [
                LINES[4] | {"env_steps": 3, "episodes": 3},
                LINES[5] | {"env_steps": 4, "episodes": 4},
                LINES[5] | {"env_steps": 13, "episodes": 13},
            ],
        )
        runs.sync()
    wandb.teardown()
    assert_one_curve(run_dir)


def test_an_online_run_gets_what_it_does_not_have(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B refuses steps below the one at which a run continues."""
    logged: list[tuple[str, int, int]] = []

    def init(*, id: str, resume: str, **_: Any) -> Any:
        def log(values: Mapping[str, Any], *, step: int, commit: bool) -> None:
            assert commit
            logged.append((id[-1], step, values["env_steps"]))

        assert resume == "allow"
        starting_step = 7 if id.endswith("-0") else 0  # after the train line of episode 3
        return SimpleNamespace(log=log, starting_step=starting_step, define_metric=Mock(), finish=Mock())

    monkeypatch.setattr(wandb, "init", init)
    (run_dir / "wandb" / f"offline-run-20260101_000000-{load_header(run_dir)['run']}-1").mkdir(parents=True)
    with Loggers(run_dir, options("online"), {}) as runs:
        runs.sync()
        append(run_dir, [LINES[4] | {"env_steps": 9, "episodes": 9}])
    assert [each for each in logged if each[0] == "0"] == [("0", 7, 3), ("0", 19, 9)]
    assert [each for each in logged if each[0] == "1"] == [("1", 1, 0), ("1", 4, 2), ("1", 5, 2)]
    assert not list(run_dir.glob("wandb/offline-run-*")), "a later `wandb sync` would overwrite the online run"


@pytest.mark.parametrize(
    ("folder", "group"),
    [
        ("outputs/first", "first"),
        ("outputs/big/host_1", "big"),
        ("outputs/2026-11-29_sweep/0", "2026-11-29_sweep/0"),
    ],
)
def test_a_group_is_named_by_what_tells_its_folder_apart(
    folder: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **given: started.append(given) or SimpleNamespace(define_metric=print))
    Path(folder).mkdir(parents=True)
    create_metrics(Path(folder), version="0", algo="iql", env="coin", members=[{"seed": 0}])
    Loggers(Path(folder), options("offline", group=None), {})
    monkeypatch.chdir(folder)
    Loggers(Path(), options("offline", group=None), {})
    assert [(given["group"], given["name"]) for given in started] == [(group, f"{group}_seed0")] * 2


def test_nothing_is_made_where_wandb_is_disabled(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", None)
    with Loggers(run_dir, options("disabled", tensorboard=False, csv=False), {}) as runs:
        runs.sync()
    assert sorted(path.name for path in run_dir.iterdir()) == sorted([HEADER_FILE, METRICS_FILE])


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_there_is_told_once_and_stops_nothing(
    broken: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    with Loggers(run_dir, options("offline"), {}) as runs:
        runs.sync()
        runs.sync()
    monkeypatch.undo()
    wandb.teardown()
    assert capfd.readouterr().err == ("warning: W&B logging stopped (no route); metrics.jsonl has every record\n")
    assert len(load_metrics(run_dir)) == len(LINES)


def test_a_column_that_appears_later_is_added_at_the_right(run_dir: Path) -> None:
    with Loggers(run_dir, options("disabled", tensorboard=False), {}) as running:
        before = (run_dir / CSV_FILE).read_text().splitlines()
        append(run_dir, [LINES[4] | {"env_steps": 9, "episodes": 9, "loss": 0.25}])
        running.sync()
    after = (run_dir / CSV_FILE).read_text().splitlines()
    assert before[0] == "kind,seed,env_steps,learner_steps,episodes,episode_return"
    assert before[1:3] == ["eval,0,0,0,0,0.0", "eval,1,0,0,0,1.5"]
    assert after == [f"{before[0]},loss", *(f"{row}," for row in before[1:]), "eval,0,9,0,9,nan,0.25"]


def test_files_of_a_folder_that_starts_over_are_emptied(run_dir: Path) -> None:
    with Loggers(run_dir, options("disabled"), {}):
        pass
    cut_to(run_dir, 0)
    with Loggers(run_dir, options("disabled"), {}):
        assert (run_dir / CSV_FILE).read_text() == ""
        assert curves(run_dir / TENSORBOARD_DIR / "0") == curves(run_dir / TENSORBOARD_DIR / "1") == {}


@pytest.mark.parametrize(("broken", "name"), [("_append_events", "TensorBoard"), ("csv", "CSV")])
def test_a_logger_that_fails_leaves_the_others_alone(
    broken: str, name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers, broken, None)
    with Loggers(run_dir, options("disabled"), {}) as running:
        running.sync()
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: {name} logging stopped (")
    assert line.endswith("; metrics.jsonl has every record")
    if name == "CSV":
        assert curves(run_dir / TENSORBOARD_DIR / "1")["train/episode_return"] == [(2, "nan")]
    else:
        assert len((run_dir / CSV_FILE).read_text().splitlines()) == 1 + len(LINES)


def test_a_killed_run_of_a_sweep_has_every_record_once(tmp_path: Path) -> None:
    run_dir, files = tmp_path / "run", ("logger.tensorboard=true", "logger.csv=true")
    with shared_programs():
        with killed_after(9):
            main(*TINY, "sweep.lr=[0.01,0.02]", *files, f"run_dir={run_dir}")
        (run_dir / CSV_FILE).write_text((run_dir / CSV_FILE).read_text() + "eval,3,")  # as if in the middle of a row
        assert main(f"resume={run_dir}") == 0
    assert {path.name for path in (run_dir / TENSORBOARD_DIR).iterdir()} == {
        "3-lr0.01", "4-lr0.01", "3-lr0.02", "4-lr0.02",
    }  # fmt: skip
    assert "loss" in load_metrics(run_dir, kind="train")[-1]
    assert_files(run_dir)


def test_every_host_has_its_files(tmp_path: Path) -> None:
    with shared_programs():
        for host in (0, 1):
            arguments = ("hosts=2", f"host={host}", "logger.tensorboard=true", "logger.csv=true")
            assert main(*TINY, *arguments, "total_env_steps=4", f"run_dir={tmp_path / 'run'}") == 0
            assert_files(tmp_path / "run" / f"host_{host}")


def test_tensorboard_is_an_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    assert main(*TINY, "logger.tensorboard=true", f"run_dir={tmp_path / 'run'}") == 2
    message = f"error: logger.tensorboard=true is not allowed here: {install_extra('tensorboard')} first\n"
    assert capfd.readouterr().err == message
    assert main(*TINY, "logger.csv=perhaps", f"run_dir={tmp_path / 'run'}") == 2
    assert capfd.readouterr().err == "error: logger.csv='perhaps' is not allowed: input should be a valid boolean\n"
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    assert main(*TINY, "logger.wandb=offline", f"run_dir={tmp_path / 'run'}") == 2
    assert capfd.readouterr().err == "error: logger.wandb=offline is not allowed here: pip install wandb first\n"
    assert not (tmp_path / "run").exists()


def wandb_records(run_dir: Path, seed: int) -> Iterator[wandb_internal_pb2.Record]:
    """The records of one offline run: protobufs in LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    [path] = run_dir.glob(f"wandb/offline-run-*-{seed}/run-*.wandb")
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def history(record: Any) -> Mapping[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.item}
