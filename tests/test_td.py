import jax.numpy as jnp
import numpy as np

from wqmix_jax.td import masked_mean, masked_mean_square, td_target


def test_target_by_hand_stops_only_at_a_true_end():
    y = td_target(jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.float32(0.5), jnp.array([4.0, 4.0]))
    np.testing.assert_array_equal(y, [3.0, 1.0])


def test_masked_mean_square_by_hand():
    error, mask = jnp.array([[1.0, 2.0], [3.0, 100.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    assert masked_mean_square(error, mask) == (1 + 4 + 9) / 3
    weights = jnp.array([[1.0, 0.5], [0.1, 1.0]])
    np.testing.assert_allclose(masked_mean_square(error, mask, weights), (1 + 2 + 0.9) / 3, rtol=1e-6)


def test_masked_mean_divides_by_the_real_steps_alone():
    assert masked_mean(jnp.array([2.0, 4.0, 1000.0]), jnp.array([1.0, 1.0, 0.0])) == 3.0
