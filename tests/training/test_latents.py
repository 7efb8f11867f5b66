"""A latent drawn once per episode: through play, replay, packed rows and saved policies."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algos.test_algorithms import PREDATOR_PREY
from tests.environments import TINY, Clock, Counting, by_seed
from tests.running import main, timeless
from wqmix_jax import evaluate, load_metrics, load_policies
from wqmix_jax.algos.base import AgentInputs, Context, hyperparams, latent_template
from wqmix_jax.errors import ConfigError
from wqmix_jax.ops.byte_rows import row_bytes
from wqmix_jax.options import build, options
from wqmix_jax.runs.saved_policies import GreedyPolicy, play_episode
from wqmix_jax.training.replay import Replay, make_replay
from wqmix_jax.training.rollout import greedy_episodes, rollout, stored_template
from wqmix_jax.training.row_packing import first_fit_rows
from wqmix_jax.types import Array, StoredEpisode

CLOCK = Clock(episode_limit=6, ends_from=1)


@options
class Conductor(Counting):
    """Draws a number of 0 to 999 for each episode, and keeps two of its first state; all agents play it modulo 3."""

    def draw_latent(self, params: Any, state: Array, hp: Any, ctx: Context, key: Any) -> Any:
        number = jax.random.randint(key, state.shape[:-1], 0, 1000)
        return {
            "number": number.astype(jnp.uint16),
            "first": jnp.stack([state.sum(-1), ctx.epsilon + state[..., 2]], -1),
        }

    def act(self, params: Any, carry: Array, inputs: AgentInputs, hp: Any, ctx: Context, key: Any) -> Any:
        action = inputs.latent["number"].astype(jnp.int32)[..., None] % 3
        return jnp.broadcast_to(action, inputs.last_action.shape), carry + 1


def conductor() -> Conductor:
    return build("algo", {"_target_": "tests.training.test_latents.Conductor", **TINY})


def play(num_seeds: int = 2, num_envs: int = 16, epsilon: float = 0.25) -> StoredEpisode:
    algo = conductor()
    params = jax.vmap(lambda key: algo.init(key, CLOCK.spec))(jax.random.split(jax.random.key(0), num_seeds))
    ctx = Context(jnp.full(num_seeds, epsilon), jnp.zeros(num_seeds, jnp.int32), jnp.zeros(num_seeds, jnp.int32))
    hp = jax.tree.map(lambda value: jnp.full(num_seeds, value), hyperparams(algo))
    keys = jax.random.split(jax.random.key(1), num_seeds)
    return jax.jit(lambda: rollout(CLOCK, algo, params, hp, ctx, keys, num_envs=num_envs).episodes)()


def filled(episodes: StoredEpisode) -> tuple[Replay, Array]:
    """The replay, and the rows of the first seed's episodes."""
    replay = make_replay(CLOCK, buffer_size=16, batch_size=16, latent=latent_template(conductor(), CLOCK.spec))
    first_seed = jax.tree.map(lambda leaf: leaf[0], episodes)
    return replay, replay.add(replay.init(), first_seed, jnp.bool_(True)).experience[0]


def test_a_latent_is_constant_within_an_episode_and_shared_by_its_agents() -> None:
    episodes = play()
    number = np.array(episodes.latent["number"])
    assert (number.shape, number.dtype) == ((2, 16), np.uint16)
    real = np.arange(6) < np.array(episodes.length)[..., None]
    played = np.where(real[..., None], np.array(episodes.joint_action), (number % 3)[..., None, None])
    np.testing.assert_array_equal(played, np.broadcast_to((number % 3)[..., None, None], played.shape))
    assert len(set(np.array(episodes.length).ravel().tolist())) > 1


def test_latents_differ_over_episodes_and_seeds_and_repeat_with_the_key() -> None:
    first, second = np.array(play().latent["number"])
    assert len(set(first.tolist())) > 12
    assert (first != second).sum() > 12
    np.testing.assert_array_equal(play().latent["number"][0], first)


def test_a_latent_sees_the_first_state_and_the_context() -> None:
    """The state of the clock at time 0 is (0, 0, 1)."""
    np.testing.assert_array_equal(play().latent["first"], np.broadcast_to([1.0, 1.25], (2, 16, 2)))


def test_greedy_episodes_draw_latents_too() -> None:
    """An episode of action 2 of agent 0 ends after two steps; a third of the latents are 2 modulo 3."""
    algo = conductor()
    params = by_seed(algo.init(jax.random.key(0), CLOCK.spec))
    hp, ctx = by_seed((hyperparams(algo), Context(jnp.float32(1), jnp.int32(0), jnp.int32(0))))
    keys = jax.random.split(jax.random.key(3), 1)
    figures = jax.jit(lambda: greedy_episodes(CLOCK, algo, params, hp, ctx, keys, num_episodes=60))()
    assert set(np.array(figures.episode_length).ravel().tolist()) == {2.0, 6.0}
    assert 8 < (np.array(figures.episode_length) == 2).sum() < 32


