import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax import load_config, train_seeds
from wqmix_jax.config import load_group
from wqmix_jax.envs.matrix_game import MatrixGame
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build

KEY = jax.random.key(0)
TABLE_1 = [[1, 0], [0, 1]]
TABLE_2 = [[8, -12, -12], [-12, 0, 0], [-12, 0, 0]]
PRESET = (
    "a preset is one of table1, table2, climbing, qtran, qplex_1, qplex_3, pymarl2_mild, pymarl2_harsh, pymarl2_safe, "
    "penalty_K (K at most 0: penalty_-100), anything else a nested list of numbers"
)


def make(**overrides: Any) -> MatrixGame:
    return build("env", load_group("env", "matrix_game") | overrides)


@pytest.mark.parametrize(
    ("overrides", "table"),
    [
        ({}, TABLE_2),
        ({"payoff": "table1"}, TABLE_1),
        ({"payoff": "table2"}, TABLE_2),
        ({"payoff": [[0.5, 1], [2, -3.25]]}, [[0.5, 1], [2, -3.25]]),
        ({"payoff": [1, 2, 3]}, [1, 2, 3]),
        ({"payoff": [[1, 2, 3], [4, 5, 6]]}, [[1, 2, 3], [4, 5, 6]]),
        ({"payoff": "climbing"}, [[11, -30, 0], [-30, 7, 6], [0, 0, 5]]),
        ({"payoff": "penalty_-100"}, [[10, 0, -100], [0, 2, 0], [-100, 0, 10]]),
        ({"payoff": "penalty_0"}, [[10, 0, 0], [0, 2, 0], [0, 0, 10]]),
        ({"payoff": "penalty_-0.5"}, [[10, 0, -0.5], [0, 2, 0], [-0.5, 0, 10]]),
        ({"payoff": "qtran"}, TABLE_2),
        ({"payoff": "qplex_1"}, [[10.4, 0, 10], [0, 10, 10], [10, 10, 10]]),
        ({"payoff": "qplex_3"}, [[8, -12, -12], [-12, 6, 0], [-12, 0, 6]]),
        ({"payoff": "pymarl2_mild"}, [[12, -0.1, -0.1], [-0.1, 0, 0], [-0.1, 0, 0]]),
        ({"payoff": "pymarl2_harsh"}, [[12, -12, -12], [-12, 0, 0], [-12, 0, 0]]),
        ({"payoff": "pymarl2_safe"}, [[12, 0, 10], [0, 0, 10], [10, 10, 10]]),
        ({"payoff": np.arange(27).reshape(3, 3, 3).tolist()}, np.arange(27).reshape(3, 3, 3)),
    ],
)
def test_every_joint_action_pays_its_entry_and_terminates(overrides: dict[str, Any], table: Any) -> None:
    env = make(**overrides)
    table = np.asarray(table, np.float32)
    assert env.spec.num_agents == table.ndim
    assert env.spec.num_actions == max(table.shape)
    joint_actions = jnp.array(list(itertools.product(*map(range, table.shape))), jnp.int32)
    keys = jax.random.split(jax.random.key(0), len(joint_actions))
    after, outcome = jax.jit(env.step_batch)(env.reset_batch(keys), joint_actions, keys)
    np.testing.assert_array_equal(outcome.reward, table.reshape(-1))
    assert outcome.reward.dtype == jnp.float32
    assert outcome.terminated.all()
    assert not outcome.truncated.any()
    np.testing.assert_array_equal(after.steps, np.ones(len(joint_actions)))


def test_everyone_always_sees_the_same() -> None:
    env = make()
    assert env.spec == (2, 3, 1, 1, 1)
    start = env.reset(jax.random.key(0))
    after, _ = env.step(start, jnp.array([0, 1], jnp.int32), jax.random.key(1))
    for env_state in (start, after):
        for seen in (env.observe(env_state), env.decompress(env.compress(env_state))):
            np.testing.assert_array_equal(seen.obs, np.ones((2, 1), np.float32))
            np.testing.assert_array_equal(seen.state, np.ones(1, np.float32))
            np.testing.assert_array_equal(seen.avail_actions, np.ones((2, 3), bool))
            assert (seen.obs.dtype, seen.state.dtype) == (jnp.float32, jnp.float32)


