"""SMAC, SMACv2 and SMAClite behind the bridge, by fakes with their signatures and quirks."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.envs.host.games import faked
from tests.envs.host.running import called, idle_where
from wqmix_jax import load_config
from wqmix_jax.config import ConfigError

SEEDS = np.array([11, 12])


@pytest.fixture
def game(tmp_path: Path) -> Iterator[Path]:
    with faked(tmp_path / "sc2") as folder:
        yield folder


def make(*overrides: str) -> Any:
    return load_config("+algo=iql", *overrides).env


def shoot(avail: np.ndarray) -> np.ndarray:
    """Everybody shoots at the first enemy that is left, else stops, else is dead."""
    return np.where(avail[..., 6:].any(-1), 6 + avail[..., 6:].argmax(-1), np.where(avail[..., 1], 1, 0))


def stop(avail: np.ndarray) -> np.ndarray:
    return np.where(avail[..., 1], 1, 0)


def battle(env: Any, choose: Any, seeds: np.ndarray = SEEDS) -> list[tuple[np.ndarray, ...]]:
    """What the calls of one episode of each row returned."""
    supervisor = env.host.supervisor
    calls = [called(supervisor, "reset", seeds)]
    ended = calls[0][-1].copy()
    for _ in range(env.spec.episode_limit):
        calls.append(called(supervisor, "step", idle_where(ended, choose(calls[-1][2]))))
        ended |= calls[-1][5] | calls[-1][6] | calls[-1][7]
        if ended.all():
            break
    return calls


def test_smac_is_played_to_its_end(game: Path) -> None:
    env = make("env=smac", "env.map=3m")
    assert env.spec == (3, 9, 5, 36, 6)
    with env.host.running([0]):
        won = battle(env, shoot)
        lost = battle(env, stop)
    *_, metrics, _, terminated, truncated, failed = won[-1]
    assert terminated.all()
    assert not truncated.any()
    assert not failed.any()
    np.testing.assert_array_equal(metrics[:, 0], 1)  # win_rate
    np.testing.assert_array_equal(metrics[:, 2], 3)  # dead_enemies
    # Nine points of damage and 200 for the battle, scaled to 20 for 230.
    total = sum(np.where(call[5] | (call is not won[-1]), call[4], 0) for call in won[1:])
    np.testing.assert_allclose(total, (9 + 200) / 11.5, rtol=1e-6)
    # With only 3 health points each, six shots leave allies dead: they may do nothing else than nothing.
    dead = lost[-1][0].sum(-1) == 0
    assert dead.any()
    np.testing.assert_array_equal(lost[-1][2][dead], [[True] + [False] * 8] * dead.sum())
    assert (lost[-1][3][:, 1] == dead.sum(1)).all()
    assert (lost[-1][3][:, 0] == 0).all()


@pytest.mark.parametrize(("continuing", "truncated"), [("false", False), ("true", True)])
def test_at_the_time_limit_smac_terminates_as_in_pymarl_unless_told_otherwise(
    game: Path, continuing: str, truncated: bool
) -> None:
    env = make("env=smac", "env.map=3m", f"env.continuing_episode={continuing}")
    with env.host.running([0]):
        *_, last = battle(env, stop)
    np.testing.assert_array_equal(last[6], truncated)
    np.testing.assert_array_equal(last[5], not truncated)


@pytest.mark.parametrize("during", ["step:2", "reset:2"])
def test_a_crash_that_smac_hides_is_a_failed_step_and_a_new_worker(
    during: str, game: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SC2_CRASH", f"{during}:{tmp_path}")
    env = make("env=smac", "env.map=3m")
    with env.host.running([4]):
        first, second = battle(env, shoot), battle(env, shoot)
        assert env.host.facts() == {"worker_restarts": 1}
    assert "RuntimeError: StarCraft II crashed, and SMAC restarted it" in capsys.readouterr().err
    failed = np.stack([call[-1] for call in first])
    assert failed.sum() == (1 if during == "step:2" else 0)
    assert second[-1][5].all()


def test_smacv2_draws_its_battles_from_the_seed(game: Path) -> None:
    env = make("env=smacv2", "env.num_units=5", "env.num_enemies=6")
    assert (env.spec.num_agents, env.spec.num_actions) == (5, 12)
    with env.host.running([0]):
        first = [called(env.host.supervisor, "reset", SEEDS)[0] for _ in range(2)]
        other = called(env.host.supervisor, "reset", SEEDS + 5)[0]
        assert battle(env, shoot)[-1][5].all()
    np.testing.assert_array_equal(*first)
    assert (first[0] != other).any()
    assert (first[0][0] != first[0][1]).any()


def test_smaclite_takes_plain_integers_and_gets_a_limit_and_counts(game: Path) -> None:
    env = make("env=smaclite", "env.map=3m", "env.episode_limit=7")
    assert env.spec == (3, 9, 5, 36, 7)
    with env.host.running([0]):
        won, again = battle(env, shoot), battle(env, shoot)
    np.testing.assert_array_equal(won[-1][3][:, [0, 2]], [[1, 3], [1, 3]])
    for one, other in zip(won, again, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


@pytest.mark.parametrize(
    ("env", "versions"),
    [
        ("env=smac", {"smac": "unknown", "StarCraft II": "build 75689"}),
        ("env=smac env.game_version=4.6.2", {"smac": "unknown", "StarCraft II": "4.6.2 (build 69232)"}),
        ("env=smaclite", {"smaclite": "unknown"}),
    ],
)
def test_versions_are_told(env: str, versions: dict[str, str], game: Path) -> None:
    assert make(*env.split()).host.versions() == versions


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["env=smac", "env.map=4z"], "SMAC can't be used: map=4z is not allowed: choose one of 3m, 3s5z"),
        (["env=smaclite", "env.map=4z"], "SMAClite can't be used: map=4z is not allowed: choose one of 3m, 3s5z"),
        (["env=smac", "env.game_version=1.0.0"], r"SMAC can't be used: StarCraft II is not found \(Unknown game"),
        (["env=smac", "env.difficulty=X"], "env.difficulty='X' is not allowed: input should be '1', '2'"),
        (["env=smac", "env.options={seed: 1}"], "env.options={seed: ..} is not allowed: it has a key of its own"),
        (["env=smac", "env.options={difficulty: 1}"], "env.options={difficulty: ..} is not allowed"),
        (["env=smac", "env.options={rewards: 1}"], r"TypeError: .*unexpected keyword argument 'rewards'"),
        (["env=smac", "env.worker_python=/no/python"], "env.worker_python=/no/python is not allowed: it is not an in"),
        (["env=smac", "env.step_timeout=0"], "env.step_timeout=0 is not allowed: input should be greater than 0"),
    ],
)
def test_what_is_not_allowed_is_one_line(overrides: list[str], told: str, game: Path) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        make(*overrides)
    assert "\n" not in str(refused.value)


def test_a_missing_game_or_map_is_one_line(game: Path) -> None:
    (game / "Maps" / "SMAC_Maps" / "3m.SC2Map").unlink()
    with pytest.raises(ConfigError, match=r"the file of map=3m is not found .*: copy SMAC_Maps into .*/sc2/Maps$"):
        make("env=smac", "env.map=3m", "env.options={debug: false}")
    shutil.rmtree(game)
    with pytest.raises(
        ConfigError, match=r"StarCraft II is not found at .*/sc2: install it and set SC2PATH to its fol"
    ):
        make("env=smac", "env.map=3m", "env.options={debug: true}")


def test_a_missing_package_or_a_namesake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"smac can't be imported by .*: pip install git\+https://github.com/oxwhirl/s"
    ):
        make("env=smac")
    with pytest.raises(
        ConfigError, match=r"smaclite can't be imported by .*: pip install git\+https://github.com/uoe-a"
    ):
        make("env=smaclite")
    with faked(tmp_path, package="namesake"), pytest.raises(ConfigError) as refused:
        make("env=smac")
    told = "is another package (PyPI's smac, a package for hyperparameters): pip uninstall smac, then pip install git+"
    assert told in str(refused.value)
