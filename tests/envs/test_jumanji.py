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


@pytest.mark.parametrize("name", ["LevelBasedForaging-v0", pytest.param("RobotWarehouse-v0", marks=pytest.mark.slow)])
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


WIRES = {"grid_size": 4, "num_agents": 2}
ROOM = {"num_rows": 5, "num_cols": 5, "num_agents": 2}


@pytest.mark.parametrize(("name", "generator"), [("Connector-v3", WIRES), ("Cleaner-v0", ROOM)])
def test_an_episode_on_a_shared_grid_is_jumanjis_own(name: str, generator: dict[str, Any]) -> None:
    """Rewards, masks, ends and metrics; the features by hand are below."""
    env = make(name=name, episode_limit=25, generator=generator)
    native = env._jumanji
    ours = jax.jit(env.reset)(jax.random.key(4))
    step = jax.jit(env.step)
    looks = jax.jit(lambda state: (env.observe(state), env.decompress(env.compress(state))))
    with jax.numpy_rank_promotion("allow"):
        native_step = jax.jit(native.step)
        theirs, timestep = jax.jit(native.reset)(jax.random.key_data(jax.random.key(4)))
        for t in range(25):
            seen, again = looks(ours)
            jax.tree.map(np.testing.assert_array_equal, seen, again)
            np.testing.assert_array_equal(seen.avail_actions, timestep.observation.action_mask)
            joint_action = jax.random.categorical(jax.random.key(t), jnp.where(seen.avail_actions, 0.0, -jnp.inf))
            ours, outcome = step(ours, joint_action, jax.random.key(0))
            theirs, timestep = native_step(theirs, joint_action)
            assert float(outcome.reward) == pytest.approx(float(np.sum(timestep.reward)))
            assert bool(outcome.terminated | outcome.truncated) == bool(np.all(timestep.last()))
            assert {name: float(value) for name, value in env.metrics(ours).items()} == {
                name: float(value) for name, value in timestep.extras.items()
            }
            if timestep.last():
                break
    assert timestep.last()


def planes(features: Any, size: int) -> list[list[list[int]]]:
    """Returns flat features as planes of rows."""
    return np.asarray(features, int).reshape(-1, size, size).tolist()


