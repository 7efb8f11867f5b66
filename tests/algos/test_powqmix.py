"""POWQMIX: its recogniser and weights by hand, and the steps that one learner call takes."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import tiny_powqmix
from tests.running import main
from tests.training.test_learner import batch_of, params_and_target
from wqmix_jax import load_metrics
from wqmix_jax.algos.base import Context, Trained, hyperparams
from wqmix_jax.networks.recognizer import Recognizer
from wqmix_jax.ops import weighting
from wqmix_jax.training.learner import apply_gradients, init_learner, optimizer_step
from wqmix_jax.types import Episode, PyTree

BATCH = ([4, 3, 2, 4], [True, False, True, False])
AFTER_FIRST = Context(jnp.float32(0), jnp.int32(10), jnp.int32(1))
"""The second learner call, after 10 environment steps."""


@functools.partial(jax.jit, static_argnums=0)
def loss_of(algo: Any, params: PyTree, target: PyTree, batch: Episode, ctx: Context = AFTER_FIRST) -> Any:
    return algo.loss(params, target, batch, hyperparams(algo), ctx, ())


@functools.partial(jax.jit, static_argnums=0)
def updated(algo: Any, trained: Trained, target: PyTree, batch: Episode, ctx: Context = AFTER_FIRST) -> Any:
    hp = hyperparams(algo)
    return algo.update(trained, target, batch, hp, ctx, (), optimizer_step(algo, hp))


def start(algo: Any) -> tuple[Trained, PyTree]:
    """Online parameters with the optimisers' first state, and other target parameters."""
    params, target = params_and_target(algo)
    learner = init_learner(algo, params)
    return Trained(learner.params, learner.opt_state), target


def test_the_recognizer_by_hand() -> None:
    """Two agents that are 1 and 2 below their best; |W| is ((1, 3), (2, 0)) and |w| (5, 7), or three times as large."""
    net, state, advantages = Recognizer(v_dim=1, hypernet_dim=1, embed_dim=2), jnp.ones((1, 3)), -jnp.array([[1.0, 2]])
    actions = jax.nn.one_hot(jnp.array([[0, 1]]), 2)
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), advantages, actions, state)["params"])
    params["hyper_w_1"]["layer_2"]["bias"] = jnp.array([1.0, -3.0, -2.0, 0.0])
    params["hyper_w_final"]["layer_2"]["bias"] = jnp.array([-5.0, 7.0])
    params["v"]["layer_2"]["bias"] = jnp.array([11.0])
    weights = 1 * 5 + 3 * 7, 2 * 5
    for factor in (1, 3):  # the last of [state, actions] is agent 1's action 1
        v, advantage = net.apply({"params": params}, advantages, actions, state)
        np.testing.assert_allclose(v, [11])
        np.testing.assert_allclose(advantage, [-factor * (1 * weights[0] + 2 * weights[1])], rtol=1e-6)
        for layer in ("layer_0", "layer_1"):
            params["hyper_w_final"][layer]["kernel"] = params["hyper_w_final"][layer]["kernel"].at[-1].set(1.0)
        params["hyper_w_final"]["layer_2"]["kernel"] = jnp.array([[-10.0, 14.0]])


def test_potentially_optimal_joint_actions_are_those_less_than_the_threshold_below_the_greedy_one() -> None:
    advantage = -jnp.array([0.0, 0.5, 0.99, 1.0, 1.5])
    np.testing.assert_array_equal(
        weighting.potentially_optimal(advantage, jnp.float32(1), jnp.float32(0)), [1, 1, 1, 0, 0]
    )
    np.testing.assert_allclose(
        weighting.potentially_optimal(advantage, jnp.float32(0.6), jnp.float32(0.25)), [1, 1, 0.25, 0.25, 0.25]
    )


def test_losses_by_hand() -> None:
    """Half of each mean square, over 13 real steps; weights 0 and 1, and the greedy joint action's is 1."""
    algo = tiny_powqmix()
    params, target = params_and_target(algo)
    batch = batch_of(*BATCH)
    loss, aux = loss_of(algo, params, target, batch)
    values, mask, y = jax.tree.map(np.array, aux.values), np.array(batch.mask), np.array(aux.values["td_target"])
    weights = (np.abs(values["q_r_advantage"]) < 0.02).astype(float)
    np.testing.assert_array_equal(values["weights"], weights)
    is_greedy = (np.array(batch.joint_action) == values["greedy_actions"][:, :-1]).all(-1)
    assert 0 < is_greedy.sum() < weights.sum() < weights.size
    np.testing.assert_array_equal(values["q_r_advantage"][is_greedy], 0)
    assert (values["q_r_advantage"][~is_greedy] < 0).all()

    def half_mean(error: Any) -> Any:
        return (error * mask).sum() / 13 / 2

    known = [half_mean(weights * (values["q_tot"] - y) ** 2), half_mean((values["q_star"] - y) ** 2)]
    known.append(half_mean((values["q_r"] - y) ** 2))
    names = "qmix_loss", "q_star_loss", "recognizer_loss"
    np.testing.assert_allclose([aux.metrics[name] for name in names], known, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(known), rtol=1e-5)


