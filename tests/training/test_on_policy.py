"""Algorithms that learn from the episodes just played: their batches, targets, moments and options."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algos.test_ppo import gae
from tests.environments import Clock, tiny_ppo, tiny_run, tiny_wqmix
from tests.training.test_compiled_loop import trained
from wqmix_jax import load_config
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.training import batch_gradients
from wqmix_jax.training.compiled_loop import disjoint_indices, make_trainer
from wqmix_jax.training.devices import seed_sharding
from wqmix_jax.training.learner import apply_gradients, init_learner
from wqmix_jax.training.replay import make_replay

ENV = Clock(episode_limit=4, ends_from=1)
LONG = Clock(episode_limit=32, ends_from=1)  # long enough for batches to be cut or packed


def on_policy_run(env=ENV, **changes):
    """Four episodes, two passes over them, in batches of two."""
    run = {"num_envs": 4, "updates_per_iteration": 4}
    return tiny_run(tiny_ppo(**changes), env, **run)


def test_each_pass_is_a_fresh_order_of_all_episodes_split_into_batches():
    config = on_policy_run()
    config = dataclasses.replace(
        config, num_envs=12, updates_per_iteration=9, algo=tiny_ppo(batch_size=4, buffer_size=12)
    )
    keys = jax.random.split(jax.random.key(0), 2)
    passes = []
    for first in (0, 9):  # two iterations
        batches = [
            np.array(disjoint_indices(config, keys, jnp.array([first, first + 40]) + index, jnp.int32(index)))
            for index in range(9)
        ]
        passes += [np.concatenate(batches[start : start + 3], axis=1) for start in (0, 3, 6)]
    for each in passes:
        np.testing.assert_array_equal(np.sort(each, axis=1), [range(12)] * 2)
    orders = {tuple(order) for each in passes for order in each.tolist()}
    assert len(orders) == 12  # every pass of every seed has its own


def test_the_replay_holds_the_episodes_just_played_and_no_others():
    config = on_policy_run()
    trainer = make_trainer(config)
    assert make_trainer(tiny_run(tiny_wqmix(buffer_size=4), ENV)).replay_bytes == trainer.replay_bytes
    state, before = trainer.init([0]), None
    for _ in range(3):
        state, record = trainer.train_chunk(state)
        rows = np.array(state.replay.experience[0, 0])
        assert len(rows) == 4
        assert before is None or (rows != before).any(axis=1).all()
        assert record.updates.tolist() == [[4]]
        before = rows


def test_targets_are_the_parameters_that_played_whatever_the_interval():
    config = on_policy_run(target_update_interval=10**6, target_update_tau=0.5)
    trainer = make_trainer(config)
    state = trainer.init([0, 1])
    for _ in range(3):
        acting = jax.device_get(state.learner.params)
        state, _ = trainer.train_chunk(state)
        trees = acting, state.learner.target, state.learner.params
        for old, target, new in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_array_equal(old, target)
            assert (old != new).any()


def test_returns_are_standardised_by_all_that_were_played():
    """The moments are those of the lambda-returns of whole iterations, each counted once, by the values that played."""
    config = on_policy_run()
    trainer, returns, seen = make_trainer(config), [], []
    state = trainer.init([0])
    for _ in range(3):
        params, before = state.learner.params, jax.device_get(state.learner.moments["returns"])
        state, _ = trainer.train_chunk(state)
        batch = make_replay(ENV, buffer_size=4, batch_size=4).decode(state.replay.experience[0, 0], 4)
        [values] = config.algo.critic_values(batch, [], [jax.tree.map(lambda leaf: leaf[0], params["critic"])])
        values = np.array(values) * before.deviation[0] + before.mean[0]
        for row in range(4):
            length, ended = int(batch.mask[row].sum()), float(batch.discount[row].min()) == 0
            for agent in range(2):
                known = gae(
                    np.array(batch.reward[row]), values[row, :, agent],
                    length=length, bootstraps=not ended, gamma=0.9, lam=0.95,
                )  # fmt: skip
                returns += (known + values[row, :length, agent]).tolist()
        moments = jax.device_get(state.learner.moments["returns"])
        seen.append(sum(float(batch.mask[row].sum()) for row in range(4)))
        np.testing.assert_allclose(moments.mean[0], np.mean(returns), rtol=2e-3)
        np.testing.assert_allclose(moments.variance[0], np.var(returns), rtol=2e-2)
        np.testing.assert_allclose(moments.num_values[0], sum(seen), rtol=1e-3)


def learned(config, batches=None, platform=None, sharding=None, num_chunks=2):
    state, _ = trained(config, [0, 1], num_chunks, batches=batches, platform=platform, sharding=sharding)
    return jax.device_get(state.learner)


@pytest.mark.parametrize(("batches", "platform"), [("packed", "cpu"), ("bounded", "tpu"), ("cut", "cpu")])
def test_every_form_of_batches_learns_the_same(batches, platform, monkeypatch):
    monkeypatch.setattr(batch_gradients, "LARGE_TILE", 4)
    monkeypatch.setattr(batch_gradients, "SMALL_TILE", 2)
    config = on_policy_run(LONG, layer_norm=False)
    expected = learned(config, "whole", "cpu")
    for one, other in zip(*map(jax.tree.leaves, (learned(config, batches, platform), expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def test_devices_share_batches_and_statistics():
    """As `tests.training.test_compiled_loop` for other algorithms: to float tolerance."""
    config = on_policy_run(LONG, batch_size=4)
    sharding = seed_sharding(1, batch_size=4)
    assert sharding.num_devices > 1
    alone, _ = trained(config, [0], 2)
    shared, _ = trained(config, [0], 2, sharding=sharding)
    for one, other in zip(*map(jax.tree.leaves, (alone.learner, shared.learner)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def test_each_net_is_clipped_by_its_own_norm():
    algo = tiny_ppo(max_grad_norm=1.0, optimizer="rmsprop", lr=1.0, rms_decay=0.0, rms_eps=1e9)
    learner = init_learner(algo, {"agent": jnp.zeros(2), "critic": jnp.zeros(2)})
    grads = {"agent": jnp.array([0.0, 30.0]), "critic": jnp.array([0.6, 0.0])}
    stepped, norm = apply_gradients(algo, learner, grads, hyperparams(algo))
    np.testing.assert_allclose(norm, np.hypot(30, 0.6), rtol=1e-6)
    np.testing.assert_allclose(-1e9 * stepped.params["agent"], [0, 1], rtol=1e-4)
    np.testing.assert_allclose(-1e9 * stepped.params["critic"], [0.6, 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["algo.batch_size=5"], "algo.batch_size=5 is not allowed: PPO learns from the num_envs=16 episodes just"),
        (["algo.buffer_size=32"], "algo.buffer_size=32 is not allowed: PPO learns from the num_envs=16 episodes just"),
        (["algo.batch_size=8", "updates_per_iteration=5"], "updates_per_iteration=5 is not allowed: PPO learns from"),
        (["algo.epsilon_finish=0"], "algo.epsilon_finish=0 is not allowed"),
    ],
)
def test_other_batches_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as caught:
        load_config("+algo=mappo", *options)
    assert "\n" not in str(caught.value)


def test_the_replay_and_a_batch_are_as_large_as_an_iteration_unless_they_are_chosen():
    for options, expected in (
        ([], (16, 16, 16, 10)),
        (["num_envs=8"], (8, 8, 8, 10)),
        (["num_envs=8", "algo.batch_size=2", "updates_per_iteration=12"], (8, 2, 8, 12)),
    ):
        config = load_config("+algo=ippo", *options)
        sizes = config.num_envs, config.algo.batch_size, config.algo.buffer_size, config.updates_per_iteration
        assert sizes == expected