def test_connector_shows_own_and_other_wires() -> None:
    """Agent 0 has 1 for its path, 2 for its head, 3 for its target; agent 1 has 4, 5 and 6."""
    env = make(name="Connector-v3", generator={"grid_size": 3, "num_agents": 2})
    assert env.spec == (2, 5, 54, 45, 100)
    state = env.reset(jax.random.key(0))._replace(agents_view=jnp.array([[4, 0, 1], [5, 0, 1], [6, 3, 2]]))
    path, head, target = (
        [[0, 0, 1], [0, 0, 1], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
        [[0] * 3] * 2 + [[0, 1, 0]],
    )
    path_1, head_1, target_1 = [[1, 0, 0], [0] * 3, [0] * 3], [[0] * 3, [1, 0, 0], [0] * 3], [[0] * 3] * 2 + [[1, 0, 0]]
    for seen in (env.observe(state), env.decompress(env.compress(state))):
        assert planes(seen.obs[0], 3) == [path, head, target, path_1, head_1, target_1]
        assert planes(seen.obs[1], 3) == [path_1, head_1, target_1, path, head, target]
        both = [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
        assert planes(seen.state, 3) == [both, head, target, head_1, target_1]
    compressed = env.compress(state)
    assert (compressed.agents_view.dtype, compressed.agents_view.shape) == (jnp.uint8, (3, 3))


def test_cleaner_shows_tiles_and_agents() -> None:
    env = make(name="Cleaner-v0", generator={"num_rows": 3, "num_cols": 3, "num_agents": 3})
    assert env.spec == (3, 4, 36, 45, 100)
    grid, places = [1, 2, 0, 1, 1, 2, 0, 2, 0], [0, 0, 1, 1, 1, 1]
    state = env.reset(jax.random.key(0))._replace(agents_view=jnp.array([*grid, *places]))
    dirty, walls = [[0, 0, 1], [0, 0, 0], [1, 0, 1]], [[0, 1, 0], [0, 0, 1], [0, 1, 0]]
    corner, middle = [[1, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    for seen in (env.observe(state), env.decompress(env.compress(state))):
        assert planes(seen.obs[0], 3) == [dirty, walls, corner, [[0, 0, 0], [0, 2, 0], [0, 0, 0]]]
        assert planes(seen.obs[1], 3) == [dirty, walls, middle, [[1, 0, 0], [0, 1, 0], [0, 0, 0]]]
        assert planes(seen.state, 3) == [dirty, walls, corner, middle, middle]


def test_cleaner_is_cut_at_its_time_limit_and_terminates_when_all_is_clean() -> None:
    env = make(name="Cleaner-v0", episode_limit=2, generator={"num_rows": 3, "num_cols": 3, "num_agents": 1})
    step, ends = jax.jit(env.step), []
    for dirt in (0, 1):  # 0: the maze as it is; 1: all clean but one tile, which the second step cleans
        state = jax.jit(env.reset)(jax.random.key(0))
        for _ in range(2):
            action = jnp.argmax(state.action_mask, axis=1).astype(jnp.int32)
            if dirt == 1 and state.state.step_count == 1:
                clean = jnp.where(state.state.grid == 0, 1, state.state.grid)
                place = state.state.agents_locations[0] + jnp.array([[-1, 0], [0, 1], [1, 0], [0, -1]])[action[0]]
                state = state._replace(state=state.state.replace(grid=clean.at[place[0], place[1]].set(0)))
            state, outcome = step(state, action, jax.random.key(0))
        ends.append((float(outcome.reward), bool(outcome.terminated), bool(outcome.truncated)))
    assert ends[1] == (0.5, True, False)  # one tile less the step's penalty of 1/2
    assert ends[0][1:] == (False, True)


def test_connector_terminates_when_all_wires_are_connected() -> None:
    env = make(name="Connector-v3", episode_limit=2, generator={"grid_size": 3, "num_agents": 1})
    state, step = jax.jit(env.reset)(jax.random.key(0)), jax.jit(env.step)
    agents = state.state.agents.replace(position=jnp.array([[0, 0]]), target=jnp.array([[0, 1]]))
    mask = jnp.array([[True, False, True, True, False]])
    native = state.state.replace(grid=jnp.array([[2, 3, 0], [0] * 3, [0] * 3]), agents=agents, action_mask=mask)
    state = state._replace(state=native)
    for action, reward, ends in [(2, 0.97, (True, False)), (0, -0.03, (False, False))]:
        after, outcome = step(state, jnp.array([action], jnp.int32), jax.random.key(0))
        assert float(outcome.reward) == pytest.approx(reward)
        assert (bool(outcome.terminated), bool(outcome.truncated)) == ends
    _, outcome = step(after, jnp.array([0], jnp.int32), jax.random.key(0))
    assert (bool(outcome.terminated), bool(outcome.truncated)) == (False, True)
    assert float(env.metrics(after)["num_connections"]) == 0


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
            r"env.name='Maze-v0' is not allowed: input should be 'LevelBasedForaging-v0', 'Rob",
        ),
        ({"generator": CROWDED | {"force_coop": [1]}}, r"env.generator=.* is not allowed: TypeError: where requires"),
        ({"generator": {"size": 3}}, r"env.generator=.* is not allowed: .*'size'"),
        ({"episode_limit": 0}, r"env.episode_limit=0 is not allowed"),
        ({"name": "Connector-v2"}, r"env.name='Connector-v2' is not allowed: input should be .*'Connector-v3'"),
        (
            {"name": "Cleaner-v0", "generator": ROOM | {"num_rows": 4}},
            r"env.generator=.* is not allowed: num_rows and num_cols must be equal",
        ),
        ({"name": "Cleaner-v0", "generator": WIRES}, r"env.generator=.* is not allowed: .*grid_size"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        pytest.param("LevelBasedForaging-v0", "percent_eaten", marks=pytest.mark.slow),
        pytest.param("Connector-v3", "ratio_connections", marks=pytest.mark.slow),
        pytest.param("Cleaner-v0", "ratio_dirty_tiles", marks=pytest.mark.slow),
    ],
)
def test_a_game_trains_for_a_few_iterations(name: str, metric: str) -> None:
    small = ("num_seeds=2", "total_env_steps=40", "eval_interval=20", "eval_episodes=2", "algo.batch_size=2")
    narrow = ("algo.buffer_size=4", "algo.hidden_dim=8", "algo.q_star_dim=8", "env.episode_limit=20")
    _, records = train_seeds(load_config("+algo=ow_qmix", "env=jumanji", f"env.name={name}", *small, *narrow), [0, 1])
    assert all(metric in record for record in records if record["kind"] == "eval")
    assert any(np.isfinite(record["loss"]) for record in records if "loss" in record)
