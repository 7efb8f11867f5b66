"""A gated recurrent unit with torch's two bias vectors, unrolled over time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import LinearWeights, orthogonal, product, torch_uniform
from wqmix_jax.types import Array, PRNGKey, PyTree


class GRUWeights(NamedTuple):
    """The gates' weights side by side in torch's order: reset, update, new.

    Attributes:
        input_kernel: ``[F, 3H]``.
        hidden_kernel: ``[H, 3H]``.
        input_bias: ``[3H]``.
        hidden_bias: ``[3H]``.
    """

    input_kernel: Array
    hidden_kernel: Array
    input_bias: Array
    hidden_bias: Array


class _Gates(NamedTuple):
    """The intermediate values of a step, each ``[R, H]``; ``hidden_new`` is the hidden state's term in the new gate."""

    reset: Array
    update: Array
    new: Array
    hidden_new: Array


def gru_step(weights: GRUWeights, carry: Array, inputs: Array) -> Array:
    """Takes one step of torch's GRUCell: ``[R, H]``, ``[R, F]`` -> ``[R, H]``."""
    return _next_hidden(_gates(weights, carry, inputs), carry)


@jax.custom_vjp
def encoded_unroll(
    encoder: LinearWeights | None,
    weights: GRUWeights,
    carry: Array,
    inputs: Array,
    starts: Array | None = None,
    num_places: Array | None = None,
) -> Array:
    """Returns all hidden states of a sequence; a linear layer and a ReLU come before the unit.

    The backward pass is written out: the forward one stores its gates, and the weights' gradients are added up step by
    step while what they are made of is in the cache, where autodiff would store every intermediate and reread it.

    Args:
        encoder: the linear layer, ``[I, F]`` and ``[F]``; None if ``inputs`` are encoded already.
        weights: the unit, see `GRUWeights`.
        carry: ``[R, H]``, the hidden state before the first step.
        inputs: ``[T, R, I]``; ``[T, R, F]`` without an encoder.
        starts: ``[T, R]`` bool, where the hidden state before the step is ``carry`` again; None for nowhere.
        num_places: scalar int32, the number of steps that are taken; None for all. The hidden states of the others are
            zero and have no gradient.

    Returns:
        ``[T, R, H]``.
    """

    def step(hidden: Array, at: tuple[Array, Array | None]) -> tuple[Array, Array]:
        x, start = at
        hidden = gru_step(weights, _restarted(hidden, carry, start), _encode(encoder, x))
        return hidden, hidden

    return _scan(step, carry, (inputs, starts), num_places)[1]


def _scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: PyTree,
    num_places: Array | None,
    *,
    reverse: bool = False,
) -> tuple[Any, PyTree]:
    """Scans like `jax.lax.scan`, or over the first ``num_places`` alone, where the outputs of the others are zero.

    ``num_places`` may be traced, since nothing is differentiated here.
    """
    if num_places is None:
        return jax.lax.scan(step, carry, xs, reverse=reverse)

    # A loop of dynamic length, which autodiff couldn't reverse; outputs are written into arrays of full length.
    def at(index: Array) -> PyTree:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), xs)

    def one(count: Array, state: tuple[Any, PyTree]) -> tuple[Any, PyTree]:
        carry, outs = state
        index = num_places - 1 - count if reverse else count
        carry, out = step(carry, at(index))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return carry, jax.tree.map(put, outs, out)

    shapes = jax.eval_shape(lambda: step(carry, at(jnp.int32(0)))[1])
    length = len(jax.tree.leaves(xs)[0])
    nothing = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, num_places, one, (carry, nothing))


def _restarted(hidden: Array, carry: Array, start: Array | None) -> Array:
    """Returns the hidden state before a step: ``carry`` where the rows ``start``, all ``[R, ..]``."""
    return hidden if start is None else jnp.where(start[:, None], carry, hidden)


def _encode(encoder: LinearWeights | None, inputs: Array) -> Array:
    if encoder is None:
        return inputs
    return nn.relu(product(inputs, encoder.kernel) + encoder.bias[None, :])