def test_an_agent_with_fewer_actions_is_padded_with_unavailable_ones() -> None:
    env = make(payoff=[[[1, 2, 3]], [[4, 5, 6]]])
    assert env.spec[:2] == (3, 3)
    for seen in (env.observe(env.reset(KEY)), env.decompress(env.compress(env.reset(KEY)))):
        np.testing.assert_array_equal(seen.avail_actions, [[1, 1, 0], [1, 0, 0], [1, 1, 1]])


def test_a_repeated_game_pays_every_step_and_is_cut_at_its_end() -> None:
    env = make(payoff="climbing", steps=3)
    assert env.spec.episode_limit == 3
    state, step = env.reset(KEY), jax.jit(env.step)
    played = [(0, 0, 11), (1, 2, 6), (2, 1, 0)]
    for index, (row, column, reward) in enumerate(played):
        np.testing.assert_array_equal(env.observe(state).obs, np.ones((2, 1)))
        state, outcome = step(state, jnp.array([row, column], jnp.int32), KEY)
        assert float(outcome.reward) == reward
        assert not outcome.terminated
        assert bool(outcome.truncated) == (index == 2)


@pytest.mark.slow
def test_the_value_of_a_repeated_game_bootstraps_at_its_end() -> None:
    """An agent that gets 1 in each of two steps learns 1 / (1 - gamma) = 2, not 1 + gamma = 1.5 or 1."""
    small = ("algo.gamma=0.5", "algo.hidden_dim=16", "algo.target_update_interval=20", "algo.lr=0.005")
    run = ("total_env_steps=6000", "eval_interval=3000", "eval_episodes=1", "num_seeds=1")
    config = load_config("+algo=vdn", "env=matrix_game", "env.payoff=[[1]]", "env.steps=2", *small, *run)
    _, records = train_seeds(config, [0])
    assert [r["q_tot_mean"] for r in records if r["kind"] == "train"][-1] == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_a_number_of_steps_is_positive(steps: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^env.steps={steps} is not allowed: [^\n]*$"):
        make(steps=steps)


@pytest.mark.parametrize(
    ("payoff", "allowed"),
    [
        ("table3", PRESET),
        ("penalty", PRESET),
        ("penalty_x", PRESET),
        ("penalty_1", "the penalty must be at most 0 and finite in float32, as in penalty_-100"),
        (f"penalty_-{'9' * 40}", "the penalty must be at most 0 and finite in float32, as in penalty_-100"),
        ([], "at least one agent and one action are needed"),
        ([[], []], "at least one agent and one action are needed"),
        (3, "at least one agent and one action are needed"),
        ([[1, 2], [3]], "lists on the same level must be equally long"),
        ([[1, [2]], [3, 4]], "lists on the same level must be equally long"),
        ([[1, float("nan")], [0, 1]], "each payoff must be finite in float32"),
        ([[1, float("inf")], [0, 1]], "each payoff must be finite in float32"),
        ([[1, 1e39], [0, 1]], "each payoff must be finite in float32"),
        ([["1", "2"], ["3", "4"]], "a payoff is a preset's name or a nested list of numbers"),
        ([[True, False], [False, True]], "a payoff is a preset's name or a nested list of numbers"),
        ([[1, None], [0, 1]], "a payoff is a preset's name or a nested list of numbers"),
        (None, "a payoff is a preset's name or a nested list of numbers"),
    ],
)
def test_no_payoff_tensor_is_refused_in_one_line(payoff: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(payoff=payoff)
    assert str(refused.value) == f"env.payoff={payoff!r} is not allowed: {allowed}"
