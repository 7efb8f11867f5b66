"""JaxMARL's games as environments of this package: equal to the native games, their ends, padding and rewards."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import main
from wqmix_jax import load_config, train_seeds
from wqmix_jax.config import load_group
from wqmix_jax.envs.jaxmarl import JaxMARL
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build

KEY = jax.random.key(0)
SPREAD, REFERENCE, SPEAKER = "MPE_simple_spread_v3", "MPE_simple_reference_v3", "MPE_simple_speaker_listener_v4"

SIZES = {
    SPREAD: (3, 5, 18, 54, 25),
    REFERENCE: (2, 50, 21, 42, 25),
    SPEAKER: (2, 5, 11, 22, 25),
    "overcooked": (2, 6, 520, 1040, 400),
    "overcooked_v2": (2, 6, 600, 1200, 400),
    "switch_riddle": (3, 3, 2, 6, 6),
    "hanabi": (2, 21, 658, 1316, 30),
}
"""The spec of each game; hanabi's limit is that of these tests."""

LARGE = ("overcooked_v2", "hanabi")


def make(name: str = SPREAD, **options: Any) -> JaxMARL:
    limit = {"episode_limit": 30} if name == "hanabi" else {}
    return build("env", load_group("env", "jaxmarl") | {"name": name} | limit | options)


def random_actions(key: Any, avail: Any) -> Any:
    return jax.random.categorical(key, jnp.where(avail, 0.0, -jnp.inf)).astype(jnp.int32)


def test_the_version_of_the_game_is_part_of_a_run() -> None:
    assert make().external.versions() == {"jaxmarl": importlib.metadata.version("jaxmarl")}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(*each, marks=pytest.mark.slow if each[0] in LARGE else ()) for each in SIZES.items()],
)
def test_an_episode_is_the_native_one_step_by_step(name: str, sizes: tuple[int, ...]) -> None:
    env = make(name)
    assert env.spec == sizes
    native = env._game.native
    reset_key, *keys = jax.random.split(jax.random.key(3), 1 + min(25, env.spec.episode_limit))
    step, reset = jax.jit(env.step), jax.jit(env.reset)
    looks = jax.jit(lambda state: (env.observe(state), env.decompress(env.compress(state))))
    ours = reset(reset_key)
    with jax.numpy_rank_promotion("allow"):
        native_step = jax.jit(native.step_env)
        seen, theirs = jax.jit(native.reset)(reset_key)
    for index, key in enumerate(keys):
        for observation in looks(ours):
            for agent, features in zip(native.agents, observation.obs, strict=True):
                size = np.size(seen[agent])
                np.testing.assert_allclose(features[:size], np.ravel(seen[agent]), atol=1e-6)
                assert not features[size:].any()
            np.testing.assert_array_equal(observation.state, observation.obs.reshape(-1))
            assert (observation.obs.dtype, observation.state.dtype) == (jnp.float32, jnp.float32)
        joint_action = random_actions(key, observation.avail_actions)
        ours, outcome = step(ours, joint_action, key)
        with jax.numpy_rank_promotion("allow"):
            actions = dict(zip(native.agents, joint_action, strict=True))
            seen, theirs, rewards, dones, _ = native_step(key, theirs, actions)
        each = [float(rewards[agent]) for agent in native.agents]
        assert float(outcome.reward) == pytest.approx(sum(each) / len(each), abs=1e-5)
        if index + 1 < env.spec.episode_limit:
            assert bool(outcome.terminated) == bool(dones["__all__"])
            assert not outcome.truncated
        if dones["__all__"]:
            break


@pytest.mark.parametrize("name", SIZES)
def test_a_seed_gives_the_same_episode_and_masks_are_honoured(name: str) -> None:
    env = make(name, episode_limit=6)

    def play(key: Any) -> Any:
        def one(state: Any, key: Any) -> Any:
            avail = env.observe(state).avail_actions
            joint_action = random_actions(key, avail)
            state, outcome = env.step(state, joint_action, key)
            chosen = jnp.take_along_axis(avail, joint_action[:, None], axis=1)
            return state, (env.observe(state), outcome, chosen, avail.any(-1))

        reset_key, *keys = jax.random.split(key, 7)
        return jax.lax.scan(one, env.reset(reset_key), jnp.stack(keys))[1]

    first, second = jax.device_get([jax.jit(play)(KEY), jax.jit(play)(KEY)])
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _, _, chosen, some = first
    assert chosen.all()
    assert some.all()


