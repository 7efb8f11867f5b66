"""Sweeps inside one call: who trains, what records carry, and that each member trains as it would alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.running import TINY, last_checkpoint, main, shared_programs, timeless
from wqmix_jax import load_config, load_metrics
from wqmix_jax.errors import ConfigError
from wqmix_jax.table import table
from wqmix_jax.training.members import Member, labels_of, make_members, member_name

SOLO = (*TINY, "num_seeds=1", "total_env_steps=13", "checkpoint.every=1000")


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    with shared_programs():
        yield


def test_all_seeds_train_with_every_combination() -> None:
    config = load_config("+algo=ow_qmix", "sweep.alpha=[0.1,0.5]", "sweep.lr=[1e-3,1e-4]", "num_seeds=8")
    members = make_members(config.algo, config.seeds, config.sweep)
    assert len(members) == 32
    assert members[:2] == (Member(0, (("alpha", 0.1), ("lr", 1e-3))), Member(1, (("alpha", 0.1), ("lr", 1e-3))))
    assert members[8] == Member(0, (("alpha", 0.1), ("lr", 1e-4)))
    assert members[-1].labels == {"seed": 7, "algo.alpha": 0.5, "algo.lr": 1e-4}
    assert labels_of({"kind": "eval", **members[-1].labels, "episode_return": 1.0}) == members[-1].labels
    assert member_name(members[-1].labels) == "7-alpha0.5-lr0.0001"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("sweep.alpha=[0.1,2]", "algo.alpha=2 is not allowed: input should be less than or equal to 1"),
        ("sweep.alhpa=[0.1]", "algo.alhpa is unknown: did you mean algo.alpha?"),
        ("sweep.alpha=[0.1,0.1]", "sweep.alpha=.0.1, 0.1. is not allowed: different values are needed"),
        ("sweep.alpha=[]", "sweep.alpha=.. is not allowed"),
        ("sweep.alpha=0.1", "sweep.alpha=0.1 is not allowed: input should be a valid list"),
    ],
)
def test_values_are_checked_like_the_options(sweep: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("+algo=ow_qmix", sweep)


def test_what_would_need_another_program_is_refused() -> None:
    config = load_config("+algo=ow_qmix", "sweep.hidden_dim=[32,64]")
    with pytest.raises(
        ConfigError, match=r"sweep.hidden_dim is not allowed: in one call go gamma, lr, .* algo.hidden_dim=A,B"
    ):
        make_members(config.algo, [0], config.sweep)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            ("+algo=qmix_qstar", "sweep.alpha=[0.1,0.5]"),
            "sweep.alpha is not allowed: with algo.weighting=uniform it has",
        ),
        (("+algo=iql", "sweep.alpha=[0.1,0.5]"), "sweep.alpha is not allowed: with algo.weighting=uniform it has no"),
        (("+algo=vdn", "sweep.td_lambda=[0.1,0.5]"), "sweep.td_lambda is not allowed: with algo.returns=one_step it"),
    ],
)
def test_what_would_change_nothing_is_refused(chosen: tuple[str, ...], message: str) -> None:
    config = load_config(*chosen)
    with pytest.raises(ConfigError, match=message):
        make_members(config.algo, [0], config.sweep)
    other = load_config(*chosen, "algo.returns=td_lambda") if "td_lambda" in message else load_config("+algo=ow_qmix")
    assert len(make_members(other.algo, [0], config.sweep)) == 2


def test_a_member_that_fails_is_frozen_and_spoils_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of 1e38 a parameter overflows in the first learner steps."""
    sweep = tmp_path / "sweep"
    assert main(*SOLO, "num_seeds=2", "sweep.lr=[5e-4,1e38]", f"run_dir={sweep}") == 3
    err = capfd.readouterr().err
    assert err.endswith(f"error: 2 of 4 seeds failed, see {sweep / 'summary.json'}\n")
    assert "\n2 seeds | 13 of 13 steps" in err, "those that failed hold nothing up"
    summary = json.loads((sweep / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert [(failure["seed"], failure["algo.lr"]) for failure in summary["failed"]] == [(3, 1e38), (4, 1e38)]
    for failure in summary["failed"]:
        assert 1 <= failure["learner_steps"] <= 3
        assert failure["env_steps"] < 13
        cause = f"diverged (non-finite loss or parameters) at {failure['env_steps']} environment steps"
        warning = f"warning: seed {failure['seed']}-lr{1e38} {cause}"
        assert warning in err
    assert set(summary["final"]) == {"3-lr0.0005", "4-lr0.0005", "3-lr1e+38", "4-lr1e+38"}

    np.testing.assert_array_equal(last_checkpoint(sweep)["state.hp.lr"], np.float32([5e-4, 5e-4, 1e38, 1e38]))

    healthy = tmp_path / "healthy"
    assert main(*SOLO, "num_seeds=2", "sweep.lr=[5e-4,1e-3]", f"run_dir={healthy}") == 0
    one, other = ([line for line in timeless(load_metrics(run)) if line["algo.lr"] == 5e-4] for run in (sweep, healthy))
    assert one == other
    assert any("loss" in line for line in one)

    low, high = table([sweep])
    assert (low["algo.lr"], low["seeds"], low["failed"]) == ("0.0005", 2, 0)
    assert (high["algo.lr"], high["seeds"], high["failed"]) == ("1e+38", 2, 2)

    assert main(f"resume={sweep}") == 3, "a failed seed stays failed"