def _gates(weights: GRUWeights, carry: Array, inputs: Array) -> _Gates:
    # The three gates' products are one, [R, F] x [F, 3H]. The reset gate scales the hidden state's term of the new gate
    # after its bias is added, as in torch; hence two bias vectors.
    from_inputs = product(inputs, weights.input_kernel) + weights.input_bias[None, :]
    from_hidden = product(carry, weights.hidden_kernel) + weights.hidden_bias[None, :]
    input_reset, input_update, input_new = jnp.split(from_inputs, 3, axis=-1)
    hidden_reset, hidden_update, hidden_new = jnp.split(from_hidden, 3, axis=-1)
    reset = nn.sigmoid(input_reset + hidden_reset)
    update = nn.sigmoid(input_update + hidden_update)
    return _Gates(reset, update, jnp.tanh(input_new + reset * hidden_new), hidden_new)


def _next_hidden(gates: _Gates, hidden: Array) -> Array:
    return (1 - gates.update) * gates.new + gates.update * hidden


class _Residuals(NamedTuple):
    """The inputs of the backward pass; ``encoded``, ``hiddens`` and the gates are those of every step."""

    encoder: LinearWeights | None
    weights: GRUWeights
    carry: Array
    inputs: Array
    starts: Array | None
    num_places: Array | None
    encoded: Array
    hiddens: Array
    gates: _Gates


def _unroll_forward(
    encoder: LinearWeights | None,
    weights: GRUWeights,
    carry: Array,
    inputs: Array,
    starts: Array | None,
    num_places: Array | None,
) -> tuple[Array, _Residuals]:
    def step(hidden: Array, at: tuple[Array, Array | None]) -> tuple[Array, tuple[Array, Array, _Gates]]:
        x, start = at
        hidden, encoded = _restarted(hidden, carry, start), _encode(encoder, x)
        gates = _gates(weights, hidden, encoded)
        hidden = _next_hidden(gates, hidden)
        return hidden, (encoded, hidden, gates)

    encoded, hiddens, gates = _scan(step, carry, (inputs, starts), num_places)[1]
    return hiddens, _Residuals(encoder, weights, carry, inputs, starts, num_places, encoded, hiddens, gates)


