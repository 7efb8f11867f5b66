import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wqmix_jax.networks.mixers import QMIXMixer, VDNMixer
from wqmix_jax.networks.q_star import FeedForwardQStar


def inputs(seed, rows=20):
    keys = jax.random.split(jax.random.key(seed), 4)
    return keys[0], jax.random.normal(keys[1], (rows, 3)), jax.random.normal(keys[2], (rows, 5)) * 3, keys[3]


@given(st.integers(0, 2**31 - 1))
def test_qmix_never_falls_in_any_utility(seed):
    key, qs, state, step_key = inputs(seed)
    mixer = QMIXMixer(embed_dim=4, hypernet_dim=6)
    params = mixer.init(key, qs, state)
    params = jax.tree.map(lambda leaf: leaf * 5, params)
    higher = qs + jnp.abs(jax.random.normal(step_key, qs.shape))
    assert (mixer.apply(params, higher, state) >= mixer.apply(params, qs, state) - 1e-4).all()


def test_q_star_is_not_bound_to_be_monotonic():
    key, qs, state, _ = inputs(0, rows=200)
    net = FeedForwardQStar(hidden_dim=16)
    params = net.init(key, qs, state)
    slopes = jax.vmap(jax.grad(lambda q, s: net.apply(params, q, s)))(qs, state)
    assert (slopes > 0).any()
    assert (slopes < 0).any()


def test_a_deviation_is_the_estimate_with_one_utility_replaced():
    key, qs, state, other_key = inputs(2, rows=7)
    net, agent_qs = FeedForwardQStar(hidden_dim=16), jax.random.normal(other_key, (7, 3, 4))
    params = net.init(key, qs, state)
    deviations = net.apply(params, agent_qs, qs, state, method="deviations")
    assert deviations.shape == (7, 3, 4)
    for agent in range(3):
        for action in range(4):
            expected = net.apply(params, qs.at[:, agent].set(agent_qs[:, agent, action]), state)
            np.testing.assert_allclose(deviations[:, agent, action], expected, rtol=1e-4, atol=1e-5)


def test_qmix_by_hand():
    """One agent, one mixing unit: elu(q |w1| + b1) |w2| + v, negative weights made positive."""
    mixer = QMIXMixer(embed_dim=1, hypernet_dim=1)
    state = jnp.ones((1, 1))
    params = jax.tree.map(jnp.zeros_like, mixer.init(jax.random.key(0), jnp.zeros((1, 1)), state))["params"]
    params["hyper_w_1"]["out"]["bias"] = jnp.array([-2.0])
    params["hyper_b_1"]["bias"] = jnp.array([0.5])
    params["hyper_w_final"]["out"]["bias"] = jnp.array([-3.0])
    params["v"]["out"]["bias"] = jnp.array([7.0])
    for q in (1.0, -1.0):
        before = q * 2 + 0.5
        expected = 3 * (before if before > 0 else np.expm1(before)) + 7
        np.testing.assert_allclose(mixer.apply({"params": params}, jnp.full((1, 1), q), state), [expected], rtol=1e-6)


def test_vdn_is_the_sum():
    np.testing.assert_array_equal(VDNMixer().apply({}, jnp.array([[1.0, 2.0, 4.0]]), jnp.zeros((1, 5))), [7.0])
