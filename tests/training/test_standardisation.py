"""Scaled and standardised rewards and returns; `tests/training/test_compiled_loop.py` compares forms of batches."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock, tiny_run, tiny_wqmix
from tests.running import TINY, main
from tests.runs.test_checkpoints import assert_same_run
from tests.training.test_learner import CTX, KEY, batch_of, every_algorithm, params_and_target
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.ops.moments import Moments, add_moments, masked_moments, no_moments
from wqmix_jax.training.batch_gradients import standardised_inputs
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.learner import add_returns, init_learner


def test_moments_of_batches_are_those_of_all_values() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (4, size)).astype(np.float32) for size in (5, 1, 9)]
    masks = [(rng.random(batch.shape) < 0.7).astype(np.float32) for batch in batches]
    moments = no_moments()
    for batch, mask in zip(batches, masks, strict=True):
        moments = add_moments(moments, masked_moments(jnp.asarray(batch), jnp.asarray(mask)))
    real = np.concatenate([batch[mask > 0] for batch, mask in zip(batches, masks, strict=True)])
    np.testing.assert_allclose(moments, [len(real), real.mean(), real.var()], rtol=1e-4)
    np.testing.assert_allclose(add_moments(moments, masked_moments(jnp.ones(3), jnp.zeros(3))), moments, rtol=1e-6)


def test_equal_values_have_a_small_deviation_and_not_none() -> None:
    """So many that the start's 1e-4 values are lost in float32; -0.1 has no exact sum either."""
    for value in (0.0, -0.1, 100.0):
        batch = jnp.full((32, 200), value)
        moments = add_moments(no_moments(), masked_moments(batch, jnp.ones_like(batch)))
        standardised = (batch - moments.mean) / moments.deviation
        assert jnp.isfinite(standardised).all()
        assert jnp.abs(standardised).max() < 2


@pytest.mark.parametrize("spread", [0.0, 0.005])
def test_nearly_equal_targets_are_standardised_after_a_few_batches(spread: float) -> None:
    """Mean 100 and its square cancel in float32, which leaves too large a deviation at first."""
    learner = init_learner(tiny_wqmix(standardise_returns=True), {"x": jnp.zeros(1)})
    for seed in range(20):
        y = 100 + spread * jax.random.normal(jax.random.key(seed), (6400,))
        old = learner.moments["returns"]
        z = (y - old.mean) / old.deviation
        metrics = {"td_target_mean": z.mean(), "td_target_square_mean": jnp.square(z).mean()}
        learner = add_returns(learner, metrics, jnp.int32(6400))
    moments = learner.moments["returns"]
    assert jnp.isfinite(moments.deviation)
    np.testing.assert_allclose(moments.mean, 100, rtol=1e-4)
    assert moments.deviation < 0.1


def loss_with(algo: Any, moments: dict[str, Moments], batch: Any) -> tuple[Any, Any]:
    params, target = params_and_target(algo)
    noise = algo.sample_noise(KEY, batch)
    batch, hp = standardised_inputs(algo, moments, batch, hyperparams(algo))
    return algo.loss(params, target, batch, hp, CTX, noise)


@pytest.mark.parametrize("name", ["iql", "ow_qmix", "qtran", "masac"])
def test_a_loss_sees_scaled_or_standardised_rewards(name: str) -> None:
    plain, batch = every_algorithm()[name], batch_of([4, 2], [True, False])
    moments = {"rewards": Moments(jnp.float32(9), jnp.float32(0.5), jnp.float32(4))}
    scaled = dataclasses.replace(plain, reward_scale=10.0)
    for algo, given, reward in (
        (scaled, {}, batch.reward * 10),
        (dataclasses.replace(scaled, standardise_rewards=True), moments, (batch.reward - 0.5) / 2),
    ):
        loss, aux = loss_with(algo, given, batch)
        expected, its_aux = loss_with(plain, {}, batch._replace(reward=reward))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(aux.values["td_target"][0], its_aux.values["td_target"][0], rtol=1e-5)


