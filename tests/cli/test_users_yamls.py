"""A user's yamls that have the names of built-in ones."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wqmix_jax import evaluate, load_config, train
from wqmix_jax.cli.overrides import compose_evaluation
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR
from wqmix_jax.runs import session


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with ``vdn``, ``_base``, which it inherits, ``matrix_game`` and an algorithm with another name."""
    for group in ("algo", "env"):
        (tmp_path / group).mkdir()
    base = (CONFIG_DIR / "algo" / "_base.yaml").read_text()
    (tmp_path / "algo" / "_base.yaml").write_text(base.replace("gamma: 0.99", "gamma: 0.5"))
    (tmp_path / "algo" / "vdn.yaml").write_text("defaults: [qmix]\nmixer: vdn\nrms_decay: 0.75\n")
    (tmp_path / "algo" / "my_own.yaml").write_text("defaults: [iql]\n")
    game = (CONFIG_DIR / "env" / "matrix_game.yaml").read_text()
    (tmp_path / "env" / "matrix_game.yaml").write_text(game.replace("table2", "table1"))
    return tmp_path


def lines(mine: Path, *names: str) -> list[str]:
    return sorted(f"using {mine / name}.yaml instead of the built-in {name.replace('/', '=')}" for name in names)


def seen(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return sorted(line for line in capfd.readouterr().err.splitlines() if line.startswith("using "))


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """Returns the options of the runs that a command line would start, and the names of their algorithms."""
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        session, "start", lambda config, values, *, algo, **_: started.append({**values, "algo_name": algo})
    )
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train.main()
    return started


def test_python_takes_the_users_and_says_so_once(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config("+algo=vdn", "env=matrix_game", config_dir=mine)
    assert (config.algo.gamma, config.algo.rms_decay, config.env.payoff[0][0]) == (0.5, 0.75, 1.0)
    assert seen(capfd) == lines(mine, "algo/_base", "algo/vdn", "env/matrix_game")
    load_config("+algo=vdn", "env=matrix_game", config_dir=mine)
    assert seen(capfd) == []


def test_without_the_folder_the_built_in_ones_are_taken(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_config("+algo=vdn", config_dir=mine)
    config = load_config("+algo=vdn", "env=matrix_game")
    assert (config.algo.gamma, config.algo.rms_decay, config.env.payoff[0][0]) == (0.99, 0.99, 8.0)
    assert seen(capfd) == lines(mine, "algo/_base", "algo/vdn")


def test_what_is_inherited_is_the_users_too(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_config("+algo=qplex", config_dir=mine).algo.gamma == 0.5
    assert load_config("+algo=my_own", config_dir=mine).algo.gamma == 0.5
    assert seen(capfd) == lines(mine, "algo/_base")


def test_train_takes_the_users(mine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    [values] = start(monkeypatch, "--config-dir", str(mine), "+algo=vdn", "env=matrix_game")
    assert (values["algo"]["gamma"], values["algo"]["rms_decay"], values["env"]["payoff"]) == (0.5, 0.75, "table1")
    assert values["algo_name"] == "vdn"
    assert seen(capfd) == lines(mine, "algo/_base", "algo/vdn", "env/matrix_game")


def test_each_run_of_a_sweep_takes_the_users(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = start(monkeypatch, "-m", "--config-dir", str(mine), "+algo=vdn,iql", "env=matrix_game", "run_dir=sweep")
    found = [(run["algo_name"], run["algo"]["gamma"], run["algo"]["rms_decay"]) for run in runs]
    assert found == [("vdn", 0.5, 0.75), ("iql", 0.5, 0.99)]
    assert seen(capfd) == lines(mine, "algo/_base", "algo/vdn", "env/matrix_game")


@pytest.mark.parametrize("source", ["pymarl=somewhere", "policy_file=best.npz"])
def test_evaluate_takes_the_users(source: str, mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides: Sequence[str] = [source, "env=matrix_game", *(["+algo=vdn"] if "policy" in source else [])]
    values = compose_evaluation(overrides, str(mine)).values
    assert (values["env"]["payoff"], values["algo"]["gamma"]) == ("table1", 0.5)
    used = ["algo/_base", "env/matrix_game", *(["algo/vdn"] if "policy" in source else [])]
    assert seen(capfd) == lines(mine, *used)


def test_evaluate_says_nothing_of_what_a_run_does_not_use(mine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compose_evaluation(["run_dir=somewhere"], str(mine))
    assert seen(capfd) == []


def test_the_help_shows_the_users(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = (CONFIG_DIR / "train.yaml").read_text().replace("num_envs: 1\n", "num_envs: 3\n")
    (mine / "train.yaml").write_text(own)
    assert start(monkeypatch, "--config-dir", str(mine), "+algo=vdn", "--help") == []
    out, err = capfd.readouterr()
    assert "gamma: 0.5 " in out
    assert "num_envs: 3 " in out
    assert load_config("+algo=vdn", config_dir=mine).num_envs == 3
    assert sorted(err.splitlines()) == lines(mine, "algo/_base", "algo/vdn", "train")


def test_hydras_own_way_to_add_a_folder_is_refused(mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"^hydra\.searchpath=\[.*\] is not allowed: --config-dir DIR adds the yamls"):
        load_config("+algo=vdn", f"hydra.searchpath=['file://{mine}']")


@pytest.mark.parametrize("name", ["vdn", "_base"])
def test_a_yaml_that_inherits_the_one_it_replaces_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / f"{name}.yaml").write_text(f"defaults: [{name}]\nlr: 0.25\n")
    with pytest.raises(ConfigError, match=r"^a yaml lists itself in its defaults: one that replaces a built-in yaml"):
        load_config("+algo=vdn", config_dir=tmp_path)


def test_an_incomplete_train_yaml_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [_self_, {env: matrix_game}]\nseed: 3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, "--config-dir", str(tmp_path), "+algo=vdn")
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    assert re.search(r"train.yaml lacks .*num_seeds.*: it replaces the built-in train.yaml as a whole$", line)


def test_a_broken_yaml_is_one_line_in_evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.yaml").write_text("_target_: [")
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--config-dir", str(tmp_path), "policy_file=x.npz", "algo=vdn", "env=mine"])
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: while parsing")
