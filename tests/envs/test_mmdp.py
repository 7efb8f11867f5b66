"""Games of several states: the tables of the literature, their ends, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import main
from wqmix_jax import load_config, train_seeds
from wqmix_jax.config import load_group
from wqmix_jax.envs.mmdp import MMDP
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build

KEY = jax.random.key(0)

CUSTOM = {"payoff": [[[0, 1, 2]], [[3, 4, 5]]], "next_state": [[[1, 0, 1]], [[-1, 0, 1]]], "start": 0}
"""Two states; the first agent has one action, the second has three."""


def make(**options: Any) -> MMDP:
    return build("env", load_group("env", "mmdp") | options)


def played(env: MMDP, *joint_actions: tuple[int, int]) -> list[tuple[float, bool, bool]]:
    """Returns rewards and ends of an episode."""
    state, step = env.reset(KEY), jax.jit(env.step)
    outcomes = []
    for joint_action in joint_actions:
        state, outcome = step(state, jnp.array(joint_action, jnp.int32), KEY)
        outcomes.append((float(outcome.reward), bool(outcome.terminated), bool(outcome.truncated)))
    return outcomes


@pytest.mark.parametrize("second", [0, 1])
def test_the_first_agent_chooses_the_table_of_the_two_step_game(second: int) -> None:
    env = make()
    assert env.spec == (2, 2, 3, 3, 2)
    table = {joint: played(env, (0, second), joint)[1] for joint in np.ndindex(2, 2)}
    assert table == dict.fromkeys(np.ndindex(2, 2), (7, True, False))
    table = {joint: played(env, (1, second), joint)[1] for joint in np.ndindex(2, 2)}
    assert table == {(0, 0): (0, True, False), (0, 1): (1, True, False), (1, 0): (1, True, False)} | {
        (1, 1): (8, True, False)
    }
    assert played(env, (1, second)) == [(0, False, False)]


def test_the_state_is_seen_by_all() -> None:
    env = make()
    state, step = env.reset(KEY), jax.jit(env.step)
    for joint_action, expected in [((1, 0), [1, 0, 0]), ((1, 1), [0, 0, 1])]:
        for seen in (env.observe(state), env.decompress(env.compress(state))):
            np.testing.assert_array_equal(seen.obs, [expected, expected])
            np.testing.assert_array_equal(seen.state, expected)
            assert seen.avail_actions.all()
        state, _ = step(state, jnp.array(joint_action, jnp.int32), KEY)
    np.testing.assert_array_equal(env.observe(state).state, [0, 0, 1])  # the last state is kept


def test_the_two_state_game_pays_while_its_second_state_lasts() -> None:
    env = make(game="two_state")
    assert env.spec == (2, 2, 2, 2, 100)
    assert played(env, (0, 0), (0, 1), (1, 0), (0, 0), (1, 1), (0, 0)) == [
        *[(1, False, False), (0, False, False), (0, False, False), (1, False, False)],
        *[(0, False, False), (0, False, False)],
    ]
    assert played(make(game="two_state", episode_limit=2), (0, 0), (0, 0)) == [(1, False, False), (1, False, True)]


def test_a_custom_game_is_played_and_its_missing_actions_are_unavailable() -> None:
    env = make(game=CUSTOM, episode_limit=3)
    assert env.spec == (2, 3, 2, 2, 3)
    np.testing.assert_array_equal(env.observe(env.reset(KEY)).avail_actions, [[1, 0, 0], [1, 1, 1]])
    assert played(env, (0, 1), (0, 2), (0, 0)) == [(1, False, False), (2, False, False), (3, True, False)]
    assert played(env, (0, 1), (0, 1), (0, 1)) == [(1, False, False), (1, False, False), (1, False, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "three_step"}, "a preset is one of two_step, two_state, anything else has payoff, next_state and s"),
        ({"game": {"payoff": [[[1]]]}}, "a preset is one of two_step, two_state, anything else has payoff, next_state"),
        ({"game": CUSTOM | {"payoff": "table1"}}, "payoff must be a nested list, one level for the states and one per"),
        ({"game": CUSTOM | {"payoff": [1, 2]}}, "payoff must have one level for the states and one per agent"),
        ({"game": CUSTOM | {"payoff": [[1], [2, 3]]}}, "lists on the same level must be equally long"),
        ({"game": CUSTOM | {"next_state": [[[0, 0, 2]], [[0, 0, 0]]]}}, "next_state must have payoff's form, with sta"),
        ({"game": CUSTOM | {"next_state": [[[0, 0]], [[0, 0]]]}}, "next_state must have payoff's form, with states 0"),
        ({"game": CUSTOM | {"next_state": [[[0.0, 0, 0]], [[0, 0, 0]]]}}, "next_state must have payoff's form, with"),
        ({"game": CUSTOM | {"next_state": [[0], [[0]]]}}, "next_state must have payoff's form, with states 0 to 1, or"),
        ({"game": CUSTOM | {"start": 2}, "episode_limit": 3}, "start must be a state, 0 to 1"),
        ({"game": CUSTOM | {"start": True}, "episode_limit": 3}, "start must be a state, 0 to 1"),
        ({"game": CUSTOM}, "env.episode_limit=None is not allowed: only the presets have a limit; give a number of"),
        ({"episode_limit": 0}, "env.episode_limit=0 is not allowed"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**options)
    text = str(refused.value)
    assert message in text
    assert text.startswith("env.")
    assert "\n" not in text


def test_the_command_refuses_it_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("+algo=vdn", "env=mmdp", "env.game=three_step") == 2
    assert capsys.readouterr().err.startswith("error: env.game='three_step' is not allowed: a preset is one of ")


@pytest.mark.slow
def test_qmix_finds_8_in_the_two_step_game_and_vdn_7() -> None:
    """The result of QMIX's section 5.1, whose exploration is uniform, too."""
    explore = ("algo.epsilon_start=1", "algo.epsilon_finish=1", "algo.batch_size=32", "algo.buffer_size=500")
    run = ("num_envs=8", "total_env_steps=16000", "eval_interval=8000", "eval_episodes=1")
    last = {}
    for algo in ("qmix", "vdn"):
        _, records = train_seeds(load_config(f"+algo={algo}", "env=mmdp", *explore, *run), [0, 1])
        final = max(record["env_steps"] for record in records if record["kind"] == "eval")
        evals = [record for record in records if record["kind"] == "eval" and record["env_steps"] == final]
        last[algo] = [record["episode_return"] for record in evals]
    assert last == {"qmix": [8, 8], "vdn": [7, 7]}
