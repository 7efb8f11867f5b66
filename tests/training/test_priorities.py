"""Prioritised replay: priorities and draws by hand, importance weights in every loss, runs."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock, tiny_run, tiny_wqmix
from tests.running import ROOT, TINY, main
from tests.runs.test_checkpoints import assert_same_run
from tests.training.test_learner import CTX, KEY, batch_of, every_algorithm, params_and_target
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.training import compiled_loop
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.priorities import Priorities, add_episodes, draw_episodes, no_priorities, set_priorities

ONES = jnp.float32(1)


def test_draws_are_proportional_one_from_each_share() -> None:
    """A quarter and three quarters of all; for beta 1 the weights are 1/p, divided by the largest."""
    priorities = Priorities(jnp.array([1.0, 3.0, 0.0, 0.0]), jnp.float32(3))
    for seed in range(5):
        draw = draw_episodes(priorities, jax.random.key(seed), 4, ONES)
        assert draw.indices.tolist() == [0, 1, 1, 1]
        np.testing.assert_allclose(draw.importance, [1, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    half = draw_episodes(priorities, jax.random.key(0), 4, jnp.float32(0.5))
    np.testing.assert_allclose(half.importance[1], 3**-0.5, rtol=1e-6)
    many = draw_episodes(priorities, jax.random.key(0), 1000, ONES).indices
    assert int((many == 0).sum()) == 250


def test_a_draw_from_an_empty_replay_is_finite() -> None:
    draw = draw_episodes(no_priorities(4), jax.random.key(0), 3, ONES)
    assert draw.indices.tolist() == [0, 0, 0]
    assert jnp.isfinite(draw.importance).all()


def test_new_episodes_get_the_largest_priority() -> None:
    priorities = Priorities(jnp.array([1.0, 2.0, 0.0]), jnp.float32(5))
    indices = jnp.array([2, 0])
    assert add_episodes(priorities, indices, jnp.bool_(True)).powers.tolist() == [5, 2, 5]
    assert add_episodes(priorities, indices, jnp.bool_(False)).powers.tolist() == [1, 2, 0]


def test_priorities_by_formula() -> None:
    """Errors of 8 over 4 steps: 8 / 2 = 4, to the power of 1/2."""
    priorities = Priorities(jnp.array([1.0, 1.0, 1.0]), jnp.float32(1))
    new = set_priorities(priorities, jnp.array([2, 0]), jnp.array([8.0, 0.5]), jnp.array([4, 1]), 0.5)
    np.testing.assert_allclose(new.powers, [0.5**0.5, 1, 2], rtol=1e-5)
    np.testing.assert_allclose(new.largest, 2, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["iql", "hysteretic", "vdn", "qplex", "qtran", "ow_qmix", "cw_qmix", "qmix_cw", "resq", "powqmix", "dcg"]
)
def test_a_loss_weighs_episodes(name: str) -> None:
    """Its value is the sum over episodes of weight times loss times steps, divided by all steps."""
    made = every_algorithm()
    algo = made["iql"] if name == "hysteretic" else made[name]
    algo = dataclasses.replace(algo, weighting="optimistic", alpha=0.1) if name == "hysteretic" else algo
    params, target = params_and_target(algo)
    batch = batch_of([4, 2], [True, False])

    def loss(batch: Any) -> Any:
        noise = algo.sample_noise(KEY, batch)
        return algo.loss(params, target, batch, hyperparams(algo), CTX, noise)[0]

    alone = [loss(jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)) for row in (0, 1)]
    importance = jnp.broadcast_to(jnp.array([[0.25], [1.0]]), batch.mask.shape)
    np.testing.assert_allclose(
        loss(batch._replace(importance=importance)), (0.25 * 4 * alone[0] + 2 * alone[1]) / 6, rtol=1e-5
    )


PRIORITISED = {"prioritised": True, "priority_exponent": 1.0, "importance_exponent": 1.0}


def trained(batches: Any, num_chunks: int = 5, seeds: Any = (0, 1), sharding: Any = None, **changes: Any) -> Any:
    """A run of two seeds whose episodes take 3 to 32 steps."""
    algo = tiny_wqmix(batch_size=4, buffer_size=5, **PRIORITISED, **changes)
    env = Clock(episode_limit=32, ends_from=2)
    config = tiny_run(algo, env, updates_per_iteration=2, num_envs=2)
    trainer = make_trainer(config, batches=batches, sharding=sharding)
    state = trainer.init(list(seeds))
    for _ in range(num_chunks):
        state, _ = trainer.train_chunk(state)
    return state


@pytest.mark.slow
def test_every_form_of_a_batch_finds_the_same_priorities() -> None:
    whole = trained("whole")
    assert (whole.priorities.powers > 0).all()
    assert len(np.unique(whole.priorities.powers)) > 5
    for batches in ("packed", "bounded"):
        state = trained(batches)
        for mine, its in zip(*map(jax.tree.leaves, (state.priorities, whole.priorities)), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-3)
        for mine, its in zip(*map(jax.tree.leaves, (state.learner, whole.learner)), strict=True):
            np.testing.assert_allclose(mine, its, rtol=5e-3, atol=1e-5)


def test_importance_weights_rise_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.4 at the start to 1 at the end, in the middle 0.7."""
    seen = []

    def spied(*args: Any, beta: Any, **options: Any) -> Any:
        jax.debug.callback(lambda beta: seen.append(float(beta)), beta)
        return draw_episodes(*args, beta=beta, **options)

    monkeypatch.setattr(compiled_loop, "draw_episodes", spied)
    algo = tiny_wqmix(prioritised=True, importance_exponent=0.4)
    config = tiny_run(algo, Clock(episode_limit=4, ends_from=9), total_env_steps=16)
    trainer = make_trainer(config)
    state = trainer.init([0])
    for _ in range(4):
        state, _ = trainer.train_chunk(state)
    jax.block_until_ready(state)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [0.7, 0.85, 1], rtol=1e-6)  # at 8, 12 and 16 steps


@pytest.mark.slow
def test_devices_that_share_a_batch_find_the_same_priorities_and_moments() -> None:
    """Two devices learn from a part of each batch; the numbers are those of one."""
    code = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from tests.training.test_priorities import trained
options = dict(standardise_rewards=True, standardise_returns=True)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 2), ("seeds", "batch"))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("seeds"))
for batches in ("packed", "cut"):
    one, two = (trained(batches, seeds=[0], sharding=each, **options) for each in (None, sharding))
    for part in ("priorities", "learner"):
        for mine, its in zip(*(jax.tree.leaves(getattr(state, part)) for state in (one, two)), strict=True):
            np.testing.assert_allclose(np.array(mine), np.array(its), rtol=5e-3, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_seeds_that_do_not_learn_keep_their_priorities() -> None:
    """One iteration stores two of the four episodes that a batch needs."""
    state = trained("packed", num_chunks=1)
    assert state.priorities.powers.tolist() == [[1, 1, 0, 0, 0]] * 2
    assert state.priorities.largest.tolist() == [1, 1]


def test_uniform_replay_has_no_priorities() -> None:
    trainer = make_trainer(tiny_run(tiny_wqmix(), Clock(episode_limit=4, ends_from=9)))
    assert trainer.init([0]).priorities == ()


def test_a_prioritised_run_continues_exactly(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for run_dir in (straight, resumed):
        assert main(*TINY, "algo.prioritised=true", "checkpoint.keep=9", f"run_dir={run_dir}") == 0
    newest = max((resumed / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    assert main(f"resume={resumed}") == 0
    assert_same_run(resumed, straight)