def test_the_replay_gives_each_place_the_latent_of_its_episode() -> None:
    episodes = play()
    replay, rows = filled(episodes)
    assert replay.row_bytes == row_bytes(stored_template(CLOCK)) + 2 + 2 * 4
    number, length = np.array(episodes.latent["number"][0]), np.array(episodes.length[0])
    for num_steps in (4, 6, 9):
        batch = replay.decode(rows, num_steps)
        is_there = np.arange(num_steps + 1)[None] <= length[:, None]
        np.testing.assert_array_equal(batch.latent["number"], np.where(is_there, number[:, None], 0))
        np.testing.assert_array_equal(batch.latent["first"][..., 1], np.where(is_there, 1.25, 0))


def test_packed_rows_give_each_place_the_latent_of_its_episode() -> None:
    episodes = play()
    replay, rows = filled(episodes)
    layout, num_rows = first_fit_rows(replay.lengths(rows), 6)
    assert int(num_rows) < 16
    packed = jax.jit(replay.decode_packed)(rows, layout)
    number = np.array(packed.latent["number"])
    per_row = np.array(episodes.latent["number"][0])[np.array(layout.episode)]
    np.testing.assert_array_equal(number, np.where(layout.filled, per_row, 0))
    real = np.array(packed.mask) > 0
    np.testing.assert_array_equal(np.array(packed.joint_action)[real][:, 1], number[:, :-1][real] % 3)


def test_algorithms_without_a_latent_store_and_see_none() -> None:
    algo = build("algo", {"_target_": "tests.environments.Counting", **TINY})
    assert latent_template(algo, CLOCK.spec) == ()
    replay = make_replay(CLOCK, buffer_size=2, batch_size=1)
    assert replay.row_bytes == row_bytes(stored_template(CLOCK))
    assert replay.decode(replay.init().experience[0], 6).latent == ()


def policy_of(algo: Any) -> GreedyPolicy:
    return GreedyPolicy(algo, algo.init(jax.random.key(0), CLOCK.spec), CLOCK.spec, "highest")


@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
def test_a_saved_policy_keeps_the_latent_that_was_drawn_or_chosen(batch_shape: tuple[int, ...]) -> None:
    policy = policy_of(conductor())
    state = jnp.ones((*batch_shape, 3))
    drawn = policy.draw_latent(state, jax.random.key(4))
    chosen = drawn | {"number": jnp.full(batch_shape, 4, jnp.uint16)}
    obs, avail = jnp.zeros((*batch_shape, 2, 2)), jnp.ones((*batch_shape, 2, 3), bool)
    for latent in (drawn, chosen):
        carry = policy.initial_carry(batch_shape, latent=latent)
        for _ in range(2):
            action, carry = policy.act(carry, obs, avail)
            expected = np.array(latent["number"])[..., None] % 3
            np.testing.assert_array_equal(action, np.broadcast_to(expected, action.shape))


def test_a_policy_without_its_latent_is_refused() -> None:
    policy, plain = (
        policy_of(conductor()),
        policy_of(build("algo", {"_target_": "tests.environments.Counting", **TINY})),
    )
    with pytest.raises(ConfigError, match=r"latent=\(\) is not allowed: Conductor needs .*uint16\[5\].*draw_latent"):
        policy.initial_carry((5,))
    with pytest.raises(ConfigError, match="Conductor needs"):
        policy.initial_carry((5,), latent=policy.draw_latent(jnp.ones((4, 3)), jax.random.key(0)))
    assert plain.draw_latent(jnp.ones(3), jax.random.key(0)) == ()
    with pytest.raises(ConfigError, match=r"Counting needs \(\)"):
        plain.initial_carry(latent=jnp.uint8(1))


def test_one_episode_of_a_policy_has_one_latent_that_depends_on_the_key() -> None:
    policy, played = policy_of(conductor()), []
    for seed in range(6):
        moments = play_episode(CLOCK, policy, jax.random.key(seed))
        actions = {tuple(np.array(moment.joint_action).tolist()) for moment in moments[1:]}
        assert len(actions) == 1
        played += actions
    assert len(set(played)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["maven", "cen_iql"])
def test_a_run_whose_episodes_have_latents_resumes_and_is_evaluated(
    algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resumed run has the records of the uninterrupted one: latents come from keys, and are in the replay."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (f"+algo={algo}", *PREDATOR_PREY, "checkpoint.every=15")
    assert main(*options, "total_env_steps=60", f"run_dir={whole}") == 0
    assert main(*options, f"run_dir={parts}") == 0
    assert main(f"resume={parts}", "total_env_steps=60") == 0
    records, resumed = timeless(load_metrics(whole)), timeless(load_metrics(parts))
    assert [line for line in records if line in resumed] == records
    capsys.readouterr()
    evaluate.main([f"run_dir={whole}", "policy=last", "episodes=2"])
    assert "seed 1" in capsys.readouterr().out
    env, policies = load_policies(whole)
    assert play_episode(env, policies["0"], jax.random.key(0))
