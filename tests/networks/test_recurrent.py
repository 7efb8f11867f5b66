import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.agent import RecurrentAgent
from wqmix_jax.networks.linear import LinearWeights
from wqmix_jax.networks.recurrent import GRUWeights, encoded_unroll, gru_step


def weights_and_inputs(num_steps, rows=3, features=4, hidden=5):
    shapes = [(features, 3 * hidden), (hidden, 3 * hidden), (3 * hidden,), (3 * hidden,), (rows, hidden)]
    arrays = [jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 5), shapes, strict=True)]
    inputs = jax.random.normal(jax.random.key(1), (num_steps, rows, features))
    return GRUWeights(*arrays[:4]), arrays[4], inputs


def encoder_of(inputs, features=4):
    kernel_key, bias_key = jax.random.split(jax.random.key(3))
    width = inputs.shape[-1]
    return LinearWeights(jax.random.normal(kernel_key, (width, features)), jax.random.normal(bias_key, (features,)))


def plain_unroll(encoder, weights, carry, inputs, starts=None):
    """Row by row and episode by episode, each from the carry, where rows hold several."""
    if starts is not None:
        rows = []
        for row, begins in enumerate(np.array(starts).T):
            cuts = [0, *(np.flatnonzero(begins[1:]) + 1), len(inputs)]
            parts = [inputs[one:other, row, None] for one, other in itertools.pairwise(cuts)]
            rows.append(jnp.concatenate([plain_unroll(encoder, weights, carry[row, None], part) for part in parts]))
        return jnp.concatenate(rows, axis=1)

    def step(hidden, x):
        hidden = gru_step(weights, hidden, jax.nn.relu(x @ encoder.kernel + encoder.bias[None]))
        return hidden, hidden

    return jax.lax.scan(step, carry, inputs)[1]


def test_one_step_is_torchs_cell():
    """Compares with the torch package itself; both biases differ inside the new gate."""
    torch = pytest.importorskip("torch")
    weights, carry, inputs = weights_and_inputs(1)
    cell = torch.nn.GRUCell(4, 5)
    values = [weights.input_kernel.T, weights.hidden_kernel.T, weights.input_bias, weights.hidden_bias]
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    cell.load_state_dict({name: torch.tensor(np.array(value)) for name, value in zip(names, values, strict=True)})
    expected = cell(torch.tensor(np.array(inputs[0])), torch.tensor(np.array(carry))).detach().numpy()
    np.testing.assert_allclose(gru_step(weights, carry, inputs[0]), expected, atol=1e-6)


SHARED = jnp.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
"""The starts of episodes in three rows, ``[T, R]``; the last row is one episode without a mark."""


@pytest.mark.parametrize(("num_steps", "starts"), [*((number, None) for number in range(1, 8)), (7, SHARED)])
def test_written_backward_pass_equals_autodiff(num_steps, starts):
    """Also where rows hold several episodes, whose hidden states and gradients have nothing to do with each other."""
    weights, carry, _ = weights_and_inputs(num_steps)
    inputs = jax.random.normal(jax.random.key(4), (num_steps, len(carry), 6))
    args = (encoder_of(inputs), weights, carry, inputs)
    target = jax.random.normal(jax.random.key(2), (num_steps, *carry.shape))

    def gradients(unroll):
        return jax.grad(lambda *args: (unroll(*args, starts) * target).sum(), argnums=(0, 1, 2, 3))(*args)

    tolerance = 0 if starts is None else 1e-6
    np.testing.assert_allclose(encoded_unroll(*args, starts), plain_unroll(*args, starts), atol=tolerance, rtol=0)
    for ours, autodiff in zip(*map(jax.tree.leaves, (gradients(encoded_unroll), gradients(plain_unroll))), strict=True):
        np.testing.assert_allclose(ours, autodiff, rtol=1e-4, atol=1e-5)


def test_inputs_may_be_encoded_already():
    """No ReLU comes before the unit then: the gradient reaches negative inputs."""
    weights, carry, inputs = weights_and_inputs(5)
    target = jax.random.normal(jax.random.key(2), (5, *carry.shape))

    def plain(encoder, weights, carry, inputs):
        def step(hidden, x):
            hidden = gru_step(weights, hidden, x)
            return hidden, hidden

        return jax.lax.scan(step, carry, inputs)[1]

    def gradients(unroll):
        return jax.grad(lambda *args: (unroll(None, *args) * target).sum(), argnums=(0, 1, 2))(weights, carry, inputs)

    for ours, autodiff in zip(*map(jax.tree.leaves, (gradients(encoded_unroll), gradients(plain))), strict=True):
        np.testing.assert_allclose(ours, autodiff, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("starts", [None, SHARED])
@pytest.mark.parametrize("num_places", [1, 4, 7])
def test_only_the_first_steps_are_taken(num_places, starts):
    """The others' hidden states are zero, and gradients that reach those are lost; compared with a shorter sequence."""
    weights, carry, _ = weights_and_inputs(7)
    inputs = jax.random.normal(jax.random.key(4), (7, len(carry), 6))
    args = (encoder_of(inputs), weights, carry, inputs)
    target = jax.random.normal(jax.random.key(2), (7, *carry.shape))

    @jax.jit
    def first(num_places):
        def value(*args):
            hiddens = encoded_unroll(*args, starts, num_places)
            return (hiddens * target).sum(), hiddens

        return jax.grad(value, argnums=(0, 1, 2, 3), has_aux=True)(*args)

    def shorter(encoder, weights, carry, inputs):
        cut = None if starts is None else starts[:num_places]
        hiddens = encoded_unroll(encoder, weights, carry, inputs[:num_places], cut)
        return (hiddens * target[:num_places]).sum(), jnp.zeros_like(target).at[:num_places].set(hiddens)

    ours, expected = first(num_places), jax.grad(shorter, argnums=(0, 1, 2, 3), has_aux=True)(*args)
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_agent_starts_uniform_in_torchs_range_and_keeps_batch_axes():
    agent, inputs = RecurrentAgent(16, 5), jnp.ones((3, 2, 4, 64))
    params = agent.init(jax.random.key(0), jnp.zeros((2, 4, 16)), inputs)
    carry, utilities = agent.apply(params, jnp.zeros((2, 4, 16)), inputs)
    assert (carry.shape, utilities.shape) == ((2, 4, 16), (3, 2, 4, 5))
    for layer, bound in {"encoder": 64**-0.5, "gru": 0.25, "head": 0.25}.items():
        for leaf in jax.tree.leaves(params["params"][layer]):
            assert 0.8 * bound < float(jnp.abs(leaf).max()) <= bound
            assert abs(float(leaf.mean())) < 0.4 * bound
