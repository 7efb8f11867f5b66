"""Recurrent agents as one kernel, which holds their weights on chip and contains the loop over time.

No algorithm uses it: it was compared with the scan on a CPU and compiled for a TPU and a GPU, but not timed on either.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import LinearWeights
from wqmix_jax.networks.persistent_kernels import KernelOptions, KernelWeights, backward_call, forward_call, padding
from wqmix_jax.networks.recurrent import GRUWeights
from wqmix_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def persistent_utilities(
    options: KernelOptions,
    encoder: LinearWeights,
    unit: GRUWeights,
    head: LinearWeights,
    carry: Array,
    features: Array,
    num_places: Array,
) -> Array:
    """Returns the utilities that ``G`` recurrent agents of equal shape compute from the same sequence.

    Each is what `RecurrentAgent` computes. Only the hidden states of the trained nets are stored; the backward pass
    computes the gates again.

    Args:
        options: see `KernelOptions`.
        encoder: the linear layers before the units, ``[G, I, F]`` and ``[G, F]``.
        unit: see `GRUWeights`, each with a leading axis ``G``.
        head: the linear layers after the units, ``[G, H, A]`` and ``[G, A]``.
        carry: ``[G, R, H]``, the hidden states before the first step.
        features: ``[T, R, I]``, data: its gradient is zero.
        num_places: scalar int32, the number of steps that are taken, at least 1. The hidden states of the others are
            zero, their utilities the head's bias.

    Returns:
        ``[G, T, R, A]``, whose gradients reach the weights of the first ``num_trained`` nets alone.
    """
    weights = _padded_weights(options, encoder, unit, head)
    inputs = _padded_inputs(options, carry, features)
    outputs = forward_call(options, weights, *inputs, num_places, head.bias.shape[-1], store=False)
    return _utilities(outputs[0], features)


def _padded_weights(
    options: KernelOptions, encoder: LinearWeights, unit: GRUWeights, head: LinearWeights
) -> KernelWeights:
    for hidden_dim in (encoder.bias.shape[-1], unit.hidden_kernel.shape[1]):
        if padding(options, hidden_dim):
            raise ValueError(f"hidden_dim={hidden_dim}: must be a power of two of at least 16 for a GPU's kernel")
    more_inputs, more_actions = padding(options, encoder.kernel.shape[1]), padding(options, head.bias.shape[-1])
    kernels = [
        jnp.pad(encoder.kernel, ((0, 0), (0, more_inputs), (0, 0))),
        encoder.bias[:, None],
        unit.input_kernel,
        unit.input_bias[:, None],
        unit.hidden_kernel,
        unit.hidden_bias[:, None],
        jnp.pad(head.kernel, ((0, 0), (0, 0), (0, more_actions))),
        jnp.pad(head.bias, ((0, 0), (0, more_actions)))[:, None],
    ]
    return KernelWeights(*(leaf.swapaxes(1, 2) for leaf in kernels))


def _padded_inputs(options: KernelOptions, carry: Array, features: Array) -> tuple[Array, Array]:
    """Returns ``carry`` as ``[G, H, R]`` and ``features`` as ``[T, I, R]``, with zeros appended."""
    more_rows = -features.shape[1] % options.rows
    features = jnp.pad(features, ((0, 0), (0, more_rows), (0, 0)))
    return jnp.pad(carry, ((0, 0), (0, more_rows), (0, 0))).swapaxes(1, 2), features.swapaxes(1, 2)


def _utilities(outputs: Array, features: Array) -> Array:
    return outputs[..., : features.shape[1]].swapaxes(2, 3)


def _forward(options: KernelOptions, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    encoder, unit, head, carry, features, num_places = args
    weights = _padded_weights(options, encoder, unit, head)
    inputs = _padded_inputs(options, carry, features)
    outputs, hiddens = forward_call(options, weights, *inputs, num_places, head.bias.shape[-1], store=True)
    return _utilities(outputs, features), (*args[:3], carry, *inputs, num_places, hiddens)


def _backward(options: KernelOptions, residuals: tuple[Any, ...], d_utilities: Array) -> tuple[Any, ...]:
    *nets, carry, padded_carry, features, num_places, hiddens = residuals
    weights, to_nets = jax.vjp(functools.partial(_padded_weights, options), *nets)
    d_utilities, rows = d_utilities[: options.num_trained], carry.shape[1]
    more_rows = ((0, 0), (0, 0), (0, features.shape[-1] - rows), (0, 0))
    d_outputs = jnp.pad(d_utilities, more_rows).swapaxes(2, 3)
    sums = backward_call(options, weights, padded_carry, features, num_places, hiddens, d_outputs)
    # The kernel's programs add up steps alone: what remains are blocks of rows, and rows themselves for biases.
    d_gates, d_encoded = (leaf.sum(-1, keepdims=True) for leaf in sums[:2])
    d_carry, *d_kernels = sums[2], *(leaf.sum(1) for leaf in sums[3:])
    d_both, d_new, d_hidden_new = jnp.split(d_gates, [2 * carry.shape[2], 3 * carry.shape[2]], axis=1)
    d_inputs_bias, d_hidden_bias = (jnp.concatenate([d_both, last], axis=1) for last in (d_new, d_hidden_new))
    more_actions = ((0, 0), (0, weights.head.shape[1] - d_utilities.shape[-1]))
    d_head_bias = jnp.pad(d_utilities.sum((1, 2)), more_actions)[..., None]  # also of steps that aren't taken
    d_biases = d_encoded, d_inputs_bias, d_hidden_bias, d_head_bias
    flat = [leaf for pair in zip(d_kernels, d_biases, strict=True) for leaf in pair]

    def for_all(grad: Array, value: Array) -> Array:
        others = jnp.zeros((len(value) - len(grad), *grad.shape[1:]), value.dtype)
        return jnp.concatenate([grad.astype(value.dtype), others])

    d_nets = to_nets(jax.tree.map(for_all, KernelWeights(*flat), weights))
    return *d_nets, for_all(d_carry[..., :rows].swapaxes(1, 2), carry), None, None


persistent_utilities.defvjp(_forward, _backward)
