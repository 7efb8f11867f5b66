import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wqmix_jax.ops.action_selection import (
    epsilon_greedy,
    explore,
    greedy_actions,
    linear_epsilon,
    sample_exploration,
    with_idle_action,
)

AVAIL = jnp.array([[True, False, True, True], [False, True, False, False]])


def test_greedy_actions_passes_over_better_unavailable_actions():
    qs = jnp.array([[1.0, 9.0, 3.0, 3.0], [9.0, -9.0, 9.0, 9.0]])
    np.testing.assert_array_equal(greedy_actions(qs, AVAIL), [2, 1])  # the first of equals


@given(st.integers(0, 2**31 - 1), st.floats(0, 1, width=32))
def test_an_unavailable_action_is_never_chosen(seed, epsilon):
    qs_key, key = jax.random.split(jax.random.key(seed))
    qs = jax.random.normal(qs_key, (50, 2, 4)) * 100
    actions = epsilon_greedy(key, qs, jnp.broadcast_to(AVAIL, qs.shape), jnp.float32(epsilon))
    assert np.take_along_axis(np.broadcast_to(AVAIL, qs.shape), np.array(actions)[..., None], axis=-1).all()


ANY_VALUE = st.sampled_from([np.nan, np.inf, -np.inf]) | st.floats(width=32)


@given(st.lists(ANY_VALUE, min_size=8, max_size=8), st.floats(0, 1, width=32), st.integers(0, 2**31 - 1))
def test_no_value_makes_an_unavailable_action_the_best(values, epsilon, seed):
    qs = jnp.array(values, jnp.float32).reshape(2, 4)
    for actions in (greedy_actions(qs, AVAIL), epsilon_greedy(jax.random.key(seed), qs, AVAIL, jnp.float32(epsilon))):
        assert np.take_along_axis(np.array(AVAIL), np.array(actions)[:, None], axis=-1).all()


def test_an_agent_without_an_action_gets_the_first_and_the_others_keep_theirs():
    avail = jnp.stack([AVAIL, AVAIL & jnp.array([[False], [True]])])
    expected = np.array([AVAIL, [[True, False, False, False], AVAIL[1]]])
    np.testing.assert_array_equal(with_idle_action(avail), expected)
    np.testing.assert_array_equal(with_idle_action(np.array(avail)), expected)  # as `GreedyPolicy.act` may be given it
    np.testing.assert_array_equal(greedy_actions(jnp.ones((2, 2, 4)), jnp.zeros((2, 2, 4), bool)), np.zeros((2, 2)))


def test_epsilon_is_the_chance_of_a_uniform_available_action_for_each_agent_alone():
    num, epsilon = 30_000, 0.3
    qs = jnp.broadcast_to(jnp.array([[0.0, 9.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]), (num, 2, 4))
    avail = jnp.broadcast_to(jnp.array([[True, False, True, True], [True, True, True, True]]), qs.shape)
    actions = np.array(epsilon_greedy(jax.random.key(0), qs, avail, jnp.float32(epsilon)))
    shares = np.stack([np.bincount(actions[:, agent], minlength=4) / num for agent in range(2)])
    expected = np.array([[0.1, 0, 0.1, 0.8], [0.075, 0.075, 0.775, 0.075]])
    np.testing.assert_allclose(shares, expected, atol=0.01)
    explored = actions != np.array([3, 2])
    assert abs(np.corrcoef(explored.T)[0, 1]) < 0.03


def test_epsilon_falls_linearly_and_then_stays():
    steps = jnp.array([0, 25_000, 50_000, 80_000])
    epsilon = linear_epsilon(steps, jnp.float32(1.0), jnp.float32(0.05), jnp.int32(50_000))
    np.testing.assert_allclose(epsilon, [1.0, 0.525, 0.05, 0.05], rtol=1e-6)


def test_numbers_drawn_in_advance_give_the_same_actions():
    key, qs = jax.random.key(3), jax.random.normal(jax.random.key(4), (50, 2, 4))
    avail, epsilon = jnp.broadcast_to(AVAIL, qs.shape), jnp.float32(0.5)
    ahead = explore(sample_exploration(key, qs.shape), qs, avail, epsilon)
    np.testing.assert_array_equal(ahead, epsilon_greedy(key, qs, avail, epsilon))


def test_a_random_action_is_uniform_over_what_is_available():
    num, avail = 40_000, jnp.array([[True, False, True, True], [True, True, True, True]])
    qs = jnp.broadcast_to(jnp.array([9.0, 0.0, 0.0, 0.0]), (num, 2, 4))
    noise = sample_exploration(jax.random.key(5), qs.shape)
    actions = np.array(explore(noise, qs, jnp.broadcast_to(avail, qs.shape), jnp.float32(1)))
    for agent, allowed in enumerate(np.array(avail)):
        counts, expected = np.bincount(actions[:, agent], minlength=4), num * allowed / allowed.sum()
        assert (counts[~allowed] == 0).all()
        assert (((counts - expected)[allowed] ** 2) / expected[allowed]).sum() < 20  # chi-squared, 3 degrees: p < 2e-4
