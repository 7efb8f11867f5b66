import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.ops.td import lambda_return, masked_mean, masked_mean_square, td_target


def test_target_by_hand_stops_only_at_a_true_end():
    y = td_target(jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.float32(0.5), jnp.array([4.0, 4.0]))
    np.testing.assert_array_equal(y, [3.0, 1.0])


def test_lambda_return_by_hand():
    """Three steps to a time limit: gamma 1/2, lambda 1/2, and none at the last step, which bootstraps in full."""
    reward, discount, value = jnp.array([1.0, 2.0, 4.0]), jnp.ones(3), jnp.array([8.0, 16.0, 32.0])
    last = 4 + 32 / 2
    middle = 2 + (16 / 2 + last / 2) / 2
    first = 1 + (8 / 2 + middle / 2) / 2
    y = lambda_return(reward, discount, jnp.float32(0.5), value, jnp.array([0.5, 0.5, 0.0]))
    np.testing.assert_array_equal(y, [first, middle, last])


def test_lambda_return_stops_at_a_true_end():
    """The last reward alone counts there, and nothing of what comes after it, whatever lambda is in the padding."""
    reward, discount, value = jnp.array([1.0, 2.0, 99.0]), jnp.array([1.0, 0.0, 1.0]), jnp.array([8.0, 77.0, 55.0])
    for after_the_end in (0.0, 1.0):
        y = lambda_return(reward, discount, jnp.float32(0.5), value, jnp.array([0.5, after_the_end, 0.0]))
        np.testing.assert_array_equal(y[:2], [1 + (8 / 2 + 2 / 2) / 2, 2.0])


@pytest.mark.parametrize("agents", [(), (3,)])
def test_lambda_0_is_one_step_and_lambda_1_the_whole_return(agents):
    rng = np.random.default_rng(0)
    reward, discount, gamma = jnp.asarray(rng.normal(size=4)), jnp.ones(4), jnp.float32(0.5)
    value = jnp.asarray(rng.normal(size=(4, *agents)))
    whole = [sum(0.5**k * reward[t + k] for k in range(4 - t)) + 0.5 ** (4 - t) * value[-1] for t in range(4)]
    last_is_one_step = jnp.array([1.0, 1.0, 1.0, 0.0])
    axes = (slice(None), *(None for _ in agents))
    np.testing.assert_allclose(
        lambda_return(reward, discount, gamma, value, 0 * discount),
        td_target(reward[axes], discount[axes], gamma, value),
        rtol=1e-6,
    )
    np.testing.assert_allclose(lambda_return(reward, discount, gamma, value, last_is_one_step), whole, rtol=1e-5)


def test_masked_mean_square_by_hand():
    error, mask = jnp.array([[1.0, 2.0], [3.0, 100.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    assert masked_mean_square(error, mask) == (1 + 4 + 9) / 3
    weights = jnp.array([[1.0, 0.5], [0.1, 1.0]])
    np.testing.assert_allclose(masked_mean_square(error, mask, weights), (1 + 2 + 0.9) / 3, rtol=1e-6)


def test_masked_mean_divides_by_the_real_steps_alone():
    assert masked_mean(jnp.array([2.0, 4.0, 1000.0]), jnp.array([1.0, 1.0, 0.0])) == 3.0
