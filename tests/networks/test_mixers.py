import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wqmix_jax.networks.mixers import QMIXMixer, VDNMixer
from wqmix_jax.networks.q_star import AttentionQStar, FeedForwardQStar


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


@pytest.mark.parametrize("net", [FeedForwardQStar(hidden_dim=16), AttentionQStar(hidden_dim=16, hypernet_dim=6)])
def test_q_star_is_not_bound_to_be_monotonic(net):
    key, qs, state, _ = inputs(0, rows=200)
    params = net.init(key, qs, state)
    slopes = jax.vmap(jax.grad(lambda q, s: net.apply(params, q, s)))(qs, state)
    assert (slopes > 0).any()
    assert (slopes < 0).any()


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


def test_attention_q_star_by_hand():
    """Two agents, one head: ReLU twice on what the softmax over agents (3:1, from logits ln 3 and 0) makes of them."""
    net = AttentionQStar(hidden_dim=1, hypernet_dim=1)
    state = jnp.ones((1, 2))
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), jnp.zeros((1, 2)), state))["params"]
    params["attention"]["out"]["bias"] = jnp.log(jnp.array([3.0, 1.0]))
    params["net_0"]["kernel"] = jnp.array([[2.0]])
    params["net_1"] = {"kernel": jnp.array([[1.0]]), "bias": jnp.array([0.5])}
    params["net_2"]["kernel"] = jnp.array([[-1.0]])
    params["v"]["out"]["bias"] = jnp.array([7.0])
    for qs, head in (((4.0, 8.0), 5.0), ((-4.0, -8.0), -5.0)):
        expected = 7.0 - (max(2 * head, 0) + 0.5)
        np.testing.assert_allclose(net.apply({"params": params}, jnp.array([qs]), state), [expected], rtol=1e-6)


def test_attention_q_star_sees_the_state_through_the_weights_and_v_alone():
    """With equal utilities no attention can matter, whatever the state: what is left of it is V(s)."""
    key, _, state, _ = inputs(1)
    net, equal = AttentionQStar(hidden_dim=4, hypernet_dim=3), jnp.full((20, 3), 1.5)
    params = net.init(key, equal, state)["params"]
    params["v"] = jax.tree.map(jnp.zeros_like, params["v"])
    np.testing.assert_allclose(jnp.ptp(net.apply({"params": params}, equal, state)), 0, atol=1e-6)
