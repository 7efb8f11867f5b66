import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.networks.linear import Linear, magnitude


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
