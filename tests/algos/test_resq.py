"""ResQ: each of its losses by hand from the values that it reports, and which net each one moves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock, tiny_resq
from tests.running import main
from tests.training.test_learner import CTX, batch_of, params_and_target
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.types import Episode, PyTree

LENGTHS, ENDS = [4, 3, 2, 4], [True, False, True, False]


@functools.partial(jax.jit, static_argnums=0)
def loss_of(algo: Any, params: PyTree, target: PyTree, batch: Episode) -> Any:
    return algo.loss(params, target, batch, hyperparams(algo), CTX, ())


def half_greedy(algo: Any, params: PyTree, target: PyTree) -> Episode:
    """A batch whose even steps are greedy, and whose odd ones aren't, by one agent alone."""
    batch = batch_of(LENGTHS, ENDS)
    greedy = loss_of(algo, params, target, batch)[1].values["greedy_actions"][:, :-1]
    for _ in range(6):  # the agents see their last action, so that what is greedy depends on what was taken
        joint_action = greedy.at[:, 1::2, 0].set((greedy[:, 1::2, 0] + 1) % 3)
        batch = batch._replace(joint_action=joint_action)
        greedy = loss_of(algo, params, target, batch)[1].values["greedy_actions"][:, :-1]
    return batch


def test_the_greedy_joint_action_has_no_residual() -> None:
    algo = tiny_resq()
    params, target = params_and_target(algo)
    batch = half_greedy(algo, params, target)
    loss, aux = loss_of(algo, params, target, batch)
    values, mask = jax.tree.map(np.array, aux.values), np.array(batch.mask)
    np.testing.assert_array_equal(values["residual_weights"], np.tile([0.0, 1.0, 0.0, 1.0], (4, 1)))
    assert (np.abs(values["residual"]) > 1e-3).all()
    error = values["q_tot"] - values["td_target"]
    error[:, 1::2] += values["residual"][:, 1::2]
    qmix_loss = ((error * mask) ** 2).sum() / 13
    q_star_loss = (((values["q_star"] - values["td_target"]) * mask) ** 2).sum() / 13
    sign_loss = ((np.maximum(values["residual"], 0) * mask) ** 2).sum() / 13  # greedy or not
    found = [aux.metrics[name] for name in ("qmix_loss", "q_star_loss", "sign_loss")]
    np.testing.assert_allclose(found, [qmix_loss, q_star_loss, sign_loss], rtol=1e-5)
    np.testing.assert_allclose(loss, qmix_loss + q_star_loss + sign_loss, rtol=1e-5)
    assert sign_loss > 1e-4


@pytest.mark.parametrize("sign", ["loss", "none", "negative_abs"])
def test_how_the_residual_is_kept_from_being_positive(sign: str) -> None:
    """The last layer's bias makes the residual about 2 everywhere."""
    plain, algo = tiny_resq(residual_sign="none"), tiny_resq(residual_sign=sign)
    params, target = params_and_target(algo)
    params["residual_mixer"]["net_3"]["bias"] += 2.0
    batch = batch_of([4, 4], [True, True])
    residual = loss_of(plain, params, target, batch)[1].values["residual"]
    assert (residual > 1).all()
    _, aux = loss_of(algo, params, target, batch)
    expected = -residual if sign == "negative_abs" else residual
    np.testing.assert_allclose(aux.values["residual"], expected, rtol=1e-6)
    known = (np.array(residual) ** 2).mean() if sign == "loss" else 0.0
    np.testing.assert_allclose(aux.metrics["sign_loss"], known, rtol=1e-5)


def test_the_sign_loss_moves_the_residual_alone_and_targets_of_q_star_alone_enter() -> None:
    algo = tiny_resq()
    params, target = params_and_target(algo)
    params["residual_mixer"]["net_3"]["bias"] += 2.0
    batch = batch_of([4, 4], [True, True])

    def sign_loss(params: PyTree, target: PyTree) -> Any:
        return algo.loss(params, target, batch, hyperparams(algo), CTX, ())[1].metrics["sign_loss"]

    def loss(params: PyTree, target: PyTree) -> Any:
        return algo.loss(params, target, batch, hyperparams(algo), CTX, ())[0]

    def moved(grads: PyTree) -> set[str]:
        return {net for net, tree in grads.items() if any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(tree))}

    assert moved(jax.jit(jax.grad(sign_loss))(params, target)) == {"residual_agent", "residual_mixer"}
    assert moved(jax.jit(jax.grad(loss))(params, target)) == set(params)
    others = target | {net: jax.tree.map(jnp.zeros_like, target[net]) for net in target if "q_star" not in net}
    np.testing.assert_array_equal(jax.jit(loss)(params, target), jax.jit(loss)(params, others))


def test_the_residuals_agents_start_as_a_copy_of_the_acting_ones() -> None:
    params = tiny_resq().init(jax.random.key(0), Clock(episode_limit=4, ends_from=1).spec)
    jax.tree.map(np.testing.assert_array_equal, params["residual_agent"], params["agent"])
    assert (params["agent"]["encoder"]["kernel"] != params["q_star_agent"]["encoder"]["kernel"]).all()
    assert jax.tree.map(jnp.shape, params["residual_mixer"]) == jax.tree.map(jnp.shape, params["q_star_mixer"])


@pytest.mark.parametrize("algo", ["resq", "powqmix"])
def test_a_q_star_is_needed(algo: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(f"+algo={algo}", "env=matrix_game", "algo.q_star=none") == 2
    [line] = capfd.readouterr().err.splitlines()
    assert "algo.q_star='none' is not allowed" in line
    assert "feedforward" in line
