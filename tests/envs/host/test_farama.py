"""Tasks of PettingZoo and Gymnasium: hand-computed arrays of two fakes, and the packages compared with themselves."""

import importlib
import itertools
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml

from tests.environments import TINY
from tests.envs.host.running import called, idle_where
from tests.running import main, timeless
from wqmix_jax import load_config, load_metrics
from wqmix_jax.envs.host.farama_adapters import Gymnasium, PettingZoo, SetupError
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.metrics import load_header

FAKES = Path(__file__).parent / "farama"

DEFAULTS = {"reward": "sum", "state": "auto", "episode_limit": None, "continuing_episode": True, "folder": None}
"""The options of the adapters that are not the task's."""


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process and workers import the fakes."""
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]))


def pettingzoo_task(name: str, options: dict[str, Any], **changes: Any) -> PettingZoo:
    return PettingZoo(0, name, options, **{**DEFAULTS, **changes})


def gymnasium_task(name: str, module: str, options: dict[str, Any], **changes: Any) -> Gymnasium:
    return Gymnasium(0, name, module, options, **{**DEFAULTS, **changes})


def pasture(**values: Any) -> PettingZoo:
    """Returns the fake; ``values`` are options of the adapter, or else of the task."""
    options = {name: value for name, value in values.items() if name not in DEFAULTS}
    return pettingzoo_task("pasture", options, **{name: values[name] for name in values.keys() - options.keys()})


def orchard(name: str = "Orchard-v0", **values: Any) -> Gymnasium:
    """Returns the fake; see `pasture`."""
    options = {name: value for name, value in values.items() if name not in DEFAULTS}
    changes = {name: values[name] for name in values.keys() - options.keys()}
    return gymnasium_task(name, "orchard", options, **changes)


def first_available(avail: Any) -> list[int]:
    return avail.argmax(-1).tolist()


def played(task: Any, seed: int = 3) -> list[tuple[Any, ...]]:
    """Plays one episode with each agent's first available action.

    Returns:
        For each state its obs, state, availability, and the reward and ends of the step to it.
    """
    task.reset(seed)
    seen = [(*task.observe(), 0.0, False, False)]
    while not any(seen[-1][4:]):
        outcome = task.step(first_available(seen[-1][2]))
        seen.append((*task.observe(), *outcome))
        assert len(seen) < 100
    return seen


def place_of(seed: int) -> int:
    return int(np.random.default_rng(seed).integers(90))


# PettingZoo, the fake.


def test_spaces_are_flattened_and_padded() -> None:
    task = pasture()
    assert task.info() == {"num_agents": 3, "num_actions": 4, "obs_dim": 7, "state_dim": 2, "episode_limit": 4}
    task.reset(3)
    obs, state, _ = task.observe()
    place = place_of(3)
    # Box, then Discrete one-hot; MultiBinary; MultiDiscrete one-hot. Zeros fill the rows.
    expected = [[place, 0, -1, 7, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(obs, expected)
    np.testing.assert_array_equal(state, [place, 0])


@pytest.mark.parametrize("masks", ["infos", "observations"])
def test_masks_are_kept_and_padding_is_never_available(masks: str) -> None:
    first, second, *_ = played(pasture(masks=masks))
    np.testing.assert_array_equal(first[2], [[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(second[2], [[1, 0, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]])


def test_without_masks_all_actions_of_an_agents_own_space_are_available() -> None:
    np.testing.assert_array_equal(played(pasture(masks=None))[0][2], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def test_agents_that_left_get_zeros_and_action_0_and_the_others_play_on() -> None:
    task = pasture()
    seen = played(task)
    assert len(seen) == 5
    for obs, _, avail, *_ in seen[2:]:
        np.testing.assert_array_equal(obs[1], 0)
        np.testing.assert_array_equal(avail[1], [1, 0, 0, 0])
        assert obs[0].any()
        assert obs[2].any()
    sent = [set(actions) for actions in task.env.received]
    assert sent == [{"shepherd", "sheep_0", "sheep_1"}] * 2 + [{"shepherd", "sheep_1"}] * 2
    # An action of a space that starts at 5: the first available one was its second, then its first.
    assert [actions.get("sheep_0") for actions in task.env.received] == [6, 5, None, None]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [("sum", [111, 111, 101, 101]), ("mean", [37, 37, 101 / 3, 101 / 3]), ("first", [1, 1, 1, 1])],
)
def test_rewards_of_the_agents_that_are_there_make_the_teams(reward: str, expected: list[float]) -> None:
    np.testing.assert_allclose([step[3] for step in played(pasture(reward=reward))[1:]], expected)


def test_the_first_reward_is_that_of_the_first_agent_that_is_left() -> None:
    task = pasture(reward="first")
    assert task.team_reward([10.0, 100.0]) == 10
    assert task.team_reward([]) == 0


@pytest.mark.parametrize("keeps_agents", [False, True])
def test_an_episode_at_its_limit_is_truncated_and_its_last_observation_counts(keeps_agents: bool) -> None:
    """Targets bootstrap from the last state, where every agent has gone in PettingZoo's sense."""
    *_, (obs, state, avail, _, terminated, truncated) = played(pasture(leaves=0, keeps_agents=keeps_agents))
    assert (terminated, truncated) == (False, True)
    place = place_of(3)
    np.testing.assert_array_equal(obs, [[place, 4, -1, 7, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(state, [place, 4])
    np.testing.assert_array_equal(avail, [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize("keeps_agents", [False, True])
def test_an_episode_whose_agents_all_terminate_is_terminated(keeps_agents: bool) -> None:
    seen = played(pasture(leaves=0, terminates=3, keeps_agents=keeps_agents))
    assert [step[4:] for step in seen] == [(False, False)] * 3 + [(True, False)]


def test_an_agent_that_leaves_in_the_last_step_does_not_hide_the_truncation() -> None:
    *_, (obs, _, _, _, terminated, truncated) = played(pasture(leaves=4))
    assert (terminated, truncated) == (False, True)
    assert obs.any(axis=1).tolist() == [True, False, True]


def test_the_limit_terminates_where_episodes_do_not_continue() -> None:
    assert played(pasture(leaves=0, continuing_episode=False))[-1][4:] == (True, False)
    assert played(pasture(leaves=0, episode_limit=2, continuing_episode=False))[-1][4:] == (True, False)
    assert played(orchard(continuing_episode=False))[-1][4:] == (True, False)
    assert played(orchard(picked=2, continuing_episode=False))[-1][4:] == (True, False)


def test_a_shorter_limit_truncates() -> None:
    seen = played(pasture(leaves=0, episode_limit=3))
    assert [step[4:] for step in seen] == [(False, False)] * 3 + [(False, True)]
    assert seen[-1][0].any(axis=1).all()


def test_a_mask_without_an_observation_is_an_observation() -> None:
    obs, _, avail, *_ = played(pasture(masks="part"))[0]
    np.testing.assert_array_equal(obs, [[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(avail, [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def test_an_image_is_the_state_only_if_it_is_chosen() -> None:
    assert pasture(image=True).info()["state_dim"] == 21
    assert pasture(image=True, state="env").info()["state_dim"] == 2


@pytest.mark.parametrize(("state", "has_state"), [("auto", False), ("observations", True)])
def test_the_state_may_be_the_observations(state: str, has_state: bool) -> None:
    task = pasture(state=state, has_state=has_state)
    assert task.info()["state_dim"] == 21
    obs, joined, _ = task.observe()
    np.testing.assert_array_equal(joined, obs.ravel())


def test_the_same_seed_gives_the_same_episode_and_another_seed_another() -> None:
    task = pasture()
    first, second, other = played(task, 5), played(task, 5), played(task, 6)
    for one, two in zip(first, second, strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
    assert (first[0][0] != other[0][0]).any()


def test_the_global_generators_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some environments draw from them."""
    task, drawn = pasture(), []

    def draw(*_: Any) -> dict[str, Any]:
        drawn.append((np.random.rand(), random.random()))  # noqa: NPY002
        return {}

    monkeypatch.setattr(type(task.env), "infos", draw)
    for seed in (4, 4, 5):
        task.reset(seed)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]


def test_a_mask_or_an_observation_of_a_wrong_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task = pasture()
    with monkeypatch.context() as patch:
        patch.setattr(type(task.env), "mask", lambda *_: [1, 1])
        with pytest.raises(ValueError, match=r"^action_mask of shepherd has shape \(2,\), but \(4,\) is needed$"):
            task.reset(0)
    monkeypatch.setattr(type(task.env), "seen", lambda *_: {"shepherd": ([1, 2, 3], 1)})
    with pytest.raises(ValueError, match=r"^the observation of shepherd has 6 numbers, but 7 numbers are needed$"):
        task.reset(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spaces": {"sheep_1": "continuous"}},
            r"^pasture has the action space Box\(.*\) for sheep_1, but a Discrete is needed$",
        ),
        (
            {"spaces": {"sheep_0": "sequence"}},
            r"^pasture has the observation space Sequence\(.*\), whose size varies$",
        ),
        (
            {"max_cycles": None},
            r"^episode_limit is missing: pasture states no time limit; set env.episode_limit=STEPS$",
        ),
        ({"episode_limit": 5}, r"^episode_limit=5 is not allowed: pasture ends its episodes after 4 steps; choose at"),
        ({"sheeps": 3}, r"^pasture can't be made with env.options={'sheeps': 3}: TypeError: .* 'sheeps'$"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        pasture(**changes)


def test_a_limit_that_the_task_does_not_state_is_that_of_the_option() -> None:
    seen = played(pasture(leaves=0, max_cycles=None, episode_limit=6))
    assert [step[4:] for step in seen[1:]] == [(False, False)] * 5 + [(False, True)]


def test_a_state_that_is_not_there_is_refused() -> None:
    with pytest.raises(SetupError, match=r"^state=env is not allowed: pasture has no state\(\); choose auto or obs"):
        pasture(state="env", has_state=False).info()


# Gymnasium, the fake.


def test_a_task_gymnasium_task_has_one_row_per_agent() -> None:
    task = orchard()
    assert task.info() == {"num_agents": 2, "num_actions": 3, "obs_dim": 2, "state_dim": 4, "episode_limit": 4}
    first, second, *_ = played(task)
    place = first[0][0, 0]
    np.testing.assert_array_equal(first[0], [[place, 0], [0, 0]])
    np.testing.assert_array_equal(second[0], [[place, 1], [1, 0]])
    np.testing.assert_array_equal(second[1], [place, 1, 1, 0])
    np.testing.assert_array_equal(first[2], [[1, 1, 0], [1, 1, 1]])
    assert [step[3] for step in played(task)[1:]] == [11] * 4


def test_masks_and_states_gymnasium_task_are_used() -> None:
    task = orchard(masks=True, has_state=True)
    assert task.info()["state_dim"] == 2
    first, *_ = played(task)
    np.testing.assert_array_equal(first[1], [first[0][0, 0], 0])
    np.testing.assert_array_equal(first[2], [[1, 0, 0], [0, 1, 1]])


@pytest.mark.parametrize(("reward", "expected"), [("mean", 5.5), ("first", 1)])
def test_rewards_gymnasium_task_make_the_teams(reward: str, expected: float) -> None:
    assert played(orchard(reward=reward))[1][3] == expected


@pytest.mark.parametrize(
    ("task", "steps", "ends"),
    [
        ({"picked": 3}, 3, (True, False)),
        ({}, 4, (False, True)),  # the task itself reports a termination
        ({"picked": 4}, 4, (False, True)),  # which the limit then hides
        ({"episode_limit": 2}, 2, (False, True)),
        ({"max_steps": 7}, 7, (False, True)),
        ({"name": "OrchardLimited-v0"}, 3, (False, True)),
        ({"name": "OrchardLimited-v0", "picked": 3}, 3, (True, False)),
        ({"name": "OrchardLimited-v0", "episode_limit": 5}, 5, (False, True)),
    ],
)
def test_limits_gymnasium_task_truncate(task: dict[str, Any], steps: int, ends: tuple[bool, bool]) -> None:
    seen = played(orchard(**task))
    assert (len(seen) - 1, seen[-1][4:]) == (steps, ends)


def test_episodes_gymnasium_task_are_seeded() -> None:
    first, second, other = (played(orchard(), seed)[0][0] for seed in (8, 8, 9))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_too_few_rewards_are_an_error() -> None:
    task = orchard(missing=True)
    task.reset(0)
    with pytest.raises(ValueError, match=r"^rewards has 1 entries, but 2 agents play$"):
        task.step([0, 0])


def test_a_single_reward_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^rewards is one value, but one per agent is needed$"):
        orchard().one_each("rewards", np.float64(1))


# Through the workers.


def make(*overrides: str) -> Any:
    return load_config("+algo=iql", *overrides).env


def test_workers_play_the_task_in_the_batch() -> None:
    env = make("env=pettingzoo", "env.name=pasture", "env.options={leaves: 2}")
    assert tuple(env.spec) == (3, 4, 7, 2, 4)
    with env.external.running([0]):
        supervisor = env.external.supervisor
        rows = [called(supervisor, "reset", np.array([3, 9]))]
        ended = np.zeros(2, bool)
        while not ended.all():
            rows.append(called(supervisor, "step", idle_where(ended, rows[-1][2].argmax(-1))))
            ended |= rows[-1][5] | rows[-1][6]
        assert env.external.facts() == {"worker_restarts": 0}
    for row, seed in enumerate((3, 9)):
        for alone, together in zip(played(pasture(), seed), rows, strict=True):
            obs, state, avail, _, reward, terminated, truncated, failed = (field[row] for field in together)
            for found, expected in zip((obs, state, avail, reward, terminated, truncated), alone, strict=True):
                np.testing.assert_array_equal(found, expected)
            assert not failed


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pasture", "orchard"):
        (tmp_path / f"my_{name}.py").write_text((FAKES / f"{name}.py").read_text().replace("Orchard-", "MyOrchard-"))
    for name in ("simulator", "mpe2"):  # a file of the adapters' folder and an installed package have these names
        shutil.copy(FAKES / "pasture.py", tmp_path / f"{name}.py")
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    for name in ("my_pasture", "simulator", "mpe2"):
        assert tuple(make("env=pettingzoo", f"env.name={name}").spec) == (3, 4, 7, 2, 4)
    assert make("env=gymnasium", "env.name=MyOrchard-v0", "env.module=my_orchard").spec.num_agents == 2
    monkeypatch.chdir("/")
    with pytest.raises(
        ConfigError, match=r"^env.name=my_pasture is not allowed: it can't be imported by .*, or start in"
    ):
        make("env=pettingzoo", "env.name=my_pasture", "env.reward=mean")


def test_a_module_on_the_path_is_not_hidden_by_a_file_next_to_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(FAKES / "pasture.py", tmp_path / "pool.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert make("env=pettingzoo", "env.name=pool").spec.num_agents == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env=pettingzoo", "env.name=os;x"], "^env.name='os;x' is not allowed: write the name of a module, mpe2.sim"),
        (
            ["env=pettingzoo", "env.name=mpe2.simple_spred_v3"],
            r"^env.name=mpe2.simple_spred_v3 is not allowed: mpe2 has no .*; did you mean mpe2.simple_spread_",
        ),
        (
            ["env=pettingzoo", "env.name=json"],
            "^env.name=json is not allowed: this module has no function parallel_env; game",
        ),
        (
            ["env=pettingzoo", "env.name=nowhere"],
            r"^env.name=nowhere is not allowed: it can't be imported by .* \(No module named 'nowhere'\): install the",
        ),
        (
            ["env=gymnasium", "env.name=My-v0", "env.module=nowhere"],
            r"^env.module=nowhere is not allowed: it can't be imported by .* \(No module named 'nowhere'\): install",
        ),
        (
            ["env=pettingzoo", "env.options={continuous_actions: true}"],
            r"action space Box\(.*, but a Discrete is needed$",
        ),
        (["env=pettingzoo", "env.options={n: 2}"], "can't be made with env.options={'n': 2}: TypeError: .*'n'$"),
        (
            ["env=pettingzoo", "env.reward=max"],
            "^env.reward='max' is not allowed: input should be 'sum', 'mean' or 'fi",
        ),
        (["env=pettingzoo", "env.state=obs"], "^env.state='obs' is not allowed: input should be 'auto', 'env' or 'obs"),
        (["env=pettingzoo", "env.episode_limit=0"], "^env.episode_limit=0 is not allowed: input should be greater"),
        (
            ["env=pettingzoo", "env.episode_limit=26"],
            "^env.episode_limit=26 is not allowed: .* ends its episodes after 2",
        ),
        (["env=gymnasium", "env.name=a:B-v0"], "^env.name='a:B-v0' is not allowed: write the part before the colon as"),
        (["env=gymnasium", "env.module=a b"], "^env.module='a b' is not allowed: write the name of a module, lbforag"),
        (["env=gymnasium", "env.name=Foraging-8x8-2p-3f-v9"], "^env.name=Foraging-8x8-2p-3f-v9 is not allowed: .*`v3`"),
        (["env=gymnasium", "env.name=Orchard-v0"], "doesn't exist.*; env.module=MODULE imports the module that regist"),
        (
            ["env=gymnasium", "env.options={steps: 9}"],
            "can't be made with env.options={'steps': 9}: TypeError: .*'steps'",
        ),
        (["env=gymnasium", "env.name=CartPole-v1"], "spaces are Box.*, but a task for several agents needs"),
        (
            ["env=pettingzoo", "env.name=pasture", "env.options={max_cycles: null}"],
            "^env.episode_limit is missing: pasture states no time limit; set",
        ),
        (
            ["env=gymnasium", "env.state=env"],
            r"^env.state=env is not allowed: Foraging.* has no state\(\); choose auto or o",
        ),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        make(*overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("package", "overrides", "advice"),
    [
        ("pettingzoo", ["env=pettingzoo"], "pip install pettingzoo, or install the extra pettingzoo of wqmix_jax"),
        ("mpe2", ["env=pettingzoo"], "pip install mpe2, or install the extra pettingzoo of wqmix_jax"),
        (
            "pymunk",
            ["env=pettingzoo", "env.name=pettingzoo.butterfly.pistonball_v6"],
            r"pip install 'pettingzoo\[butterfly\]'",
        ),
        ("gymnasium", ["env=gymnasium"], "pip install gymnasium, or install the extra gymnasium of wqmix_jax"),
        ("lbforaging", ["env=gymnasium"], "pip install lbforaging, or install the extra gymnasium of wqmix_jax"),
        (
            "rware",
            ["env=gymnasium", "env.name=rware-tiny-2ag-v2"],
            "pip install rware, or install the extra gymnasium of wqmix_jax",
        ),
    ],
)
def test_a_missing_package_is_one_line_with_the_exit_code_of_bad_options(
    package: str,
    overrides: list[str],
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    missing = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    (tmp_path / f"{package}.py").write_text(missing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main("+algo=vdn", *overrides, f"run_dir={tmp_path / 'run'}") == 2
    [line] = capfd.readouterr().err.splitlines()
    assert re.search(rf"^error: .* can't be imported by .* \(No module named '{package}'\): {advice}$", line)
    assert not (tmp_path / "run").exists()


# The packages themselves.


def drawn(rng: np.random.Generator, counts: Any) -> list[int]:
    return [int(rng.integers(count)) for count in counts]


def test_simple_spread_is_played_as_by_itself() -> None:
    task = pettingzoo_task("mpe2.simple_spread_v3", {"N": 2, "max_cycles": 8})
    itself = importlib.import_module("mpe2.simple_spread_v3").parallel_env(N=2, max_cycles=8)
    sizes = {"num_agents": 2, "num_actions": 5, "obs_dim": 12, "state_dim": 24, "episode_limit": 8}
    assert task.info() == sizes
    assert set(task.versions()) == {"pettingzoo", "mpe2"}
    for seed in (1, 2, 1):
        task.reset(seed)
        observed, _ = itself.reset(seed=seed)
        rng, outcome = np.random.default_rng(seed), (0.0, False, False)
        for step in range(9):
            obs, state, avail = task.observe()
            np.testing.assert_array_equal(obs, [observed["agent_0"], observed["agent_1"]])
            np.testing.assert_array_equal(state, itself.state())
            assert avail.all()
            assert outcome[1:] == (False, step == 8)
            if step < 8:
                joint_action = drawn(rng, [5, 5])
                outcome = task.step(joint_action)
                observed, rewards, *_ = itself.step(dict(zip(itself.possible_agents, joint_action, strict=True)))
                assert outcome[0] == pytest.approx(rewards["agent_0"] + rewards["agent_1"])


def test_spaces_of_speaker_and_listener_differ() -> None:
    task = pettingzoo_task("mpe2.simple_speaker_listener_v4", {}, reward="first")
    assert task.info() == {"num_agents": 2, "num_actions": 5, "obs_dim": 11, "state_dim": 14, "episode_limit": 25}
    obs, _, avail = task.observe()
    assert avail.sum(axis=1).tolist() == [3, 5]  # the speaker's words, the listener's moves
    np.testing.assert_array_equal(obs[0, 3:], 0)


@pytest.mark.filterwarnings("ignore:The old environment creation API:DeprecationWarning")
def test_knights_die_and_the_game_plays_on() -> None:
    name = "pettingzoo.butterfly.knights_archers_zombies_v11"
    task = pettingzoo_task(name, {"max_cycles": 900})
    assert task.info()["num_agents"] == 4
    died = 0
    for seed in range(4):
        task.reset(seed)
        rng, over = np.random.default_rng(seed), False
        while not over:
            obs, _, avail = task.observe()
            dead = np.array([agent not in task.living for agent in task.agents])
            died += dead.any()
            assert not obs[dead].any()
            assert avail.sum(axis=1).tolist() == np.where(dead, 1, 6).tolist()
            _, terminated, truncated = task.step(np.where(avail, rng.random(avail.shape), -1).argmax(-1).tolist())
            over = terminated or truncated
    assert died


@pytest.mark.parametrize(
    ("name", "module", "sizes"),
    [
        ("Foraging-8x8-2p-3f-v3", "lbforaging", (2, 6, 15, 30, 50)),
        ("rware-tiny-2ag-v2", "rware", (2, 5, 71, 142, 500)),
    ],
)
def test_foraging_and_the_warehouse_are_played_as_by_themselves(name: str, module: str, sizes: tuple[int, ...]) -> None:
    importlib.import_module(module)
    task = gymnasium_task(name, module, {})
    itself = gymnasium.make(name, disable_env_checker=True)
    assert tuple(task.info().values()) == sizes
    assert set(task.versions()) == {"gymnasium", module}
    for seed in (1, 2, 1):
        task.reset(seed)
        observed, _ = itself.reset(seed=seed)
        rng, over = np.random.default_rng(seed), False
        for step in itertools.count(1):
            obs, state, avail = task.observe()
            np.testing.assert_array_equal(obs, observed)
            np.testing.assert_array_equal(state, obs.ravel())
            assert avail.all()
            if over:
                break
            joint_action = drawn(rng, [sizes[1]] * 2)
            reward, terminated, truncated = task.step(joint_action)
            expected: Any = itself.step(tuple(joint_action))
            observed, rewards, over, cut, _ = expected
            assert reward == pytest.approx(sum(rewards))
            assert not cut
            assert (terminated, truncated) == ((over and step < sizes[-1]), step == sizes[-1])


def test_options_of_foraging_change_its_limit() -> None:
    """Gymnasium's ``make`` would take this option for its own wrapper."""
    task = gymnasium_task("Foraging-8x8-2p-3f-v3", "lbforaging", {"max_episode_steps": 60})
    assert task.episode_limit == 60
    task.reset(0)
    ends = [task.step([0, 0])[1:] for _ in range(60)]
    assert ends == [(False, False)] * 59 + [(False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["env=pettingzoo"], ["env=gymnasium"], ["env=gymnasium", "env.name=rware-tiny-2ag-v2", "env.episode_limit=20"]],
    ids=["simple_spread", "foraging", "warehouse"],
)
def test_the_packages_train(overrides: list[str], tmp_path: Path) -> None:
    small = ["total_env_steps=200", "eval_interval=100", "eval_episodes=2", "algo.batch_size=2", "algo.buffer_size=8"]
    assert main("+algo=qmix", *overrides, *small, "num_envs=2", "num_seeds=2", f"run_dir={tmp_path / 'run'}") == 0
    records = load_metrics(tmp_path / "run")
    assert {record["seed"] for record in records if record["kind"] == "eval"} == {0, 1}
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)
    assert set(load_header(tmp_path / "run")["simulator"]) == set(
        load_config("+algo=qmix", *overrides).env.external.versions()
    )


@pytest.mark.slow  # it compiles three times: no cache keeps programs that call the host
@pytest.mark.parametrize(
    "overrides",
    [["env=pettingzoo", "env.options={N: 2, max_cycles: 4}"], ["env=gymnasium", "env.episode_limit=4"]],
    ids=["simple_spread", "foraging"],
)
def test_a_run_that_was_cut_continues_as_if_it_had_not_been(overrides: list[str], tmp_path: Path) -> None:
    algo = tmp_path / "configs" / "algo" / "my_algo.yaml"
    algo.parent.mkdir(parents=True)
    algo.write_text(yaml.safe_dump({"_target_": "tests.envs.host.linear.LinearInState", **TINY}))
    small = ["num_seeds=2", "seed=5", "num_envs=2", "eval_episodes=2", "eval_interval=20"]
    runs = []
    for name, first in (("whole", 60), ("cut", 20)):
        options = [*overrides, *small, f"total_env_steps={first}", f"run_dir={tmp_path / name}"]
        assert main("+algo=my_algo", *options, config_dir=algo.parent.parent) == 0
        if first < 60:
            assert main(f"resume={tmp_path / name}", "total_env_steps=60", config_dir=algo.parent.parent) == 0
        runs.append(timeless(load_metrics(tmp_path / name)))
    assert runs[0][-1]["env_steps"] >= 60
    losses = [[record["loss"] for record in run if "loss" in record] for run in runs]
    assert len(losses[0]) > 2
    assert losses[0] == losses[1]
    assert [r for r in runs[0] if r["kind"] == "eval"][-2:] == [r for r in runs[1] if r["kind"] == "eval"][-2:]