@pytest.mark.parametrize("name", [SPREAD, pytest.param("overcooked", marks=pytest.mark.slow)])
def test_a_time_limit_cuts_and_does_not_terminate(name: str) -> None:
    """JaxMARL reports its own limit as ``done``; a longer episode goes past it."""
    for steps, limit in [(3, None), (3, 5), (1, None), (1, 2)]:
        env = make(name, options={"max_steps": steps}, episode_limit=limit)
        limit = limit or steps
        assert env.spec.episode_limit == limit
        state, step = jax.jit(env.reset)(KEY), jax.jit(env.step)
        ends = []
        for _ in range(limit):
            state, outcome = step(state, jnp.zeros(env.spec.num_agents, jnp.int32), KEY)
            ends.append((bool(outcome.terminated), bool(outcome.truncated)))
        assert ends == [(False, False)] * (limit - 1) + [(False, True)]


NOTHING, TELL = 0, 2
STAY, INTERACT, DISH = 4, 5, 9
"""JaxMARL's numbers of actions, and of a soup in a dish."""


@pytest.mark.parametrize(("visited", "reward"), [(1, 1.0), (0, -1.0)])
def test_the_riddle_terminates_when_an_agent_claims_its_solution_even_at_the_limit(visited: int, reward: float) -> None:
    env = make("switch_riddle")
    state, step = jax.jit(env.reset)(KEY), jax.jit(env.step)
    state = state._replace(state=state.state.replace(has_been=jnp.full(3, visited, state.state.has_been.dtype)))
    claim = jnp.full(3, TELL, jnp.int32)
    _, outcome = step(state, claim, KEY)
    assert (float(outcome.reward), bool(outcome.terminated), bool(outcome.truncated)) == (reward, True, False)
    for _ in range(5):
        state, outcome = step(state, jnp.full(3, NOTHING, jnp.int32), KEY)
        state = state._replace(state=state.state.replace(has_been=jnp.full_like(state.state.has_been, visited)))
    _, outcome = step(state, claim, KEY)
    assert (float(outcome.reward), bool(outcome.terminated), bool(outcome.truncated)) == (reward, True, False)
    _, outcome = step(state, jnp.full(3, NOTHING, jnp.int32), KEY)
    assert (float(outcome.reward), bool(outcome.terminated), bool(outcome.truncated)) == (0, False, True)


