"""SMAC, SMACv2 and SMAClite behind the bridge, as fakes with their signatures and quirks."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.envs.host.games import faked
from tests.envs.host.running import called, idle_where
from wqmix_jax import load_config
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.config import run_config
from wqmix_jax.envs.host import adapters
from wqmix_jax.errors import ConfigError

SEEDS = np.array([11, 12])


@pytest.fixture
def game(tmp_path: Path) -> Iterator[Path]:
    with faked(tmp_path / "sc2") as folder:
        yield folder


def make(*overrides: str) -> Any:
    return load_config("+algo=iql", *overrides).env


def shoot(avail: np.ndarray) -> np.ndarray:
    """Returns each agent's action: shoot at the first living enemy, otherwise stop, or do nothing when dead."""
    return np.where(avail[..., 6:].any(-1), 6 + avail[..., 6:].argmax(-1), np.where(avail[..., 1], 1, 0))


def stop(avail: np.ndarray) -> np.ndarray:
    return np.where(avail[..., 1], 1, 0)


def battle(env: Any, choose: Any, seeds: np.ndarray = SEEDS) -> list[tuple[np.ndarray, ...]]:
    """Plays one episode in each row and returns the results of its calls."""
    supervisor = env.external.supervisor
    calls = [called(supervisor, "reset", seeds)]
    ended = calls[0][-1].copy()
    for _ in range(env.spec.episode_limit):
        calls.append(called(supervisor, "step", idle_where(ended, choose(calls[-1][2]))))
        ended |= calls[-1][5] | calls[-1][6] | calls[-1][7]
        if ended.all():
            break
    return calls