@pytest.mark.parametrize("name", ["iql", "vdn", "qplex", "cw_qmix", "qtran", "resq", "powqmix", "dcg"])
@pytest.mark.parametrize(
    "returns", ["one_step", *(pytest.param(returns, marks=pytest.mark.slow) for returns in ("td_lambda", "q_lambda"))]
)
def test_networks_learn_standardised_returns_of_plain_rewards(name: str, returns: str) -> None:
    """With mean 3 and deviation 2: the value 3 + 2 V of the next state is bootstrapped from."""
    algo = dataclasses.replace(every_algorithm()[name], returns=returns, standardise_returns=True, td_lambda=0.5)
    batch = batch_of([1, 1], [False, True])
    moments = {"returns": Moments(jnp.float32(9), jnp.float32(3), jnp.float32(4))}
    _, aux = loss_with(algo, moments, batch)
    y, following = np.array(aux.values["td_target"]), np.array(aux.values["next_value"])
    reward = np.array(batch.reward)
    np.testing.assert_allclose(y[0, 0], (reward[0, 0] + 0.9 * (3 + 2 * following[0, 0]) - 3) / 2, rtol=1e-5)
    np.testing.assert_allclose(y[1, 0], np.broadcast_to((reward[1, 0] - 3) / 2, y[1, 0].shape), rtol=1e-5)


def test_targets_enter_the_moments_as_they_were_before() -> None:
    """Standardised targets 1 and 3 are 5 and 9 for mean 3 and deviation 2: mean 7, variance 4."""
    learner = init_learner(tiny_wqmix(standardise_returns=True), {"x": jnp.zeros(1)})
    start = Moments(jnp.float32(2), jnp.float32(3), jnp.float32(4))
    learner = learner._replace(moments={"returns": start})
    metrics = {"td_target_mean": jnp.float32(2), "td_target_square_mean": jnp.float32(5)}
    moments = add_returns(learner, metrics, jnp.int32(2)).moments["returns"]
    np.testing.assert_allclose(moments, [4, 5, (4 + 4) / 2 + 4], rtol=1e-6)


def test_a_run_counts_every_replayed_step_and_only_while_it_learns() -> None:
    """Clock's reward of step t is t + 1: 1 to 4, all equally often in episodes of four steps."""
    algo = tiny_wqmix(standardise_rewards=True, standardise_returns=True)
    trainer = make_trainer(tiny_run(algo, Clock(episode_limit=4, ends_from=9), updates_per_iteration=2))
    state = trainer.init([0, 1])
    for num_chunks in range(4):
        moments, calls = state.learner.moments, 2 * max(0, num_chunks - 1)
        count = calls * algo.batch_size * 4
        np.testing.assert_allclose(moments["rewards"].num_values, [count + 1e-4] * 2, rtol=1e-6)
        np.testing.assert_allclose(moments["returns"].num_values, [count + 1e-4] * 2, rtol=1e-6)
        if calls:
            np.testing.assert_allclose(moments["rewards"].mean, [2.5] * 2, rtol=1e-4)
            np.testing.assert_allclose(moments["rewards"].variance, [1.25] * 2, rtol=1e-4)
        state, record = trainer.train_chunk(state)
        assert record.episode_return.tolist() == [[10, 10]]
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), state.learner.moments)))


@pytest.mark.slow
def test_a_schedule_that_is_made_longer_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, option, is_reported in (
        ("linear", "algo.lr_schedule=linear", True),
        ("constant", "algo.lr_schedule=constant", False),
    ):
        run_dir = tmp_path / name
        assert main(*TINY, option, "total_env_steps=6", f"run_dir={run_dir}") == 0
        capfd.readouterr()
        assert main(f"resume={run_dir}", "total_env_steps=8") == 0
        warning = "warning: algo.lr_schedule and algo.importance_exponent reach their end at total_env_steps"
        assert (warning in capfd.readouterr().err) == is_reported


@pytest.mark.slow
def test_a_run_continues_exactly(tmp_path: Path) -> None:
    options = ["algo.standardise_rewards=true", "algo.standardise_returns=true", "algo.optimizer=adam"]
    options += ["algo.lr_schedule=cosine", "algo.target_update_tau=0.05", "checkpoint.keep=9"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main(*TINY, *options, f"run_dir={straight}") == 0
    assert main(*TINY, *options, f"run_dir={resumed}") == 0
    newest = max((resumed / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for path in resumed.glob("checkpoints/*"):
        if path == newest:
            shutil.rmtree(path)
    assert main(f"resume={resumed}") == 0
    assert_same_run(resumed, straight)
