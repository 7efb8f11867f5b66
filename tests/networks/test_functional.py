import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock, tiny_run, tiny_wqmix
from wqmix_jax.networks.agent import RecurrentAgent
from wqmix_jax.networks.functional import apply_net, compute_in, init_net
from wqmix_jax.training.compiled_loop import make_trainer


def test_nets_compute_in_bfloat16_and_give_float32():
    """Values and gradients are off by bfloat16's rounding, and the sums over time by no more."""
    net, carry = RecurrentAgent(16, 3), jnp.zeros((8, 16))
    inputs = jax.random.normal(jax.random.key(1), (300, 8, 5))
    params = init_net(net, jax.random.key(0), carry, inputs)

    def loss(params):
        last, qs = apply_net(net, params, carry, inputs)
        assert last.dtype == qs.dtype == jnp.float32
        return jnp.square(qs - 1).mean()

    exact = jax.grad(loss)(params)
    with compute_in("bfloat16"):
        rounded = jax.grad(loss)(params)
    for one, other in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True):
        assert other.dtype == jnp.float32
        assert 0 < float(jnp.abs(one - other).max()) < 0.05 * float(jnp.abs(one).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_computes_in_what_its_option_says(dtype):
    trainer = make_trainer(tiny_run(tiny_wqmix(), Clock(episode_limit=4, ends_from=1), compute_dtype=dtype))
    state = jax.eval_shape(trainer.init, np.array([0]))
    assert ("bf16" in str(jax.make_jaxpr(trainer.train_chunk)(state))) == (dtype == "bfloat16")
    learner, _ = jax.eval_shape(trainer.learn, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(learner.params)} == {jnp.dtype("float32")}
