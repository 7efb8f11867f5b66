"""Algorithms that learn from the episodes just played: their batches, targets, moments and options."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algos.test_ppo import gae
from tests.environments import Clock, tiny_ppo, tiny_run, tiny_wqmix
from wqmix_jax import load_config
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.training.compiled_loop import disjoint_indices, make_trainer
from wqmix_jax.training.learner import apply_gradients, init_learner
from wqmix_jax.training.replay import make_replay

ENV = Clock(episode_limit=4, ends_from=1)


RUN = {"num_envs": 4, "updates_per_iteration": 4}
"""Four episodes, two passes over them, in batches of two."""


def test_each_pass_is_a_fresh_order_of_all_episodes_split_into_batches():
    config = tiny_run(tiny_ppo(batch_size=4, buffer_size=12), ENV, num_envs=12, updates_per_iteration=9)
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


def test_an_iteration_learns_from_what_its_parameters_have_just_played():
    """Three of them: the replay, the targets, and the moments of returns.

    The moments are those of the lambda-returns of whole iterations, each counted once, by the values that played.
    """
    config = tiny_run(tiny_ppo(target_update_interval=10**6, target_update_tau=0.5), ENV, **RUN)
    trainer, returns, rows = make_trainer(config), [], np.zeros((4, 1))
    assert make_trainer(tiny_run(tiny_wqmix(buffer_size=4), ENV)).replay_bytes == trainer.replay_bytes
    decode = make_replay(ENV, buffer_size=4, batch_size=4).decode
    state = trainer.init([0])
    for _ in range(3):
        played, moments, before = jax.device_get((state.learner.params, state.learner.moments["returns"], rows))
        state, record = trainer.train_chunk(state)
        assert record.updates.tolist() == [[4]]
        rows = np.array(state.replay.experience[0, 0])
        assert len(rows) == 4
        assert (rows != before).any(axis=1).all()
        for old, target, new in zip(
            *map(jax.tree.leaves, (played, state.learner.target, state.learner.params)), strict=True
        ):
            np.testing.assert_array_equal(old, target)
            assert (old != new).any()
        batch = decode(jnp.asarray(rows), 4)
        [values] = config.algo.critic_values(batch, [], [jax.tree.map(lambda leaf: leaf[0], played["critic"])])
        values = np.array(values) * moments.deviation[0] + moments.mean[0]
        for row in range(4):
            length, ended = int(batch.mask[row].sum()), float(batch.discount[row].min()) == 0
            for agent in range(2):
                known = gae(
                    np.array(batch.reward[row]), values[row, :, agent],
                    length=length, bootstraps=not ended, gamma=0.9, lam=0.95,
                )  # fmt: skip
                returns += (known + values[row, :length, agent]).tolist()
        moments = jax.device_get(state.learner.moments["returns"])
        np.testing.assert_allclose(moments.mean[0], np.mean(returns), rtol=2e-3)
        np.testing.assert_allclose(moments.variance[0], np.var(returns), rtol=2e-2)
        np.testing.assert_allclose(moments.num_values[0], len(returns) / 2, rtol=1e-3)  # steps, of two agents


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
