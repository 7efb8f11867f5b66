import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from wqmix_jax import load_config
from wqmix_jax.networks.linear import Linear, magnitude, orthogonal
from wqmix_jax.training.compiled_loop import make_trainer


def test_a_magnitudes_slope_at_zero_is_zero_as_in_torch():
    """A weight of exactly zero then keeps its hypernetwork as it is; the slope of `jnp.abs` there is 1."""
    at = jnp.array([-2.0, 0.0, 3.0])
    assert magnitude(at).tolist() == [2.0, 0.0, 3.0]
    assert jax.vmap(jax.grad(magnitude))(at).tolist() == [-1.0, 0.0, 1.0]


def test_inputs_side_by_side_are_one_row_and_so_are_their_gradients() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    state, qs = jax.random.normal(keys[0], (2, 3, 5)), jax.random.normal(keys[1], (2, 3, 4))
    layer, target = Linear(6), jax.random.normal(keys[2], (2, 3, 6))
    params = layer.init(keys[3], state, qs)

    def apart(params, state, qs):
        return (jnp.square(layer.apply(params, state, qs)) * target).sum()

    def in_one(params, state, qs):
        return (jnp.square(layer.apply(params, jnp.concatenate([state, qs], -1))) * target).sum()

    np.testing.assert_array_equal(apart(params, state, qs), in_one(params, state, qs))
    ours, autodiff = (jax.grad(loss, argnums=(0, 1, 2))(params, state, qs) for loss in (apart, in_one))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), ours, autodiff)


def decomposed(jaxpr):
    """The shapes of all matrices, or stacks of matrices, that a program decomposes."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("qr", "geqrf", "householder_product"):
            yield equation.invars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from decomposed(inner)


def test_orthogonal_kernels_are_flaxs_and_drawn_one_after_the_other():
    """Stacks of matrices, drawn by several devices of a CPU at the same time, would wait for each other forever."""

    def drawn(initializer):
        return jax.vmap(jax.vmap(lambda key: initializer(key, (3, 5), jnp.float32)))

    keys = jax.random.split(jax.random.key(0), (2, 3))
    found, expected = drawn(orthogonal(2.0)), drawn(nn.initializers.orthogonal(2.0))
    np.testing.assert_array_equal(found(keys), expected(keys))
    assert set(decomposed(jax.make_jaxpr(found)(keys).jaxpr)) == {(5, 3)}
    assert set(decomposed(jax.make_jaxpr(expected)(keys).jaxpr)) == {(2, 3, 5, 3)}


@pytest.mark.parametrize("options", [("+algo=mappo",), ("+algo=cw_qmix", "algo.share_parameters=none")])
def test_no_run_decomposes_a_stack_of_matrices(options):
    trainer = make_trainer(load_config(*options, "env=matrix_game", "algo.weight_init=orthogonal"))
    program = jax.make_jaxpr(trainer.init_program)(jnp.arange(2, dtype=jnp.uint32))
    shapes = set(decomposed(program.jaxpr))
    assert shapes
    assert all(len(shape) == 2 for shape in shapes)
