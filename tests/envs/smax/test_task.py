"""SMAX as an environment of this package: equal to the native game, the ends of battles, and the replay's form."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import main
from wqmix_jax import load_config, train_seeds
from wqmix_jax.config import load_group
from wqmix_jax.envs.smax import SMAX, map_names
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build
from wqmix_jax.records.metrics import load_header
from wqmix_jax.runs import session

PAPER_MAPS = {"3s5z": (8, 8), "5m_vs_6m": (5, 6), "6h_vs_8z": (6, 8), "3s5z_vs_3s6z": (8, 9), "corridor": (6, 24)}


def make(**options: Any) -> SMAX:
    return build("env", load_group("env", "smax") | {"map": "3m"} | options)


def test_the_version_of_the_game_is_part_of_a_run() -> None:
    assert make().external.versions() == {"jaxmarl": importlib.metadata.version("jaxmarl")}


@pytest.mark.parametrize(("name", "max_return", "see_enemy_actions"), [("3m", 2.0, False), ("3s_vs_5z", 20.0, True)])
def test_a_battle_is_the_native_one_step_by_step(name: str, max_return: float, see_enemy_actions: bool) -> None:
    env = make(map=name, max_return=max_return, see_enemy_actions=see_enemy_actions)
    native, scale = env.game, max_return / 2
    reset_key, *keys = jax.random.split(jax.random.key(3), 101)
    ours = jax.jit(env.reset)(reset_key)
    with jax.numpy_rank_promotion("allow"):
        seen, theirs = native.reset(reset_key)
    step = jax.jit(env.step)
    looks = jax.jit(lambda state: (env.observe(state), env.decompress(env.compress(state))))
    rewards = []
    for key in keys:
        for observation in looks(ours):
            np.testing.assert_allclose(observation.obs, np.stack([seen[agent] for agent in native.agents]), atol=1e-6)
            np.testing.assert_allclose(observation.state, seen["world_state"], atol=1e-6)
            with jax.numpy_rank_promotion("allow"):
                avail = native.get_avail_actions(theirs)
            np.testing.assert_array_equal(observation.avail_actions, np.stack([avail[a] for a in native.agents]) > 0)
        joint_action = jax.random.categorical(key, jnp.where(observation.avail_actions, 0.0, -jnp.inf))
        ours, outcome = step(ours, joint_action, key)
        actions = dict(zip(native.agents, joint_action, strict=True))
        with jax.numpy_rank_promotion("allow"):
            seen, theirs, reward, dones, _ = native.step_env(key, theirs, actions)
        np.testing.assert_allclose(outcome.reward, scale * reward["ally_0"], rtol=1e-6)
        assert bool(dones["__all__"]) == bool(outcome.terminated | outcome.truncated)
        rewards.append(float(outcome.reward))
        if dones["__all__"]:
            break
    assert max(rewards) > 0
    assert dones["__all__"]


def battle(env: SMAX, allies: list[float], enemies: list[float], **changes: Any) -> Any:
    """Returns a battle of 3m with all units in one another's range, with the given health."""
    state = env.reset(jax.random.key(0))
    health = jnp.array([*allies, *enemies], jnp.float32)
    columns = jnp.array([15.0] * 3 + [17.0] * 3)
    rows = jnp.array([14.0, 16.0, 18.0] * 2)
    return state.replace(
        state=state.state.replace(
            unit_positions=jnp.stack([columns, rows], axis=1), unit_health=health, unit_alive=health > 0, **changes
        )
    )


SHOOT = jnp.array([5, 6, 7], jnp.int32)
STOP = jnp.array([4, 4, 4], jnp.int32)


@pytest.mark.parametrize(
    ("allies", "enemies", "joint_action", "ends", "won"),
    [
        ([45, 45, 45], [1, 1, 1], SHOOT, True, 1),
        ([1, 1, 1], [45, 45, 45], STOP, True, 0),
        ([1, 0, 0], [1, 0, 0], SHOOT, True, 0),  # both sides shoot simultaneously
        ([45, 45, 45], [45, 45, 45], STOP, False, 0),
    ],
    ids=["won", "lost", "draw", "unfinished"],
)
def test_a_battle_ends_when_a_side_is_dead(allies, enemies, joint_action, ends, won) -> None:
    env = make()
    state, outcome = jax.jit(env.step)(battle(env, allies, enemies), joint_action, jax.random.key(1))
    metrics = env.metrics(state)
    assert bool(outcome.terminated) == ends
    assert not outcome.truncated
    assert float(metrics["win_rate"]) == won
    if won:
        # Of three enemies with one point of 45 each, and the battle.
        assert float(outcome.reward) == pytest.approx(3 * (1 / 45) / 3 + 1, abs=1e-5)
        assert float(metrics["dead_enemies"]) == 3
        assert float(metrics["dead_allies"]) == 0


