import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wqmix_jax.networks.recurrent import GRU, GRUWeights, gru_step, gru_unroll


def weights_and_inputs(num_steps, rows=3, features=4, hidden=5):
    shapes = [(features, 3 * hidden), (hidden, 3 * hidden), (3 * hidden,), (3 * hidden,), (rows, hidden)]
    arrays = [jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 5), shapes, strict=True)]
    inputs = jax.random.normal(jax.random.key(1), (num_steps, rows, features))
    return GRUWeights(*arrays[:4]), arrays[4], inputs


def plain_unroll(weights, carry, inputs):
    def step(hidden, x):
        hidden = gru_step(weights, hidden, x)
        return hidden, hidden

    return jax.lax.scan(step, carry, inputs)[1]


def test_one_step_is_torchs_cell():
    """Against the torch package itself, both biases told apart inside the new gate."""
    torch = pytest.importorskip("torch")
    weights, carry, inputs = weights_and_inputs(1)
    cell = torch.nn.GRUCell(4, 5)
    values = [weights.input_kernel.T, weights.hidden_kernel.T, weights.input_bias, weights.hidden_bias]
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    cell.load_state_dict({name: torch.tensor(np.array(value)) for name, value in zip(names, values, strict=True)})
    expected = cell(torch.tensor(np.array(inputs[0])), torch.tensor(np.array(carry))).detach().numpy()
    np.testing.assert_allclose(gru_step(weights, carry, inputs[0]), expected, atol=1e-6)


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_written_backward_pass_equals_autodiff(num_steps):
    weights, carry, inputs = weights_and_inputs(num_steps)
    target = jax.random.normal(jax.random.key(2), (num_steps, *carry.shape))

    def gradients(unroll):
        return jax.grad(lambda *args: (unroll(*args) * target).sum(), argnums=(0, 1, 2))(weights, carry, inputs)

    np.testing.assert_array_equal(gru_unroll(weights, carry, inputs), plain_unroll(weights, carry, inputs))
    for ours, autodiff in zip(*map(jax.tree.leaves, (gradients(gru_unroll), gradients(plain_unroll))), strict=True):
        np.testing.assert_allclose(ours, autodiff, rtol=1e-4, atol=1e-5)


def test_module_starts_uniform_in_torchs_range_and_keeps_batch_axes():
    gru, inputs = GRU(16), jnp.ones((3, 2, 4, 7))
    params = gru.init(jax.random.key(0), jnp.zeros((2, 4, 16)), inputs)
    assert gru.apply(params, jnp.zeros((2, 4, 16)), inputs).shape == (3, 2, 4, 16)
    for leaf in jax.tree.leaves(params):
        assert 0.2 < float(jnp.abs(leaf).max()) <= 0.25
        assert abs(float(leaf.mean())) < 0.1
