"""Algorithms that override `Algorithm.update`: several steps and optimisers in one learner call."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import WQMIX as VALUES
from tests.environments import Clock, tiny_powqmix, tiny_run, tiny_wqmix
from tests.running import last_checkpoint, main
from tests.training.test_compiled_loop import (
    BIG_BATCH,
    FIVE,
    LENGTHS,
    LONG,
    SHORT,
    batching_of,
    learned_from_lengths,
    learned_from_whole_batches,
    same,
    same_to_rounding,
    trained,
)
from wqmix_jax import load_metrics
from wqmix_jax.algos.base import Aux, Trained, hyperparams, is_mean_over_steps, skips_padding, takes_own_steps
from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.options import build, options
from wqmix_jax.training.compiled_loop import make_trainer, train_sharding
from wqmix_jax.training.learner import init_learner, optimizer_step

ENV = Clock(episode_limit=4, ends_from=1)
POWQMIX = tiny_powqmix(**FIVE, returns="td_lambda")


@options
class Overridden(WQMIX):
    """Overrides `update` by what it is by default."""

    def update(
        self, trained: Trained, target: Any, batch: Any, hp: Any, ctx: Any, noise: Any, step: Any
    ) -> tuple[Trained, Aux]:
        return super().update(trained, target, batch, hp, ctx, noise, step)


@options
class Twice(WQMIX):
    """Steps twice, along halves of the gradient at the start; the second is not clipped and has ten times the rate."""

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        return {"acting": ("agent", "mixer"), "central": ("q_star_mixer",)}

    def update(
        self, trained: Trained, target: Any, batch: Any, hp: Any, ctx: Any, noise: Any, step: Any
    ) -> tuple[Trained, Aux]:
        grads, aux = jax.grad(self.loss, has_aux=True)(trained.params, target, batch, hp, ctx, noise)
        trained, grad_norm = step(trained, grads, "acting")
        trained, _ = step(trained, grads, "central", lr=10 * hp.lr, clips=False)
        return trained, aux._replace(metrics=aux.metrics | {"grad_norm": grad_norm})


def tiny(algo: type, **changes: Any) -> Any:
    """One of the above with narrow nets."""
    return build("algo", {"_target_": f"{__name__}.{algo.__name__}", **VALUES, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam", "weight_decay": 0.1, "lr_schedule": "linear"},
        {"prioritised": True, "standardise_rewards": True, "standardise_returns": True, "target_update_tau": 0.1},
    ],
    ids=["default", "optimiser", "replay"],
)
def test_the_default_update_is_the_trainers_step(changes: dict[str, Any]) -> None:
    """Both seeds have the same targets, priorities, moments and records."""
    algos = tiny_wqmix(**changes), tiny(Overridden, **changes)
    ran = [trained(tiny_run(algo, ENV, updates_per_iteration=2), [0, 1], 6) for algo in algos]
    assert ran[0][1].updates.sum() > 8
    same_to_rounding(jax.tree.leaves(ran[0][0].learner), jax.tree.leaves(ran[1][0].learner))
    same_to_rounding(ran[0][1], ran[1][1])
    same_to_rounding(ran[0][0].priorities, ran[1][0].priorities)


def test_steps_of_some_nets_by_hand() -> None:
    """SGD as Adam with a large epsilon: the update is the gradient / 1000, so that lr 1000 steps by the gradient."""
    algo = tiny(Twice, optimizer="adam", adam_eps=1e3, adam_b1=0.0, lr=1e3, max_grad_norm=1.0)
    params = {net: {"w": jnp.array([1.0, 2.0])} for net in ("agent", "mixer", "q_star_agent", "q_star_mixer")}
    learner, hp = init_learner(algo, params), hyperparams(algo)
    assert learner.opt_state.keys() == {"acting", "central"}
    step = optimizer_step(algo, hp)
    grads = {"agent": {"w": jnp.array([3.0, 0])}, "mixer": {"w": jnp.array([0, 4.0])}}
    grads |= {net: {"w": jnp.array([6.0, 8.0])} for net in ("q_star_agent", "q_star_mixer")}
    first, norm = step(Trained(learner.params, learner.opt_state), grads, "acting")
    np.testing.assert_allclose(norm, 5.0)
    second, norm = step(first, grads, "central", lr=jnp.float32(100), clips=False)
    np.testing.assert_allclose(norm, 10.0)
    known = {"agent": [1 - 0.6, 2], "mixer": [1, 2 - 0.8], "q_star_agent": [1, 2], "q_star_mixer": [1 - 0.6, 2 - 0.8]}
    for net, expected in known.items():
        np.testing.assert_allclose(second.params[net]["w"], expected, rtol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, first.opt_state["central"], learner.opt_state["central"])
    jax.tree.map(np.testing.assert_array_equal, second.opt_state["acting"], first.opt_state["acting"])


def test_several_optimisers_in_a_run() -> None:
    state, _ = trained(tiny_run(tiny(Twice), ENV), [0, 1], 6)
    first = make_trainer(tiny_run(tiny(Twice), ENV)).init([0, 1])
    same(first.learner.params["q_star_agent"], state.learner.params["q_star_agent"])
    for net in ("agent", "mixer", "q_star_mixer"):
        assert all(
            (one != two).any()
            for one, two in zip(
                *map(jax.tree.leaves, (first.learner.params[net], state.learner.params[net])), strict=True
            )
        )


@pytest.mark.parametrize(
    ("platform", "batches", "lengths"),
    [
        pytest.param("cpu", "cut", SHORT, marks=pytest.mark.slow),
        ("tpu", "bounded", LENGTHS),
        pytest.param("gpu", "bounded", SHORT, marks=pytest.mark.slow),
        pytest.param("tpu", "cut", LENGTHS, marks=pytest.mark.slow),
    ],
)
def test_every_form_of_a_batch_teaches_the_same(platform: str, batches: Any, lengths: Any) -> None:
    expected = learned_from_whole_batches(POWQMIX, lengths)
    same_to_rounding(learned_from_lengths(POWQMIX, batches, platform, lengths), expected)


def test_batches_are_neither_packed_nor_shared() -> None:
    assert takes_own_steps(POWQMIX)
    assert skips_padding(POWQMIX)
    assert not is_mean_over_steps(POWQMIX)
    assert not skips_padding(tiny(Overridden))  # its loss is marked, its update isn't
    assert batching_of(POWQMIX, platform="cpu").tiles is None
    assert batching_of(POWQMIX, platform="tpu").is_bounded
    assert not batching_of(tiny(Overridden), platform="tpu").is_bounded
    with pytest.raises(ValueError, match="batches=packed is not allowed: POWQMIX has its own `update`"):
        make_trainer(tiny_run(POWQMIX, LONG), batches="packed")
    assert len(train_sharding(tiny_run(tiny_powqmix(**BIG_BATCH), ENV), 1).device_set) == 1


@pytest.mark.slow
def test_seeds_learn_alone_what_they_learn_together() -> None:
    """They take their first call, with twice the steps of Q_r, in different iterations."""
    config = tiny_run(tiny_powqmix(), ENV)
    together, _ = trained(config, [3, 4], 8)
    for index, seed in enumerate((3, 4)):
        alone, _ = trained(config, [seed], 8)
        same_to_rounding(alone.learner, jax.tree.map(lambda leaf, at=index: leaf[at : at + 1], together.learner))


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    run = ("+algo=powqmix", "env=matrix_game", "algo.batch_size=3", "algo.buffer_size=6", "num_seeds=2")
    run += ("algo.hidden_dim=4", "algo.recognizer_hypernet_dim=4", "eval_interval=4", "eval_episodes=2")
    run += ("logger.progress=false", "algo.no_weighted_steps=0", "checkpoint.every=1")
    assert main(*run, "total_env_steps=16", f"run_dir={tmp_path / 'whole'}") == 0
    assert main(*run, "total_env_steps=8", f"run_dir={tmp_path / 'cut'}") == 0
    assert main(f"resume={tmp_path / 'cut'}", "total_env_steps=16") == 0
    one, two = (last_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    arrays = [name for name, value in one.items() if isinstance(value, np.ndarray)]
    assert any("opt_state" in name and "recognizer" in name for name in arrays)
    for name in arrays:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    records = [load_metrics(tmp_path / name, kind="train")[-1] for name in ("whole", "cut")]
    assert records[0]["recognizer_loss"] == records[1]["recognizer_loss"] > 0