def test_the_time_limit_cuts_and_does_not_terminate() -> None:
    env = make()
    step = jax.jit(env.step)
    late = battle(env, [45] * 3, [45] * 3, step=jnp.int32(99))
    _, outcome = step(late, STOP, jax.random.key(1))
    assert (bool(outcome.terminated), bool(outcome.truncated)) == (False, True)
    last_win = battle(env, [45] * 3, [1] * 3, step=jnp.int32(99))
    _, outcome = step(last_win, SHOOT, jax.random.key(1))
    assert (bool(outcome.terminated), bool(outcome.truncated)) == (True, False)


@pytest.mark.parametrize(("name", "armies"), PAPER_MAPS.items())
def test_the_papers_maps_are_there_and_stored_as_their_units(name: str, armies: tuple[int, int]) -> None:
    env = make(map=name)
    assert (env.spec.num_agents, env.spec.num_actions - 5) == armies
    compressed, seen = jax.eval_shape(
        lambda key: (env.compress(env.reset(key)), env.observe(env.reset(key))), jax.random.key(0)
    )
    assert seen.obs.shape == (env.spec.num_agents, env.spec.obs_dim)
    assert seen.state.shape == (env.spec.state_dim,)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(compressed) == 27 * sum(armies) < size(seen) / 4


def test_reset_and_step_give_the_same_types() -> None:
    env = make()
    state = jax.eval_shape(env.reset, jax.random.key(0))
    stepped, _ = jax.eval_shape(env.step, state, STOP, jax.random.key(0))
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(stepped), strict=True):
        assert (one.shape, one.dtype, one.weak_type) == (two.shape, two.dtype, two.weak_type)


SMALL = ("num_seeds=2", "total_env_steps=60", "eval_interval=30", "eval_episodes=2", "algo.batch_size=2")
NARROW = ("algo.buffer_size=4", "algo.hidden_dim=8", "algo.q_star_dim=8", "env.episode_limit=30")


@pytest.mark.parametrize("name", ["3m", *(pytest.param(name, marks=pytest.mark.slow) for name in PAPER_MAPS)])
def test_a_map_trains_for_a_few_iterations(name: str) -> None:
    config = load_config("+algo=cw_qmix", "env=smax", f"env.map={name}", *SMALL, *NARROW)
    _, records = train_seeds(config, [0, 1])
    evals = [record for record in records if record["kind"] == "eval"]
    assert {record["seed"] for record in evals} == {0, 1}
    assert all(0 <= record["win_rate"] <= 1 for record in evals)
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)
    assert any("loss" in record for record in records)


def test_a_run_says_which_map_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.Session, "run", lambda self: None)
    run_dir = tmp_path / "run"
    assert main("+algo=iql", "env=smax", "env.map=2s3z", "num_seeds=1", f"run_dir={run_dir}") == 0
    assert (load_header(run_dir)["env"], load_header(run_dir)["map"]) == ("smax", "2s3z")


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"env.map=4z is not allowed: choose one of 3m, 2s3z, .*corridor"):
        make(map="4z")
    assert set(PAPER_MAPS) < set(map_names())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jaxmarl" else real(name))
    with pytest.raises(ConfigError, match=r"env=smax is not allowed: it needs jaxmarl, .*smax"):
        make()


def test_jaxmarl_is_imported_late_and_in_silence() -> None:
    code = """
import sys
from wqmix_jax.envs import smax
assert "jaxmarl" not in sys.modules
streams = sys.stdout, sys.stderr, sys.__stdout__
smax.map_names()
assert "jaxmarl" in sys.modules
assert streams == (sys.stdout, sys.stderr, sys.__stdout__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
