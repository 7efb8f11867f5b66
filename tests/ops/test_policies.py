import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wqmix_jax.ops.action_selection import draw, epsilon_floor, straight_through

LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
"""Their softmax is the argument of the logarithm."""


def test_the_floor_is_over_all_actions_and_the_mask_comes_after_it():
    """0.8 p + 0.05 is 0.45, 0.25, 0.15, 0.15; without the second action 0.75 is left to divide by."""
    avail = jnp.array([True, False, True, True])
    np.testing.assert_allclose(epsilon_floor(LOGITS, ~avail | avail, 0.2), [0.45, 0.25, 0.15, 0.15], rtol=1e-6)
    np.testing.assert_allclose(epsilon_floor(LOGITS, avail, 0.2), [0.6, 0, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(epsilon_floor(LOGITS, avail, 0.0), [2 / 3, 0, 1 / 6, 1 / 6], rtol=1e-6)


def test_padding_has_ones_and_no_gradient():
    nothing = jnp.zeros(4, bool)
    np.testing.assert_array_equal(epsilon_floor(LOGITS, nothing, 0.2), np.ones(4))
    grad = jax.grad(lambda logits: jnp.log(epsilon_floor(logits, nothing, 0.2)).sum())(LOGITS)
    np.testing.assert_array_equal(grad, np.zeros(4))


@given(st.integers(0, 2**31 - 1), st.floats(0, 1, width=32))
def test_a_policy_with_a_floor_is_a_distribution_over_what_is_available(seed, epsilon):
    logits_key, avail_key = jax.random.split(jax.random.key(seed))
    logits = jax.random.normal(logits_key, (20, 5)) * 3
    avail = jax.random.bernoulli(avail_key, 0.5, (20, 5)).at[:, 2].set(True)
    policy = np.array(epsilon_floor(logits, avail, jnp.float32(epsilon)))
    np.testing.assert_allclose(policy.sum(-1), np.ones(20), rtol=1e-5)
    assert (policy[~np.array(avail)] == 0).all()
    assert (policy[np.array(avail)] >= epsilon / 5 - 1e-6).all()


def test_draws_follow_the_policy_and_never_leave_it():
    num, policy = 30_000, jnp.array([0.6, 0.0, 0.3, 0.1])
    gumbel = jax.random.gumbel(jax.random.key(0), (num, 4))
    drawn = np.array(draw(jnp.broadcast_to(policy, (num, 4)), gumbel))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / num, policy, atol=0.01)
    assert 1 not in drawn


def test_a_draw_goes_straight_through_and_its_gradient_is_the_softmaxs():
    """Perturbed logits ln 1, ln 3 at temperature 1: softmax 1/4, 3/4, so d soft_1 / d logit_1 = 3/16."""
    logits, gumbel = jnp.zeros(2), jnp.log(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(straight_through(logits, gumbel, 1.0), [0, 1], atol=1e-6)
    jacobian = jax.jacobian(lambda logits: straight_through(logits, gumbel, 1.0))(logits)
    np.testing.assert_allclose(jacobian, np.array([[3, -3], [-3, 3]]) / 16, rtol=1e-5)


def test_temperature_changes_the_gradient_and_not_the_draw():
    """At 1/2 the perturbed logits are squared: softmax 1/10, 9/10, and the chain rule gives a 2."""
    logits, gumbel = jnp.zeros(2), jnp.log(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(straight_through(logits, gumbel, 0.5), [0, 1], atol=1e-6)
    jacobian = jax.jacobian(lambda logits: straight_through(logits, gumbel, 0.5))(logits)
    np.testing.assert_allclose(jacobian, 2 * np.array([[9, -9], [-9, 9]]) / 100, rtol=1e-5)