def _unroll_backward(
    residuals: _Residuals, d_hiddens: Array
) -> tuple[LinearWeights | None, GRUWeights, Array, Array, None, None]:
    """Backpropagates through time: ``[T, R, H]`` -> the gradients with respect to all differentiable arguments.

    ``d_before`` ``[R, H]`` is the gradient of the loss with respect to the hidden state that the current step outputs,
    as far as it comes from later steps.
    """
    # One loop from the last step to the first. Each step turns the gradient with respect to its hidden state into those
    # with respect to the gates before their nonlinearities (``d_from_inputs``, ``d_from_hidden``, ``[R, 3H]``), to its
    # input and to the hidden state before it, and adds its terms of the weights' gradients while its activations are in
    # the cache. Hidden states before a step are read from ``hiddens``, shifted by one, and not stored a second time.
    encoder, weights, carry, inputs, starts, num_places, encoded, hiddens, gates = residuals
    hidden_dim = carry.shape[-1]
    narrow = weights.hidden_kernel.dtype  # that of matrix products: bfloat16 with `compute_in("bfloat16")`
    # Transposed once: within the loop XLA would do it at every step.
    encoder_kernel = None if encoder is None else encoder.kernel.T
    input_kernel, hidden_kernel = weights.input_kernel.T, weights.hidden_kernel.T

    def step(grads: tuple[Array, Array, PyTree], at: Any) -> tuple[tuple[Array, Array, PyTree], Array]:
        d_carry, d_before, d_weights = grads
        index, x, start, features, d_hidden, (reset, update, new, hidden_new) = at
        before = jax.lax.dynamic_index_in_dim(hiddens, jnp.maximum(index - 1, 0), keepdims=False)
        before = _restarted(jnp.where(index > 0, before, carry), carry, start)
        d_hidden = d_before + d_hidden
        # From h = (1 - update) new + update before and new = tanh(.. + reset hidden_new), with sigmoid' = s (1 - s).
        d_new = d_hidden * (1 - update) * (1 - new * new)
        d_update = d_hidden * (before - new) * update * (1 - update)
        d_reset = d_new * hidden_new * reset * (1 - reset)
        d_hidden_new = d_new * reset
        d_from_inputs = jnp.concatenate([d_reset, d_update, d_new], axis=-1)
        d_from_hidden = jnp.concatenate([d_reset, d_update, d_hidden_new], axis=-1)
        # The two products differ in the new gate alone, where the reset gate scales the hidden state's term.
        d_encoded = product(d_from_inputs, input_kernel)
        if encoder is not None:
            d_encoded = jnp.where(features > 0, d_encoded, 0)
        d_input_bias = d_from_inputs.sum(0)
        d_step = (
            None if encoder is None else LinearWeights(product(x.T, d_encoded.astype(narrow)), d_encoded.sum(0)),
            GRUWeights(
                product(features.T, d_from_inputs.astype(narrow)),
                product(before.T, d_from_hidden.astype(narrow)),
                d_input_bias,
                jnp.concatenate([d_input_bias[:-hidden_dim], d_hidden_new.sum(0)]),
            ),
        )
        d_before = d_hidden * update + product(d_from_hidden, hidden_kernel)
        if start is not None:  # the step began an episode: this gradient is with respect to ``carry``
            d_carry += jnp.where(start[:, None], d_before, 0)
            d_before = jnp.where(start[:, None], 0, d_before)
        d_x = d_encoded if encoder_kernel is None else product(d_encoded, encoder_kernel)
        return (d_carry, d_before, jax.tree.map(jnp.add, d_weights, d_step)), d_x

    both = (encoder, weights)
    zero = jnp.zeros_like(carry)
    begin = zero, zero, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, carry.dtype), both)
    steps = jnp.arange(len(inputs)), inputs, starts, encoded, d_hiddens, gates
    (d_carry, d_before, d_both), d_inputs = _scan(step, begin, steps, num_places, reverse=True)
    # The sums have the dtype of ``carry``, float32; a gradient must have that of its argument.
    d_encoder, d_weights = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), d_both, both)
    return d_encoder, d_weights, d_carry + d_before, d_inputs, None, None


encoded_unroll.defvjp(_unroll_forward, _unroll_backward)


class GRU(nn.Module):
    """The unit's weights.

    Attributes:
        hidden_dim: width of the hidden state.
        is_orthogonal: whether each gate's kernels are orthogonal, and biases zero. Otherwise all weights are drawn from
            U(-1/sqrt(H), 1/sqrt(H)) as in torch.
    """

    hidden_dim: int
    is_orthogonal: bool = False

    @nn.compact
    def __call__(self, num_features: int) -> GRUWeights:
        """Returns the weights for inputs of this width."""
        kernel_init = bias_init = torch_uniform(self.hidden_dim)
        if self.is_orthogonal:
            kernel_init, bias_init = _orthogonal_gates, nn.initializers.zeros
        gates = 3 * self.hidden_dim
        return GRUWeights(
            self.param("input_kernel", kernel_init, (num_features, gates), jnp.float32),
            self.param("hidden_kernel", kernel_init, (self.hidden_dim, gates), jnp.float32),
            self.param("input_bias", bias_init, (gates,), jnp.float32),
            self.param("hidden_bias", bias_init, (gates,), jnp.float32),
        )


def _orthogonal_gates(key: PRNGKey, shape: tuple[int, int], dtype: Any) -> Array:
    """Draws the three gates' kernels ``[F, H]``, each orthogonal, and returns them side by side, ``[F, 3H]``."""
    draw = functools.partial(orthogonal(), shape=(shape[0], shape[1] // 3), dtype=dtype)
    return jax.vmap(draw, out_axes=1)(jax.random.split(key, 3)).reshape(shape)
