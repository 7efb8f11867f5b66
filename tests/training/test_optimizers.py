"""Optimisers, schedules and soft updates of the targets, against PyTorch or formulas."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock, tiny_run, tiny_wqmix
from wqmix_jax import load_config
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.learner import apply_gradients, init_learner, update_targets, with_scheduled_lr
from wqmix_jax.training.members import make_members

torch = pytest.importorskip("torch")

SHAPES = {"kernel": (3, 4), "bias": (4,)}

TORCH: dict[str, Any] = {
    "rmsprop": lambda params, lr, decay: torch.optim.RMSprop(params, lr, 0.99, 1e-5, decay),
    "adam": lambda params, lr, decay: torch.optim.Adam(params, lr, (0.8, 0.95), 1e-6, decay),
    "adamw": lambda params, lr, decay: torch.optim.AdamW(params, lr, (0.8, 0.95), 1e-6, decay),
    "radam": lambda params, lr, decay: torch.optim.RAdam(params, lr, (0.8, 0.95), 1e-6, decay),
}


def recorded(name: str, weight_decay: float, num_steps: int) -> tuple[list[Any], list[Any]]:
    """Returns gradients of decreasing size, and the parameters before the first step and after each, by PyTorch."""
    rng = np.random.default_rng(0)
    params = {key: rng.normal(size=shape) for key, shape in SHAPES.items()}
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in params.items()}
    optimizer = TORCH[name](list(tensors.values()), 0.01, weight_decay)
    grads, after = [], [params]
    for step in range(num_steps):
        grads.append({key: rng.normal(size=shape) * 0.9**step for key, shape in SHAPES.items()})
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[-1][key])
        optimizer.step()
        after.append({key: tensor.detach().numpy().copy() for key, tensor in tensors.items()})
    return grads, after


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", TORCH)
def test_steps_are_those_of_pytorch(name: str, weight_decay: float) -> None:
    grads, expected = recorded(name, weight_decay, 20)
    changes = {"optimizer": name, "adam_b1": 0.8, "adam_b2": 0.95, "adam_eps": 1e-6, "weight_decay": weight_decay}
    algo = tiny_wqmix(lr=0.01, max_grad_norm=1e9, **changes)
    with jax.enable_x64(True):
        learner = init_learner(algo, jax.tree.map(jnp.asarray, expected[0]))
        for grad, params in zip(grads, expected[1:], strict=True):
            learner, _ = apply_gradients(algo, learner, jax.tree.map(jnp.asarray, grad), hyperparams(algo))
            for key in SHAPES:
                # optax adds RAdam's epsilon after the correction of the bias, PyTorch before it.
                np.testing.assert_allclose(learner.params[key], params[key], rtol=1e-5 if name == "radam" else 1e-9)


def test_gradients_are_clipped_before_weights_decay() -> None:
    algo = tiny_wqmix(optimizer="adamw", adam_b1=0.0, adam_b2=0.0, max_grad_norm=1.0, weight_decay=0.5, lr=0.1)
    learner = init_learner(algo, {"x": jnp.array([2.0])})
    stepped, norm = apply_gradients(algo, learner, {"x": jnp.array([50.0])}, hyperparams(algo))
    assert norm == 50
    np.testing.assert_allclose(stepped.params["x"], 2 - 0.1 * (1 + 0.5 * 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.2, 0.2, 0.2, 0.2]), ("linear", [0.2, 0.15, 0.1, 0]), ("cosine", [0.2, 0.1707107, 0.1, 0])],
)
def test_schedules_end_at_zero(schedule: str, expected: list[float]) -> None:
    algo = tiny_wqmix(lr_schedule=schedule, lr=0.2)
    hp = jax.tree.map(jnp.float32, hyperparams(algo))
    rates = [with_scheduled_lr(algo, hp, jnp.int32(steps), jnp.int32(400)).lr for steps in (0, 100, 200, 440)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-8)


def test_a_run_follows_its_schedule() -> None:
    """RMSProp's steps are proportional to the rate: after the same first steps, the later ones are smaller."""

    def params_after(num_chunks: int, schedule: str) -> list[np.ndarray]:
        algo = tiny_wqmix(lr_schedule=schedule)
        trainer = make_trainer(tiny_run(algo, Clock(episode_limit=4, ends_from=9), total_env_steps=24))
        state = trainer.init([0])
        for _ in range(num_chunks):
            state, _ = trainer.train_chunk(state)
        return [np.array(leaf) for leaf in jax.tree.leaves(state.learner.params)]

    first = params_after(0, "linear")
    constant, linear = params_after(2, "constant"), params_after(2, "linear")
    # The first learner step is at 8 of 24 steps, where two thirds of the rate are left.
    for start, full, part in zip(first, constant, linear, strict=True):
        np.testing.assert_allclose(part - start, (full - start) * 2 / 3, rtol=1e-3, atol=1e-7)