def ended_once(calls: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """Returns the same calls with the rewards of ended rows replaced by zeros."""
    ended, found = calls[0][-1].copy(), []
    for call in calls[1:]:
        found.append((*call[:4], np.where(ended, 0, call[4]), *call[5:]))
        ended |= call[5] | call[6] | call[7]
    return found


def test_smac_is_played_to_its_end(game: Path) -> None:
    env = make("env=smac", "env.map=3m")
    assert env.spec == (3, 9, 5, 36, 6)
    with env.external.running([0]):
        won = battle(env, shoot)
        lost = battle(env, stop)
    *_, metrics, _, terminated, truncated, failed = won[-1]
    assert terminated.all()
    assert not truncated.any()
    assert not failed.any()
    np.testing.assert_array_equal(metrics[:, 0], 1)  # win_rate
    np.testing.assert_array_equal(metrics[:, 2], 3)  # dead_enemies
    # All there is to be won: nine points of damage, thirty for the dead and 200 for the battle.
    total = np.sum([call[4] for call in ended_once(won)], axis=0)
    np.testing.assert_allclose(total, 20, rtol=1e-6)
    # With only 3 health points each, six shots leave allies dead: no-op is all they may do.
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
    with env.external.running([0]):
        *_, last = battle(env, stop)
    np.testing.assert_array_equal(last[6], truncated)
    np.testing.assert_array_equal(last[5], not truncated)


@pytest.mark.parametrize("during", ["step:2", "reset:2"])
def test_a_crash_that_smac_hides_is_a_failed_step_and_a_new_worker(
    during: str, game: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_SC2_CRASH", f"{during}:{tmp_path}")
    env = make("env=smac", "env.map=3m")
    with env.external.running([4]):
        first, second = battle(env, shoot), battle(env, shoot)
        assert env.external.facts() == {"worker_restarts": 1}
    assert "RuntimeError: StarCraft II crashed, and SMAC restarted it" in capsys.readouterr().err
    failed = np.stack([call[-1] for call in first])
    assert failed.sum() == (1 if during == "step:2" else 0)
    assert second[-1][5].all()


def test_smacv2_draws_its_battles_from_the_seed(game: Path) -> None:
    env = make("env=smacv2", "env.num_units=5", "env.num_enemies=6")
    assert (env.spec.num_agents, env.spec.num_actions) == (5, 12)
    with env.external.running([0]):
        first = [called(env.external.supervisor, "reset", SEEDS)[0] for _ in range(2)]
        other = called(env.external.supervisor, "reset", SEEDS + 5)[0]
        assert battle(env, shoot)[-1][5].all()
    np.testing.assert_array_equal(*first)
    assert (first[0] != other).any()
    assert (first[0][0] != first[0][1]).any()


def test_smaclite_takes_plain_integers_and_gets_a_limit_and_counts(game: Path) -> None:
    env = make("env=smaclite", "env.map=3m", "env.episode_limit=7")
    assert env.spec == (3, 9, 5, 36, 7)
    with env.external.running([0]):
        won, again = battle(env, shoot), battle(env, shoot)
    np.testing.assert_array_equal(won[-1][3][:, [0, 2]], [[1, 3], [1, 3]])
    for one, other in zip(won, again, strict=True):
        for found, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(found, right)


def test_a_battle_of_smaclite_that_nobody_survives_is_won_as_smaclite_counts_it(game: Path) -> None:
    env = make("env=smaclite", "env.map=1m")
    with env.external.running([0]):
        won, lost = battle(env, shoot), battle(env, stop)
    np.testing.assert_array_equal(won[-1][3], [[1, 1, 1], [1, 1, 1]])  # win_rate, dead_allies, dead_enemies
    np.testing.assert_allclose(won[-1][4], (1 + 10 + 200) / (213 / 20), rtol=1e-6)
    np.testing.assert_array_equal(lost[-1][3], [[0, 1, 0], [0, 1, 0]])


def with_health(test_mode: bool) -> str:
    """Returns options for SMACv2 whose units' health comes from a list of three."""
    team = "{dist_type: weighted_teams, unit_types: [marine, marauder], weights: [0.5, 0.5]}"
    health = f"{{dist_type: fixed, items: [[0, 1, 2], [3, 4, 5], [6, 7, 8]], test_mode: {test_mode}}}"
    parts = f"team_gen: {team}, start_positions: {{dist_type: surrounded_and_reflect, p: 0.5}}, health: {health}"
    return f"env.options={{capability_config: {{n_units: 3, n_enemies: 3, {parts}}}}}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["env=smaclite", "env.map=3m"],
        ["env=smacv2"],
        ["env=smacv2", with_health(False)],
        ["env=smacv2", with_health(True)],
    ],
    ids=["smaclite", "smacv2", "smacv2 from a list", "smacv2 along a list"],
)
def test_a_battle_is_the_same_whatever_was_played_before(overrides: list[str], game: Path) -> None:
    """A resumed run depends on it, because its workers are new."""
    env, played = make(*overrides), []
    for before in ([], [30, 40], [50]):
        with env.external.running([0]):
            for offset in before:
                battle(env, shoot, SEEDS + offset)
            played.append(battle(env, shoot))
    for other in played[1:]:
        if overrides[0] == "env=smaclite":
            assert len(other) == len(played[0])
            for one, found in zip(played[0], other, strict=True):
                for right, array in zip(one, found, strict=True):
                    np.testing.assert_array_equal(array, right)
            continue
        # The enemies' targets are drawn by StarCraft II itself: only the calls before the first shot are compared.
        for right, array in zip(played[0][0], other[0], strict=True):
            np.testing.assert_array_equal(array, right)
        np.testing.assert_array_equal(other[1][4], played[0][1][4])


def test_a_list_of_smacv2_is_entered_at_a_place_drawn_from_the_seed() -> None:
    """Otherwise each battle would have its first entry."""
    walks = SimpleNamespace(teams=[[1], [2], [3]], index=0)
    entered = []
    for seed in (*range(20), *range(20)):
        adapters.reseed({"health": walks}, np.random.SeedSequence(seed))
        entered.append(walks.index)
    assert set(entered) == {0, 1, 2}
    assert entered[:20] == entered[20:]


