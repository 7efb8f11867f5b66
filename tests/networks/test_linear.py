import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import magnitude


def test_a_magnitudes_slope_at_zero_is_zero_as_in_torch():
    """A weight of exactly zero then keeps its hypernetwork as it is; the slope of `jnp.abs` there is 1."""
    at = jnp.array([-2.0, 0.0, 3.0])
    assert magnitude(at).tolist() == [2.0, 0.0, 3.0]
    assert jax.vmap(jax.grad(magnitude))(at).tolist() == [-1.0, 0.0, 1.0]
