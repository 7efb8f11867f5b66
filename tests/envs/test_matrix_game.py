import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.config import load_group
from wqmix_jax.envs.matrix_game import MatrixGame
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build

TABLE_1 = [[1, 0], [0, 1]]
TABLE_2 = [[8, -12, -12], [-12, 0, 0], [-12, 0, 0]]


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
        ({"payoff": np.arange(27).reshape(3, 3, 3).tolist()}, np.arange(27).reshape(3, 3, 3)),
    ],
)
def test_every_joint_action_pays_its_entry_and_terminates(overrides: dict[str, Any], table: Any) -> None:
    env = make(**overrides)
    table = np.asarray(table, np.float32)
    assert env.spec.num_agents == table.ndim
    assert env.spec.num_actions == len(table)
    joint_actions = jnp.array(list(itertools.product(range(len(table)), repeat=table.ndim)), jnp.int32)
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


@pytest.mark.parametrize(
    ("payoff", "allowed"),
    [
        ("table3", "a preset is one of table1, table2, anything else a nested list of numbers"),
        ([], "at least one agent and one action are needed"),
        ([[], []], "at least one agent and one action are needed"),
        (3, "at least one agent and one action are needed"),
        ([[1, 2], [3]], "lists on the same level must be equally long"),
        ([[1, [2]], [3, 4]], "lists on the same level must be equally long"),
        ([[1, 2, 3], [4, 5, 6]], "each of the 2 agents needs the same number of actions, got (2, 3)"),
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
