import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wqmix_jax.networks.mixers import QattenMixer, QMIXMixer, VDNMixer
from wqmix_jax.networks.q_star import AttentionQStar, FeedForwardQStar
from wqmix_jax.networks.qplex import QPLEXMixer
from wqmix_jax.networks.qtran import QTRANJoint


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


@given(st.integers(0, 2**31 - 1))
def test_qatten_never_falls_in_any_utility(seed):
    key, qs, state, step_key = inputs(seed)
    features = jax.random.normal(jax.random.fold_in(key, 1), (20, 3, 4))
    mixer = QattenMixer(embed_dim=4, hypernet_dim=6, num_heads=2)
    params = jax.tree.map(lambda leaf: leaf * 5, mixer.init(key, qs, state, features))
    higher = qs + jnp.abs(jax.random.normal(step_key, qs.shape))
    assert (mixer.apply(params, higher, state, features) >= mixer.apply(params, qs, state, features) - 1e-4).all()


def test_qatten_by_hand():
    """Two agents, one head of width 4: logits are query x key / 2, so 3:1; weight |-2|, c 7."""
    mixer = QattenMixer(embed_dim=4, hypernet_dim=1, num_heads=1)
    state, features = jnp.ones((1, 2)), jnp.array([[[1.0], [0.0]]])
    params = mixer.init(jax.random.key(0), jnp.zeros((1, 2)), state, features)["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["query"]["out"]["bias"] = jnp.array([2 * np.log(3.0), 0, 0, 0])
    params["key"]["kernel"] = jnp.array([[1.0, 5.0, 5.0, 5.0]])
    params["head"]["out"]["bias"] = jnp.array([-2.0])
    params["c"]["out"]["bias"] = jnp.array([7.0])
    q_tot = mixer.apply({"params": params}, jnp.array([[4.0, 8.0]]), state, features)
    np.testing.assert_allclose(q_tot, [2 * 5.0 + 7], rtol=1e-6)


def qplex_by_hand(actions):
    """Two agents, actions and heads; w = (|-2|, 3), b = (1, -1); the sigmoids are 1/2, unless an action moves one."""
    mixer, state = QPLEXMixer(hypernet_dim=1, attention_dim=1, num_heads=2), jnp.ones((1, 2))
    one_hot = jax.nn.one_hot(jnp.array([actions]), 2)
    qs = jnp.zeros((1, 2))
    params = jax.tree.map(jnp.zeros_like, mixer.init(jax.random.key(0), qs, qs, one_hot, state))["params"]
    params["hyper_w_final"]["out"]["bias"] = jnp.array([-2.0, 3.0])
    params["v"]["out"]["bias"] = jnp.array([1.0, -1.0])
    extractors = params["si_weight"]
    extractors["key_extractors"]["layer_2"]["bias"] = jnp.array([[-4.0], [8.0]])
    # Head 1 alone looks at agent 1's action 1, the last of [state, actions], and weighs agent 0's advantage by it.
    extractors["action_extractors"]["layer_0"]["kernel"] = jnp.zeros((2, 6, 1)).at[1, 5, 0].set(1.0)
    extractors["action_extractors"]["layer_1"]["kernel"] = jnp.ones((2, 1, 1))
    extractors["action_extractors"]["layer_2"]["kernel"] = jnp.zeros((2, 1, 2)).at[1, 0, 0].set(jnp.log(3.0))
    chosen, greedy = jnp.array([[1.0, 2.0]]), jnp.array([[4.0, 2.0]])
    return mixer.apply({"params": params}, chosen, greedy, one_hot, state)


def test_qplex_by_hand():
    """Agent 0 is 3 below its best, so 6 after its w; lambda is 4/4 + 8/4, or 4/4 + 8 (1/2) (3/4)."""
    for actions, weight in (((0, 0), 1.0 + 2.0), ((0, 1), 1.0 + 3.0)):
        duel = qplex_by_hand(actions)
        np.testing.assert_allclose(duel.value, [(2 * 1 + 1) + (3 * 2 - 1)], rtol=1e-6)
        np.testing.assert_allclose(duel.advantage, [-6 * (weight - 1)], rtol=1e-5)


@given(st.integers(0, 2**31 - 1))
def test_qplexs_greedy_joint_action_is_each_agents_own(seed):
    """The greedy joint action is the best of all 27, and its Q_tot is the sum of the transformed utilities."""
    keys = jax.random.split(jax.random.key(seed), 3)
    mixer = QPLEXMixer(hypernet_dim=4, attention_dim=5, num_heads=2)
    joint_actions = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    agent_qs, one_hot = jax.random.normal(keys[0], (3, 3)), jax.nn.one_hot(joint_actions, 3)
    chosen_qs = (agent_qs[None] * one_hot).sum(-1)
    greedy_qs = jnp.broadcast_to(agent_qs.max(-1), chosen_qs.shape)
    state = jnp.broadcast_to(jax.random.normal(keys[1], (5,)), (27, 5))
    params = jax.tree.map(lambda leaf: leaf * 3, mixer.init(keys[2], chosen_qs, greedy_qs, one_hot, state))
    duel = mixer.apply(params, chosen_qs, greedy_qs, one_hot, state)
    best = int(jnp.argmax(duel.value + duel.advantage))
    np.testing.assert_array_equal(joint_actions[best], agent_qs.argmax(-1))
    assert duel.advantage[best] == 0


def test_qplexs_heads_start_different():
    mixer, qs, state = QPLEXMixer(hypernet_dim=2, attention_dim=3, num_heads=4), jnp.zeros((1, 2)), jnp.ones((1, 5))
    params = mixer.init(jax.random.key(0), qs, qs, jnp.zeros((1, 2, 3)), state)["params"]["si_weight"]
    kernels = params["key_extractors"]["layer_0"]["kernel"]
    assert kernels.shape == (4, 5, 3)
    assert len(np.unique(kernels)) == kernels.size
    assert 0.3 < jnp.abs(kernels).max() <= 5**-0.5


def test_qtrans_joint_network_by_hand():
    """The encodings ReLU(h + a0 - a1) of two agents are summed before Q; V sees the state alone."""
    net = QTRANJoint(hidden_dim=1, num_layers=1)
    hidden, actions, state = jnp.array([[[1.0], [2.0]]]), jnp.array([[[1.0, 0], [0, 1.0]]]), jnp.array([[10.0]])
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), hidden, actions, state))["params"]
    params["action_encoding"]["hidden"]["kernel"] = jnp.array([[1.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]])
    params["action_encoding"]["out"]["kernel"] = jnp.eye(3)
    params["q"]["layer_0"]["kernel"] = jnp.array([[1.0], [100.0], [0], [0]])  # state, encoding
    params["q"]["layer_1"]["kernel"] = jnp.array([[-1.0]])
    params["v"]["layer_0"]["kernel"] = jnp.array([[3.0]])
    params["v"]["layer_1"]["kernel"] = jnp.array([[1.0]])
    value = net.apply({"params": params}, hidden, actions, state)
    np.testing.assert_allclose(value.q, [-(10 + 100 * (2.0 + 1.0))], rtol=1e-6)
    np.testing.assert_allclose(value.v, [30.0], rtol=1e-6)