def test_rewards_of_smacv2_are_scaled_by_their_own_battle(game: Path) -> None:
    """Otherwise the best return of a battle would depend on the first battle of a worker."""
    env = make("env=smacv2", "env.num_units=3", "env.num_enemies=2")
    with env.external.running([0]):
        for offset in range(3):
            calls = battle(env, shoot, SEEDS + offset)
            won = calls[-1][3][:, 0] == 1
            total = np.sum([call[4] for call in ended_once(calls)], axis=0)
            assert won.any()
            np.testing.assert_allclose(total[won], 20, rtol=1e-6)


def test_rewards_of_smac_do_not_depend_on_how_quickly_units_are_created(game: Path) -> None:
    env = make("env=smac", "env.map=8m")
    with env.external.running([0]):
        calls = battle(env, shoot)
    assert (calls[-1][3][:, 0] == 1).all()
    np.testing.assert_allclose(np.sum([call[4] for call in ended_once(calls)], axis=0), 20, rtol=1e-6)


def test_a_first_battle_left_before_its_end_launches_no_second_game(
    game: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client counts battles when they end, and launches a game if it has counted none."""
    monkeypatch.setenv("FAKE_SC2_LAUNCHES", "1")
    for env in (make("env=smac", "env.map=3m"), make("env=smacv2")):
        with env.external.running([0]):
            for _ in range(3):
                assert not called(env.external.supervisor, "reset", SEEDS)[-1].any()
            assert env.external.facts() == {"worker_restarts": 0}


@pytest.mark.parametrize(
    ("env", "versions"),
    [
        ("env=smac", {"smac": "unknown", "StarCraft II": "build 75689"}),
        (
            "env=smac env.game_version=4.6.2 env.difficulty=5",
            {"smac": "unknown", "StarCraft II": "4.6.2 (build 69232)"},
        ),
        ("env=smaclite", {"smaclite": "unknown"}),
    ],
)
def test_versions_are_told(env: str, versions: dict[str, str], game: Path) -> None:
    assert make(*env.split()).external.versions() == versions


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env=smac", "env.map=4z"], "^env.map=4z is not allowed: choose one of 3m, 3s5z, 8m"),
        (["env=smaclite", "env.map=4z"], "^env.map=4z is not allowed: choose one of 1m, 3m, 3s5z"),
        (["env=smac", "env.game_version=1.0.0"], r"SMAC can't be used: StarCraft II is not found \(Unknown game"),
        (["env=smac", "env.difficulty=X"], "env.difficulty='X' is not allowed: input should be '1', '2'"),
        (["env=smac", "env.options={seed: 1}"], "^env.options={seed: ..} is not allowed: it has its own key"),
        (["env=smac", "env.options={difficulty: 1}"], "^env.options={difficulty: ..} is not allowed"),
        (
            ["env=smac", "env.options={reward_sparce: true}"],
            r"^env.options={reward_sparce: ..} is not allowed: StarCraft2Env has no such option; did you mean rewa",
        ),
        (
            ["env=smacv2", "env.options={conic_fof: true}"],
            r"^env.options={conic_fof: ..} is not allowed: StarCraft2Env has no such option; did you mean conic_fov\?$",
        ),
        (
            ["env=smaclite", "env.options={use_rvo2: true}"],
            r"^env.options={use_rvo2: ..} is not allowed: SMACliteEnv has no such option; did you mean use_cpp_rvo2\?$",
        ),
        (
            ["env=smaclite", "env.options={map_file: x}"],
            r"^env.options={map_file: ..} is not allowed: .*; choose from use_cpp",
        ),
        (
            ["env=smaclite", "env.options={max_episode_steps: 9}"],
            r"^env.options={max_episode_steps: ..} is not allowed: env.episode_limit is the time limit$",
        ),
        (["env=smac", "env.options={heuristic_ai: true}"], "it replaces the agents' actions"),
        (["env=smacv2", "env.options={heuristic_ai: true}"], "it replaces the agents' actions"),
        (["env=smac", "env._role=x"], r"env._role is unknown: known keys are worker_python, "),
        (["env=smac", "env.worker_python=/no/python"], "env.worker_python=/no/python is not allowed: it is not an in"),
        (["env=smac", "env.step_timeout=0"], "env.step_timeout=0 is not allowed: input should be greater than 0"),
    ],
)
def test_what_is_not_allowed_is_one_line(overrides: list[str], message: str, game: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make(*overrides)
    assert "\n" not in str(refused.value)


def test_a_version_that_a_yaml_reads_as_a_number_is_refused(game: Path) -> None:
    """On the command line a version is text."""
    assert make("env=smac", "env.game_version=4.10").external.versions()["StarCraft II"].startswith("4.10.")
    values = load_values("+algo=qmix", "env=smac")
    values["env"]["game_version"] = 4.1
    with pytest.raises(ConfigError, match=r"^env.game_version=4.1 is not allowed: .* three parts, as in 4.10.0$"):
        run_config(values)


@pytest.mark.parametrize(
    ("version", "build"),
    [("", "Base75689"), ("env.game_version=4.6.2", "Base69232"), ("env.game_version=4.10.0", "Base75689")],
)
def test_a_missing_program_of_the_game_is_one_line(version: str, build: str, game: Path) -> None:
    """The program of the version that would be played is checked; the folders of all versions are there."""
    program = game / "Versions" / build / "SC2_x64"
    overrides = ["env=smac", "env.map=3m", *filter(None, [version])]
    program.chmod(0o644)
    message = rf"StarCraft II can't be started: {program} is not executable: chmod \+x {program}$"
    with pytest.raises(ConfigError, match=message):
        make(*overrides, "env.options={debug: false}")
    program.unlink()
    message = f"StarCraft II is not complete: there is no {program}: install it and set SC2PATH to its folder$"
    with pytest.raises(ConfigError, match=message):
        make(*overrides, "env.options={debug: true}")


@pytest.mark.parametrize(("env", "name"), [("smac", "3m"), ("smacv2", "10gen_terran")])
def test_a_missing_game_or_map_is_one_line(env: str, name: str, game: Path) -> None:
    (game / "Maps" / "SMAC_Maps" / f"{name}.SC2Map").unlink()
    message = (
        f"the file of map={name} is not found .*: put the .SC2Map files of https://github.com/oxwhirl/{env}/releases/"
    )
    with pytest.raises(ConfigError, match=rf"{message}.*/SMAC_Maps.zip into {game}/Maps/SMAC_Maps$"):
        make(f"env={env}", f"env.map={name}", "env.options={reward_win: 201}")
    shutil.rmtree(game)
    with pytest.raises(
        ConfigError, match=r"StarCraft II is not found \(.*\): install it and set SC2PATH to its folder$"
    ):
        make(f"env={env}", f"env.map={name}", "env.options={reward_win: 202}")


def test_a_missing_package_or_a_namesake_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"smac can't be imported by .*: pip install git\+https://github.com/oxwhirl/s"
    ):
        make("env=smac")
    with pytest.raises(
        ConfigError, match=r"smaclite can't be imported by .*: pip install -U git\+https://github.com/uoe-a"
    ):
        make("env=smaclite")
    with faked(tmp_path, package="namesake"):
        with pytest.raises(ConfigError) as refused:
            make("env=smac")
        advice = "is another package (PyPI's smac, a package for hyperparameters): pip uninstall smac, then pip install"
        assert advice in str(refused.value)
        with pytest.raises(ConfigError, match=r"smaclite in .* is of the time before gymnasium: pip install -U git\+"):
            make("env=smaclite")


def test_smaclite_without_the_library_of_rtree_says_how_to_get_it(tmp_path: Path) -> None:
    """The rtree that SMAClite requires has no wheel for Python 3.11 and newer."""
    with faked(tmp_path / "sc2", package="without_rtree"), pytest.raises(ConfigError) as refused:
        make("env=smaclite")
    assert re.search(r"\(Could not load libspatialindex_c library\): pip install -U 'rtree>=1.0.1'", str(refused.value))
    assert "\n" not in str(refused.value)
