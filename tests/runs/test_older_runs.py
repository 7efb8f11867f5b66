"""Runs from before the modules were sorted into packages are still read, played, compared and continued.

``run_before_the_move`` was trained to 360 environment steps; of its checkpoints only one in the middle was kept, so
that a run which continues from it can be compared with the records of the uninterrupted run.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.running import main
from wqmix_jax import compare, evaluate, load_metrics, load_policy
from wqmix_jax.algos.qmix import QMIX
from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.config import run_config
from wqmix_jax.envs.jumanji import JumanjiEnvironment
from wqmix_jax.envs.predator_prey import PredatorPrey
from wqmix_jax.envs.smax import SMAX
from wqmix_jax.options import part_class
from wqmix_jax.records.metrics import load_header
from wqmix_jax.records.run_dir import read_config

COUNTERS = ("kind", "env_steps", "learner_steps", "episodes")

GOLDEN = Path(__file__).parents[1] / "golden"
RUN, CONFIGS = GOLDEN / "run_before_the_move", GOLDEN / "configs_before_the_move"

TARGETS = {
    ("algo", "cw_qmix"): "wqmix_jax.algos.wqmix.WQMIX",
    ("algo", "hysteretic_iql"): "wqmix_jax.algos.iql.IQL",
    ("algo", "iql"): "wqmix_jax.algos.iql.IQL",
    ("algo", "maddpg"): "wqmix_jax.algos.maddpg.MADDPG",
    ("algo", "masac"): "wqmix_jax.algos.masac.MASAC",
    ("algo", "ow_qmix"): "wqmix_jax.algos.wqmix.WQMIX",
    ("algo", "qatten"): "wqmix_jax.algos.qmix.QMIX",
    ("algo", "qmix"): "wqmix_jax.algos.qmix.QMIX",
    ("algo", "qmix_cw"): "wqmix_jax.algos.wqmix.WQMIX",
    ("algo", "qmix_ow"): "wqmix_jax.algos.wqmix.WQMIX",
    ("algo", "qmix_qstar"): "wqmix_jax.algos.wqmix.WQMIX",
    ("algo", "qplex"): "wqmix_jax.algos.qplex.QPLEX",
    ("algo", "qtran"): "wqmix_jax.algos.qtran.QTRAN",
    ("algo", "vdn"): "wqmix_jax.algos.qmix.QMIX",
    ("env", "jumanji"): "wqmix_jax.envs.jumanji.JumanjiEnvironment",
    ("env", "matrix_game"): "wqmix_jax.envs.matrix_game.MatrixGame",
    ("env", "predator_prey"): "wqmix_jax.envs.predator_prey.PredatorPrey",
    ("env", "smac"): "wqmix_jax.envs.host.starcraft.SMAC",
    ("env", "smaclite"): "wqmix_jax.envs.host.starcraft.SMAClite",
    ("env", "smacv2"): "wqmix_jax.envs.host.starcraft.SMACv2",
    ("env", "smax"): "wqmix_jax.envs.smax.SMAX",
}
"""The class of each built-in yaml before the move."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


@pytest.mark.parametrize(("part", "target"), TARGETS.items(), ids=map("-".join, TARGETS))
def test_a_class_is_found_where_it_was(part: tuple[str, str], target: str) -> None:
    group, name = part
    chosen = (f"+algo={name}",) if group == "algo" else ("+algo=iql", f"env={name}")
    assert part_class(group, target) is part_class(group, load_values(*chosen)[group]["_target_"])


@pytest.mark.parametrize(("name", "env"), [("jumanji", JumanjiEnvironment), ("smax", SMAX)])
def test_the_options_of_an_optional_environment_are_read(name: str, env: type) -> None:
    config = run_config(read_config(CONFIGS / name))
    assert (type(config.env), type(config.algo)) == (env, QMIX)


def test_options_and_records_are_read() -> None:
    config = run_config(read_config(RUN))
    assert (type(config.env), type(config.algo)) == (PredatorPrey, WQMIX)
    assert (config.algo.weighting, config.env.spec.num_agents) == ("optimistic", 2)
    assert load_header(RUN)["members"] == [{"seed": 0}, {"seed": 1}]
    assert {line["kind"] for line in load_metrics(RUN, seed=1)} == {"eval", "train"}


def test_policies_play(capsys: pytest.CaptureFixture[str]) -> None:
    steps = {line["env_steps"] for line in load_metrics(RUN, kind="eval", seed=1)}
    assert load_policy(RUN, member=1).env_steps in steps - {0}
    evaluate.main([f"run_dir={RUN}", "episodes=2"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("seed 1: return ") for line in lines)
    assert any(line.startswith("2 seeds: captures ") for line in lines)


def test_a_checkpoint_continues_with_the_same_numbers(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Up to the last evaluation, which the end of the older run brought forward."""
    assert main(f"resume={run}", "total_env_steps=480") == 0
    assert "resumed at " in capfd.readouterr().out
    for seed in (0, 1):
        before, now = load_metrics(RUN, seed=seed)[:-2], load_metrics(run, seed=seed)
        assert now[-1]["env_steps"] >= 480
        for old, new in zip(before, now, strict=False):
            assert [old[name] for name in COUNTERS] == [new[name] for name in COUNTERS]
            for name in ("loss", "grad_norm", "q_tot_mean", "td_target_mean"):
                np.testing.assert_allclose(new.get(name, 0), old.get(name, 0), rtol=2e-3, atol=1e-4)
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_it_is_compared_with_another_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.0005", "lr: 0.001"))
    compare.main([str(RUN), str(run), "--out", str(tmp_path / "picture.png")])
    assert ["algo.lr", "0.0005", "0.001"] in [line.split() for line in capsys.readouterr().out.splitlines()]
