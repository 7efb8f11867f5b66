"""Jumanji's environments as environments of this package."""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest

from wqmix_jax import load_config, train_seeds
from wqmix_jax.config import load_group
from wqmix_jax.envs.jumanji import JumanjiEnvironment
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build

CROWDED = {"grid_size": 6, "fov": 6, "num_agents": 3, "num_food": 2, "force_coop": False}


def make(**options: Any) -> JumanjiEnvironment:
    return build("env", load_group("env", "jumanji") | options)


def test_the_version_of_the_game_is_part_of_a_run() -> None:
    assert make().external.versions() == {"jumanji": importlib.metadata.version("jumanji")}


@pytest.mark.parametrize("name", ["LevelBasedForaging-v0", "RobotWarehouse-v0"])
def test_an_episode_is_jumanjis_own_step_by_step(name: str) -> None:
    env, native = make(name=name, episode_limit=25), jumanji.make(name, time_limit=25)
    key = jax.random.key(4)
    ours = jax.jit(env.reset)(key)
    step = jax.jit(env.step)
    looks = jax.jit(lambda state: (env.observe(state), env.decompress(env.compress(state))))
    with jax.numpy_rank_promotion("allow"):
        native_step = jax.jit(native.step)
        theirs, timestep = jax.jit(native.reset)(jax.random.key_data(key))
        for t in range(25):
            for seen in looks(ours):
                expected = np.reshape(timestep.observation.agents_view, (env.spec.num_agents, -1))
                np.testing.assert_array_equal(seen.obs, expected)
                np.testing.assert_array_equal(seen.state, expected.reshape(-1))
                np.testing.assert_array_equal(seen.avail_actions, timestep.observation.action_mask)
            joint_action = jax.random.categorical(jax.random.key(t), jnp.where(seen.avail_actions, 0.0, -jnp.inf))
            ours, outcome = step(ours, joint_action, key)
            theirs, timestep = native_step(theirs, joint_action)
            assert float(outcome.reward) == pytest.approx(float(np.sum(timestep.reward)))
            assert bool(outcome.terminated | outcome.truncated) == bool(np.all(timestep.last()))
    assert t == 24


def test_a_time_limit_cuts_and_eaten_food_terminates() -> None:
    env = make(episode_limit=3, generator=CROWDED)
    state, step = jax.jit(env.reset)(jax.random.key(0)), jax.jit(env.step)
    stay = jnp.zeros(3, jnp.int32)
    for _ in range(3):
        state, outcome = step(state, stay, jax.random.key(0))
    assert (bool(outcome.terminated), bool(outcome.truncated)) == (False, True)
    food = state.state.food_items
    eaten = state.state.replace(food_items=food.replace(eaten=jnp.ones_like(food.eaten)), step_count=jnp.int32(1))
    state, outcome = step(state._replace(state=eaten), stay, jax.random.key(0))
    assert (bool(outcome.terminated), bool(outcome.truncated)) == (True, False)
    assert float(env.metrics(state)["percent_eaten"]) == 100


def test_features_are_stored_once_and_as_bytes() -> None:
    env = make(generator=CROWDED)
    compressed = jax.eval_shape(lambda key: env.compress(env.reset(key)), jax.random.key(0))
    assert compressed.agents_view.dtype == jnp.int8
    assert compressed.agents_view.shape == (3, 15)
    assert (env.spec.obs_dim, env.spec.state_dim) == (15, 45)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "Maze-v0"},
            r"env.name='Maze-v0' is not allowed: input should be 'LevelBasedForaging-v0' or",
        ),
        ({"generator": {"size": 3}}, r"env.generator=.* is not allowed: .*'size'"),
        ({"episode_limit": 0}, r"env.episode_limit=0 is not allowed"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_foraging_trains_for_a_few_iterations() -> None:
    small = ("num_seeds=2", "total_env_steps=40", "eval_interval=20", "eval_episodes=2", "algo.batch_size=2")
    narrow = ("algo.buffer_size=4", "algo.hidden_dim=8", "algo.q_star_dim=8", "env.episode_limit=20")
    _, records = train_seeds(load_config("+algo=ow_qmix", "env=jumanji", *small, *narrow), [0, 1])
    assert all("percent_eaten" in record for record in records if record["kind"] == "eval")
    assert any(np.isfinite(record["loss"]) for record in records if "loss" in record)
