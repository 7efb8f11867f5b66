"""LIIR: its proxy rewards, advantages and living agents by hand, which net each step moves, and that it learns."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algos.test_coma import BATCH, CTX, always, same_to_rounding, updated
from tests.environments import tiny_coma, tiny_liir
from tests.running import main
from tests.training.test_learner import batch_of, params_and_target
from wqmix_jax.algos.base import Trained, hyperparams
from wqmix_jax.networks.functional import BlockForm, unroll_in_blocks
from wqmix_jax.training.learner import apply_gradients, init_learner
from wqmix_jax.types import PyTree


def start(algo: Any, params: PyTree) -> Trained:
    learner = init_learner(algo, params)
    return Trained(learner.params, learner.opt_state)


def test_proxy_returns_by_hand() -> None:
    """The heads' bias makes the intrinsic reward of action a 10 tanh(a / 10); the target's value is 7 everywhere."""
    algo = tiny_liir(intrinsic_weight=0.5)
    params, target = params_and_target(algo)
    params["proxy"]["r_in"] = {"kernel": 0 * params["proxy"]["r_in"]["kernel"], "bias": jnp.arange(3.0)}
    target["critic"] = jax.tree.map(jnp.zeros_like, target["critic"])
    target["critic"]["head"]["bias"] = jnp.array([7.0])
    batch = batch_of(*BATCH)
    reward = np.array(batch.reward)[..., None] + 0.5 * 10 * np.tanh(np.array(batch.joint_action) / 10)
    _, aux = updated(algo, start(algo, params), target, batch, always(0, batch))
    known = np.zeros((2, 4, 2))
    known[0, 1], known[1, 2] = reward[0, 1], reward[1, 2] + 0.9 * 7
    for row, time in ((0, 0), (1, 1), (1, 0)):
        known[row, time] = reward[row, time] + 0.9 * (0.2 * 7 + 0.8 * known[row, time + 1])
    np.testing.assert_allclose(aux.values["td_target"], known, rtol=1e-5)
    y_ex, v_ex = np.array(aux.values["y_ex"]), np.array(aux.values["v_ex"])[:, :-1]
    np.testing.assert_allclose(
        y_ex[0, 1], batch.reward[0, 1], rtol=1e-6
    )  # the team's reward, without the intrinsic one
    known_loss = (np.square(y_ex - v_ex) * np.array(batch.mask)).sum() / 5
    np.testing.assert_allclose(aux.metrics["v_ex_loss"], known_loss, rtol=1e-5)


def test_advantages_have_mean_0_and_deviation_1_over_real_steps_or_over_padding_too() -> None:
    advantages, mask = (
        jnp.array([[1.0, 2.0, 9.0, 9.0], [3.0, 6.0, 4.0, 9.0]]),
        jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 0]]),
    )
    for padding, counted in ((False, [1.0, 2, 3, 6, 4]), (True, [1.0, 2, 9, 3, 6, 4])):
        found = tiny_liir(standardise_padding=padding).standardised(advantages, mask, axes=(0,))
        known = (np.array(advantages) - np.mean(counted)) / np.std(counted, ddof=1)
        np.testing.assert_allclose(found, known, rtol=1e-5)


def test_agents_without_a_choice_or_with_action_0_have_no_part_in_the_policys_loss() -> None:
    batch = batch_of([1], [True])
    allowed = {(1, 0, 0): (0, 0), (0, 1, 0): (0, 1), (0, 1, 1): (1, 1), (1, 1, 0): (1, 0)}
    for avail, known in allowed.items():
        changed = batch._replace(avail_actions=jnp.broadcast_to(jnp.array(avail, bool), batch.avail_actions.shape))
        for alive, expected in zip(("choice", "action_0"), known, strict=True):
            assert (tiny_liir(alive=alive).alive_agents(changed) == expected).all()


def test_a_learner_call_moves_the_heads_by_their_own_gradient_without_a_clip() -> None:
    """The gradient of product * mean(y_mix) + mean((v_ex - y_ex)^2); the critic's own loss doesn't reach the heads."""
    algo = tiny_liir(max_grad_norm=1e-3, intrinsic_weight=0.5)
    (params, target), batch = params_and_target(algo), batch_of(*BATCH)
    noise, hp, trained = always(1, batch), hyperparams(algo), start(algo, params)
    found, aux = updated(algo, trained, target, batch, noise)
    first, second = map(jax.tree.leaves, aux.values["policy_gradients"])
    product = sum(float(jnp.vdot(*pair)) for pair in zip(first, second, strict=True))
    np.testing.assert_allclose(aux.metrics["gradient_product"], product, rtol=1e-4)
    actions = algo.actions(batch, algo.policy(params["agent"], batch, CTX), noise)
    mask = batch.mask[..., None]

    def loss(proxy: PyTree) -> Any:
        changed = params | {"proxy": proxy}
        y = algo.td_targets(changed, target, batch, actions, hp)
        v_ex = algo.evaluate(changed, batch, actions).v_ex[:, :-1]
        errors = jnp.square(v_ex - aux.values["y_ex"]) * batch.mask
        return product * (y * mask).sum() / 10 + errors.sum() / 5

    grads = jax.grad(loss)(params["proxy"])
    heads = init_learner(algo, params)._replace(params={"proxy": params["proxy"]}, opt_state=trained.opt_state["proxy"])
    heads, norm = apply_gradients(algo, heads, {"proxy": grads}, hp._replace(max_grad_norm=jnp.float32(jnp.inf)))
    assert norm > 1e-3
    same_to_rounding(found.params["proxy"], heads.params["proxy"])


@pytest.mark.slow
def test_without_intrinsic_rewards_the_meta_gradient_is_zero() -> None:
    algo = tiny_liir(intrinsic_weight=0.0)
    (params, target), batch = params_and_target(algo), batch_of(*BATCH)
    found, _ = updated(algo, start(algo, params), target, batch, always(1, batch))
    same_to_rounding(found.params["proxy"]["r_in"], params["proxy"]["r_in"])
    for net in ("agent", "critic"):
        moved = jax.tree.map(lambda one, two: (one != two).any(), found.params[net], params[net])
        assert all(map(bool, jax.tree.leaves(moved)))
    assert (found.params["proxy"]["v_ex"]["kernel"] != params["proxy"]["v_ex"]["kernel"]).any()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("algo.alive=all", "algo.alive='all' is not allowed"),
        ("algo.intrinsic_weight=-1", "algo.intrinsic_weight=-1 is not allowed"),
    ],
)
def test_what_is_not_allowed_is_one_line(option: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main("+algo=liir", option) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    "form", [None, BlockForm(max_steps=2, steps_inline=1, recomputes=True)], ids=["steps", "blocks"]
)
@pytest.mark.parametrize("make", [tiny_coma, tiny_liir])
@pytest.mark.parametrize(
    "options",
    [
        {"share_parameters": "none", "weight_init": "orthogonal", "recurrent": False, "layer_norm": True},
        {"share_parameters": ((0, 1),), "agent_id": False, "last_action": False, "critic_steps": 1},
    ],
    ids=["separate", "group"],
)
def test_options_of_agents_hold_for_the_critics_too(options: dict[str, Any], make: Any, form: Any) -> None:
    """Traced only: a learner call gives parameters of the same shapes, and its critic has the sets of the actors."""
    algo, batch = make(**options), batch_of(*BATCH)
    params, target = jax.eval_shape(lambda: params_and_target(algo))
    sets = {"none": "agents"}.get(options["share_parameters"], "groups")
    assert params["critic"].keys() == params["agent"].keys() == {sets}

    def call(params: PyTree, target: PyTree) -> Any:
        with unroll_in_blocks(form):
            return updated.__wrapped__(algo, start(algo, params), target, batch, always(1, batch))

    trained, aux = jax.eval_shape(call, params, target)
    assert jax.tree.map(lambda leaf: leaf.shape, trained.params) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert {"loss", "grad_norm", "critic_grad_norm"} <= aux.metrics.keys()