def test_soft_updates_by_formula_and_only_where_a_step_was_taken() -> None:
    algo = tiny_wqmix(target_update_tau=0.25)
    learner = init_learner(algo, {"x": jnp.zeros(2)})
    learners = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), learner)
    learners = learners._replace(params={"x": jnp.array([[4.0, 8.0], [4.0, 8.0]])})
    hp = jax.tree.map(lambda leaf: jnp.full(2, leaf), hyperparams(algo))._replace(
        target_update_tau=jnp.array([0.25, 0.5])
    )
    for ready, expected in (([True, True], [[1, 2], [2, 4]]), ([True, False], [[1, 2], [0, 0]])):
        updated = update_targets(algo, learners, hp, jnp.array([10**6, 10**6]), jnp.array(ready))
        np.testing.assert_array_equal(updated.target["x"], expected)


def test_tau_is_swept_in_one_call_only_if_targets_are_soft() -> None:
    sweep = {"target_update_tau": [0.01, 0.1]}
    assert len(make_members(tiny_wqmix(target_update_tau=0.01), [0], sweep)) == 2
    with pytest.raises(ConfigError, match=r"sweep\.target_update_tau is not allowed"):
        make_members(tiny_wqmix(), [0], sweep)
    with pytest.raises(ConfigError, match=r"sweep\.target_update_tau is not allowed to have null"):
        make_members(tiny_wqmix(target_update_tau=0.01), [0], {"target_update_tau": [None, 0.1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["algo.optimizer=sgd"], "algo.optimizer='sgd' is not allowed: input should be 'rmsprop', 'adam'"),
        (["algo.lr_schedule=step"], "algo.lr_schedule='step' is not allowed"),
        (["algo.target_update_tau=0"], "algo.target_update_tau=0 is not allowed: input should be greater than 0"),
        (["algo.target_update_tau=1.5"], "algo.target_update_tau=1.5 is not allowed: input should be less than or"),
        (["algo.weight_decay=-1"], "algo.weight_decay=-1 is not allowed"),
        (["algo.adam_b2=1"], "algo.adam_b2=1 is not allowed"),
        (["algo.n_steps=0"], "algo.n_steps=0 is not allowed"),
        (["algo.returns=retrace"], "algo.returns='retrace' is not allowed"),
    ],
)
def test_values_out_of_range_are_named(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("+algo=ow_qmix", *options)
    assert str(caught.value).startswith(message)


def test_options_without_effect() -> None:
    def unused(**changes: Any) -> dict[str, str]:
        return dataclasses.replace(tiny_wqmix(), **changes).without_effect()

    assert {"adam_b1", "adam_b2", "adam_eps"} <= unused().keys()
    assert unused(optimizer="adam").keys() & {"rms_eps", "adam_b1"} == {"rms_eps"}
    assert unused(target_update_tau=0.1)["target_update_interval"] == "algo.target_update_tau=0.1"
    assert unused(returns="n_step").keys() & {"n_steps", "td_lambda"} == {"td_lambda"}
    assert unused(returns="q_lambda").keys() & {"n_steps", "td_lambda"} == {"n_steps"}