def test_all_weights_are_1_before_no_weighted_steps() -> None:
    for first, is_weighted in ((11, False), (10, True)):  # ten environment steps have been made
        algo = tiny_powqmix(no_weighted_steps=first)
        (trained, target), batch = start(algo), batch_of(*BATCH)
        weights = updated(algo, trained, target, batch)[1].values["weights"]
        assert (float(weights.min()) == 0) == is_weighted
        assert (weights == 1).any()
        assert weights.min() == 0 or (weights == 1).all()


def test_the_loss_of_each_net_moves_that_net_alone() -> None:
    algo = tiny_powqmix()
    params, target = params_and_target(algo)
    batch, hp = batch_of(*BATCH), hyperparams(algo)
    nets = {"qmix_loss": {"agent", "mixer"}, "q_star_loss": {"q_star_agent", "q_star_mixer"}}
    nets |= {"recognizer_loss": {"recognizer"}}

    @jax.jit
    def gradients(params: PyTree) -> Any:
        return jax.jacrev(lambda params: algo.loss(params, target, batch, hp, AFTER_FIRST, ())[1].metrics)(params)

    for name, expected in nets.items():
        found = gradients(params)[name]
        moved = {net for net in found if any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(found[net]))}
        assert moved == expected


@pytest.mark.parametrize(("call", "num_steps"), [(0, 6), (1, 3)])
def test_a_learner_call_trains_the_recognizer_first_and_weighs_by_the_new_one(call: int, num_steps: int) -> None:
    """Step by step with the plain loss: three steps of Q_r, six in the first call, then one of everything else."""
    algo = tiny_powqmix()
    (trained, target), batch, hp = start(algo), batch_of(*BATCH), hyperparams(algo)
    ctx = AFTER_FIRST._replace(learner_steps=jnp.int32(call))
    found, aux = updated(algo, trained, target, batch, ctx)
    params, states = trained.params, trained.opt_state
    plain = dataclasses.replace(algo, alpha=0.0)  # steps of a single optimiser, of some nets at a time
    gradient = jax.jit(jax.grad(lambda params: algo.loss(params, target, batch, hp, ctx, ())[0]))

    def stepped(name: str) -> PyTree:
        nets = algo.optimizers()[name]
        part, grads = ({net: tree[net] for net in nets} for tree in (params, gradient(params)))
        learner = init_learner(algo, params)._replace(params=part, opt_state=states[name])
        learner, _ = apply_gradients(plain, learner, grads, hp)
        return params | learner.params, states | {name: learner.opt_state}

    weights = [loss_of(algo, params, target, batch, ctx)[1].values["weights"]]
    for _ in range(num_steps):
        params, states = stepped("recognizer")
    _, expected = loss_of(algo, params, target, batch, ctx)
    params, states = stepped("factored")
    np.testing.assert_array_equal(aux.values["weights"], expected.values["weights"])
    assert (weights[0] != expected.values["weights"]).any()
    for mine, its in zip(
        jax.tree.leaves((found.params, found.opt_state)), jax.tree.leaves((params, states)), strict=True
    ):
        np.testing.assert_allclose(mine, its, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_a_sweep_over_the_threshold_compiles_once_and_changes_the_weights(tmp_path: Path) -> None:
    """From the command line: two thresholds as two members, and a run of each alone."""
    options = ("+algo=powqmix", "env=matrix_game", "algo.batch_size=4", "algo.buffer_size=8", "algo.hidden_dim=4")
    options += ("algo.no_weighted_steps=0", "total_env_steps=24", "eval_interval=8", "eval_episodes=2")
    options += ("logger.progress=false", "algo.recognizer_hypernet_dim=8", "algo.q_star_dim=8")
    assert main(*options, "sweep.threshold=[1e-6,1000.0]", f"run_dir={tmp_path / 'swept'}") == 0
    last = load_metrics(tmp_path / "swept", kind="train")[-2:]
    assert {record["algo.threshold"]: record["weight_mean"] for record in last}[1000.0] == 1
    assert {record["algo.threshold"]: record["weight_mean"] for record in last}[1e-6] < 1
