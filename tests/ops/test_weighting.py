import jax.numpy as jnp
import numpy as np

from wqmix_jax.ops.weighting import central, optimistic, qtran

ALPHA = jnp.float32(0.25)


def test_optimistic_is_one_only_below_the_target():
    """The error is Q_tot - y; a tie is no underestimate."""
    np.testing.assert_array_equal(optimistic(jnp.array([-1.0, 0.0, 1.0]), ALPHA), [1.0, 0.25, 0.25])


def test_central_is_one_for_the_greedy_action_and_for_strictly_better_ones():
    is_greedy = jnp.array([True, False, False, False])
    y, greedy_value = jnp.array([-5.0, 2.0, 1.0, 0.0]), jnp.ones(4)
    np.testing.assert_array_equal(central(is_greedy, y, greedy_value, ALPHA), [1.0, 1.0, 0.25, 0.25])


def test_qtran_gives_what_is_overestimated_no_weight_unless_it_is_greedy():
    is_greedy, td_error = jnp.array([True, True, False, False, False]), jnp.array([-1.0, 1.0, -1.0, 0.0, 1.0])
    weights = qtran(is_greedy, td_error, jnp.float32(2), jnp.float32(10))
    np.testing.assert_array_equal(weights, [2.0, 2.0, 10.0, 0.0, 0.0])
