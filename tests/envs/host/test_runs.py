"""Runs by the command: messages and records about workers, and the end of a run whose workers fail too often."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.environments import TINY
from tests.envs.host.games import faked
from tests.envs.host.linear import linear
from tests.envs.host.running import HERE, WORKERS, toy
from tests.running import main, timeless
from wqmix_jax import load_metrics
from wqmix_jax.errors import RunError
from wqmix_jax.evaluate import play_policies
from wqmix_jax.records.metrics import load_header
from wqmix_jax.runs import session
from wqmix_jax.runs.saved_policies import GreedyPolicy

RUN = ("num_seeds=2", "seed=5", "num_envs=2", "eval_episodes=2", "eval_interval=20", "total_env_steps=60")


def configs(folder: Path, algo_class: str = "Linear", **toy: Any) -> Path:
    """Writes a user's folder with the toy and the linear algorithm."""
    simulator = {"simulator": f"{HERE / 'toy.py'}:Toy", "options": {"episode_limit": 5, **toy}}
    env = {"_target_": "wqmix_jax.envs.host.bridge.HostEnvironment", **WORKERS, "max_restarts": 0, **simulator}
    algo = {"_target_": f"tests.envs.host.linear.{algo_class}", **TINY}
    for group, values in {"env": env, "algo": algo}.items():
        (folder / group).mkdir(parents=True, exist_ok=True)
        (folder / group / f"my_{group}.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_simulator_without_its_class_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The option is written after ``--config-dir``, which argparse alone wouldn't accept."""
    folder = configs(tmp_path / "configs")
    assert main("+algo=my_algo", "--config-dir", str(folder), "env=my_env", "env.simulator=corridor.py") == 2
    message = "error: env.simulator='corridor.py' is not allowed: write FILE.py:CLASS or module:CLASS\n"
    assert capfd.readouterr().err == message


def test_a_run_that_fails_is_saved_and_continues_with_the_same_version_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The fault is in the third episode of some worker, once."""
    marks = tmp_path / "marks"
    marks.mkdir()
    fault = {"kind": "fail", "during": "reset", "marks": str(marks), "from_reset": 3}
    folder, run_dir = configs(tmp_path / "configs", faults=[fault]), tmp_path / "run"
    code = main("+algo=my_algo", "env=my_env", *RUN, "checkpoint.every=1000", f"run_dir={run_dir}", config_dir=folder)
    out, err = capfd.readouterr()
    assert code == 1
    message = r"error: seed [56], environment [01] of training: ValueError: the toy broke \(toy.py:\d+\) in a reset; "
    assert re.search(rf"^{message}no worker is replaced any more after max_restarts=0", err, re.M)
    assert "worker processes: 4 to train and 4 to evaluate (toy 1.2)" in out
    assert "one device trains all seeds" in out
    assert load_header(run_dir)["simulator"] == {"toy": "1.2"}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["worker_restarts"]) == ("failed", 0)
    [saved] = (run_dir / "checkpoints").iterdir()
    assert 0 < int(saved.name) < 60

    header = run_dir / "run.json"
    header.write_text(header.read_text().replace('"1.2"', '"1.1"'))
    assert main(f"resume={run_dir}", config_dir=folder) == 2
    message = f"{run_dir} has toy=1.1, and this installation has toy=1.2"
    *named, refused = capfd.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in named if not line.startswith("importing ")] == [
        f"workers run {HERE / 'toy.py'}"
    ]
    assert refused == f"error: resume={run_dir} is not allowed: {message}"


@pytest.mark.parametrize("broken", [(), ("plot_run", "save_policy")], ids=["all works", "nothing works"])
def test_nothing_hides_the_error_that_ended_a_run(
    broken: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each first step of an episode fails: after the four workers of the first evaluation none is replaced."""
    marks = tmp_path / "marks"
    marks.mkdir()
    fault = {"kind": "fail", "during": "step", "marks": str(marks), "times": 99}
    folder, run_dir = configs(tmp_path / "configs", faults=[fault], fault_step=0), tmp_path / "run"

    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("index 0 is out of bounds")

    for name in broken:
        monkeypatch.setattr(session, name, fail)
    options = ("env.max_restarts=4", "checkpoint.every=1000", f"run_dir={run_dir}")
    assert main("+algo=my_algo", "env=my_env", *RUN, *options, config_dir=folder) == 1
    *before, last = capfd.readouterr().err.splitlines()
    cause = r"error: seed 5, environment 0 of training: ValueError: the toy broke \(toy.py:\d+\) in a step; "
    assert re.match(f"{cause}no worker is replaced any more after max_restarts=4", last)
    warnings = [line for line in before if "IndexError: index 0 is out of bounds" in line]
    expected = ["the checkpoint can't be written", "learning_curve.png can't be drawn"] if broken else []
    assert [line.removeprefix("warning: ").partition(" (")[0] for line in warnings] == expected
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    assert (run_dir / "learning_curve.png").exists() == (not broken)


@pytest.mark.slow
def test_a_failed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    runs = []
    for name, times in (("whole", 0), ("broken", 1)):
        marks = tmp_path / name
        marks.mkdir()
        fault = {"kind": "fail", "during": "reset", "marks": str(marks), "from_reset": 3, "times": times}
        folder, run_dir = configs(tmp_path / f"{name}_configs", faults=[fault]), tmp_path / f"{name}_run"
        ended = main("+algo=my_algo", "env=my_env", *RUN, f"run_dir={run_dir}", config_dir=folder)
        assert ended == times
        if times:
            assert main(f"resume={run_dir}", config_dir=folder) == 0
        runs.append(timeless(load_metrics(run_dir)))
    assert [record["env_steps"] for record in runs[0]][-1] >= 60
    final = [[record for record in run if record["kind"] == "eval"][-2:] for run in runs]
    assert final[0] == final[1]


@pytest.mark.slow  # it compiles three times: no cache keeps programs that call the host
def test_a_run_of_smaclite_that_was_cut_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SMAClite's state holds the last actions, which it never clears: new workers have none."""
    folder = configs(tmp_path / "configs", "LinearInState")
    command = ["+algo=my_algo", "env=smaclite", "env.map=3m", "env.episode_limit=4", *RUN[:-1]]
    runs = []
    with faked(tmp_path / "sc2"):
        for name, first in (("whole", 60), ("cut", 20)):
            run_dir = tmp_path / name
            assert main(*command, f"total_env_steps={first}", f"run_dir={run_dir}", config_dir=folder) == 0
            if first < 60:
                assert main(f"resume={run_dir}", "total_env_steps=60", config_dir=folder) == 0
            runs.append(timeless(load_metrics(run_dir)))
    assert runs[0][-1]["env_steps"] >= 60
    losses = [[record["loss"] for record in run if "loss" in record] for run in runs]
    assert len(losses[0]) > 2
    assert losses[0] == losses[1]
    assert [record for record in runs[0] if record["kind"] == "eval"][-2:] == [
        record for record in runs[1] if record["kind"] == "eval"
    ][-2:]


def test_an_evaluation_without_a_complete_episode_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = {"kind": "fail", "during": "step", "marks": str(tmp_path), "times": 99}
    env = toy(faults=[fault], fault_step=0, workers={"max_restarts": 9})
    policy = GreedyPolicy(linear(), {"agent": np.zeros((3, 3))}, env.spec, "float32")
    with pytest.raises(
        RunError, match=r"^all 2 episodes of seed 7 failed in the simulator: the warnings above say why$"
    ):
        list(play_policies(env, {"7": policy}, episodes=2, seed=0))
    assert capsys.readouterr().err.count("the toy broke") == 2


@pytest.mark.slow
def test_a_run_whose_evaluation_fails_twice_continues_as_if_nothing_had_happened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The fourth episode of a worker is one of the second evaluation: training has reached its second by then."""
    runs = []
    for name, times in (("whole", 0), ("broken", 1)):
        (marks := tmp_path / name).mkdir()
        fault = {"kind": "fail", "during": "reset", "marks": str(marks)}
        faults = [
            {**fault, "from_reset": 4, "times": times},
            {**fault, "from_reset": 3, "times": 2 * times, "after": "resumed"},
        ]
        folder, run_dir = configs(tmp_path / f"{name}_configs", faults=faults), tmp_path / f"{name}_run"
        options = (*RUN, "num_seeds=1", "eval_episodes=6", "total_env_steps=40", "checkpoint.every=1000")
        assert main("+algo=my_algo", "env=my_env", *options, f"run_dir={run_dir}", config_dir=folder) == times
        for code in (1, 0) if times else ():
            assert "of evaluation: ValueError: the toy broke" in capfd.readouterr().err
            (marks / "resumed").touch()
            assert main(f"resume={run_dir}", config_dir=folder) == code
        runs.append(timeless(load_metrics(run_dir)))
    assert "resumed at" in capfd.readouterr().out
    assert not list(run_dir.glob("unusable_checkpoint_*"))
    assert [record["env_steps"] for record in runs[0]][-1] >= 40
    assert runs[0] == runs[1]