def test_the_listener_has_five_actions_and_the_speaker_three() -> None:
    seen = make(SPEAKER).observe(make(SPEAKER).reset(KEY))
    np.testing.assert_array_equal(seen.avail_actions, [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert not seen.obs[0, 3:].any()  # the speaker sees the colour of the target alone
    assert seen.obs[1].any()


def test_only_the_player_whose_turn_it_is_acts_in_hanabi() -> None:
    """The others have one action, the last: to do nothing. All hints are legal, but no discard: no token is spent."""
    env = make("hanabi")
    state = env.reset(KEY)
    for player in (0, 1, 0):
        avail = np.asarray(env.observe(state).avail_actions)
        np.testing.assert_array_equal(avail[1 - player], [False] * 20 + [True])
        assert not avail[player, -1]
        assert avail[player, 5:10].all()  # a play of each card
        joint_action = jnp.where(jnp.arange(2) == player, jnp.int32(np.flatnonzero(avail[player])[-1]), 20)
        if player == 0 and not state.steps:
            assert not avail[0, :5].any()
        state, outcome = env.step(state, joint_action, KEY)
        assert float(outcome.reward) == 0


@pytest.mark.parametrize(("reward", "expected"), [("sum", -4.0), ("mean", -4 / 3), ("first", -1.5)])
def test_the_reward_of_the_team_by_hand(reward: str, expected: float) -> None:
    """The landmarks are 1, 0 and 1 from the nearest agent, and the first two of three agents touch.

    With the local ratio of 1/2 everyone gets -2 / 2, and each of the two another -1 / 2. A tiny step moves nothing.
    """
    env = make(SPREAD, reward=reward, options={"dt": 1e-6})
    state = env.reset(KEY)
    places = [[0.0, 0.0], [0.1, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 2.0]]
    state = state._replace(state=state.state.replace(p_pos=jnp.array(places)))
    _, outcome = jax.jit(env.step)(state, jnp.zeros(3, jnp.int32), KEY)
    assert float(outcome.reward) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("reward", "expected"), [("mean", 20.0), ("first", 20.0), ("sum", 40.0)])
def test_a_shared_reward_is_multiplied_by_the_agents_only_in_a_sum(reward: str, expected: float) -> None:
    """A cook delivers a soup, worth 20 to both."""
    env = make("overcooked", reward=reward)
    state = jax.jit(env.reset)(KEY)
    native = state.state
    at_the_counter = native.replace(
        agent_pos=native.agent_pos.at[0].set(jnp.array([3, 2], jnp.uint32)),
        agent_dir=native.agent_dir.at[0].set(jnp.array([0, 1], native.agent_dir.dtype)),
        agent_dir_idx=native.agent_dir_idx.at[0].set(1),
        agent_inv=native.agent_inv.at[0].set(DISH),
    )
    _, outcome = jax.jit(env.step)(state._replace(state=at_the_counter), jnp.array([INTERACT, STAY], jnp.int32), KEY)
    assert float(outcome.reward) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "MPE_simple_tag_v3"}, "env.name='MPE_simple_tag_v3' is not allowed: input should be 'MPE_simple_spr"),
        (
            {"options": {"num_agent": 3}},
            "env.options={'num_agent': 3} is not allowed: num_agent is unknown: known na",
        ),
        ({"options": {"action_type": "Continuous"}}, "is not allowed: the actions are continuous; only discrete ones"),
        ({"options": {"local_ratio": 2.0}}, "is not allowed: local_ratio must be between 0.0 and 1.0"),
        (
            {"name": "overcooked", "options": {"layout": "attic"}},
            "is not allowed: layout must be one of cramped_room",
        ),
        (
            {"name": "overcooked_v2", "options": {"layout": "attic"}},
            "is not allowed: Invalid layout: attic, allowed l",
        ),
        ({"name": "switch_riddle", "options": {"num_agents": 2}}, "is not allowed: The minimum number of agents for t"),
        ({"name": "hanabi", "episode_limit": None}, "env.episode_limit=None is not allowed: hanabi has no limit; give"),
        (
            {"name": "overcooked_v2", "options": {"initial_state_buffer": 3}},
            "initial_state_buffer is unknown: known names are layout, max_steps, observation_type, ",
        ),
        ({"name": "overcooked_v2", "options": {"layout": 3}}, "env.options={'layout': 3} is not allowed: "),
        ({"options": {"dt": "a"}}, "env.options={'dt': 'a'} is not allowed: TypeError: "),
        ({"options": {"max_steps": "10"}}, "is not allowed: max_steps must be an integer above 0, but is '10'"),
        ({"options": {"max_steps": True}}, "is not allowed: max_steps must be an integer above 0, but is True"),
        (
            {"options": {"colour": [1]}},
            "colour is unknown: known names are num_agents, num_landmarks, local_ratio, action_type, dim_p, max_steps",
        ),
        ({"episode_limit": 0}, "env.episode_limit=0 is not allowed"),
        ({"reward": "max"}, "env.reward='max' is not allowed: input should be 'mean', 'sum' or 'first'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**options)
    assert message in str(refused.value)
    assert str(refused.value).startswith("env.")
    assert "\n" not in str(refused.value)


def test_the_command_refuses_it_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("+algo=vdn", "env=jaxmarl", "env.options={action_type: Continuous}") == 2
    assert "the actions are continuous; only discrete ones are possible" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jaxmarl" else real(name))
    with pytest.raises(ConfigError, match=r"^env=jaxmarl is not allowed: it needs jaxmarl, [^\n]*jaxmarl[^\n]*$"):
        make()


def test_jaxmarl_is_imported_late_and_in_silence() -> None:
    code = """
import sys
from wqmix_jax.envs.jaxmarl import JaxMARL
assert "jaxmarl" not in sys.modules
JaxMARL(name="overcooked", episode_limit=None, reward="mean", options={})
assert "jaxmarl" in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SMALL = ("num_seeds=2", "total_env_steps=60", "eval_interval=30", "eval_episodes=2", "algo.batch_size=2")
NARROW = ("algo.buffer_size=4", "algo.hidden_dim=8", "env.episode_limit=10")


@pytest.mark.slow
@pytest.mark.parametrize("name", [SPEAKER, *SIZES])
def test_a_game_trains_for_a_few_iterations(name: str) -> None:
    _, records = train_seeds(load_config("+algo=vdn", "env=jaxmarl", f"env.name={name}", *SMALL, *NARROW), [0, 1])
    assert {record["seed"] for record in records if record["kind"] == "eval"} == {0, 1}
    assert any("loss" in record for record in records)
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)
