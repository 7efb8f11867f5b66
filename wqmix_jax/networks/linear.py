"""Linear layers and MLPs with PyTorch's initialisation and gradients."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.functional import block_form
from wqmix_jax.types import Array, PRNGKey


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Returns the initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for weights and biases alike."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def orthogonal(gain: float = 1.0) -> nn.initializers.Initializer:
    """Returns flax's orthogonal initialiser, which under `jax.vmap` draws one matrix after the other.

    On CPUs, jaxlib decomposes a stack of matrices in a thread of the pool of all devices, which waits for other threads
    of that pool. Where several devices draw stacks (seeds, gates, separate agents) at the same time, all threads may
    wait for each other forever. A single matrix needs no other thread.
    """
    initializer = nn.initializers.orthogonal(gain)

    def draw(key: PRNGKey, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.custom_batching.sequential_vmap(lambda key: initializer(key, shape, dtype))(key)

    return draw


def magnitude(inputs: Array) -> Array:
    """Returns the absolute value, whose slope at zero is 0 as in torch; that of `jnp.abs` is 1."""
    return inputs * jnp.sign(inputs)


def product(inputs: Array, kernel: Array) -> Array:
    """Returns ``inputs @ kernel``, both in the kernel's dtype, summed and returned in that of the inputs."""
    return jnp.matmul(inputs.astype(kernel.dtype), kernel, preferred_element_type=inputs.dtype)


@jax.custom_vjp
def _product_side_by_side(kernel: Array, *inputs: Array) -> Array:
    """Returns the `product` of the concatenated inputs, whose gradient with respect to each is a separate product.

    Autodiff would compute the gradient with respect to all of them in one product, even if most are data, for example a
    state.
    """
    return product(jnp.concatenate(inputs, axis=-1), kernel)


def _forward(kernel: Array, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _product_side_by_side(kernel, *inputs), (kernel, *inputs)


def _backward(residuals: tuple[Array, ...], d_outputs: Array) -> tuple[Array, ...]:
    # The kernel's gradient is one product over all rows; each input's is a product with its rows of the kernel, and XLA
    # removes those of inputs that need no gradient.
    kernel, *inputs = residuals
    rows = jnp.concatenate(inputs, axis=-1).reshape(-1, len(kernel))
    d_kernel = product(d_outputs.reshape(len(rows), -1).T, rows.astype(kernel.dtype)).T
    parts = jnp.split(kernel, _ends(inputs))
    return d_kernel.astype(kernel.dtype), *(product(d_outputs, part.T) for part in parts)


def _ends(inputs: Sequence[Array]) -> list[int]:
    """Returns the row of the kernel after the last of each input but the last."""
    return list(itertools.accumulate(part.shape[-1] for part in inputs[:-1]))


_product_side_by_side.defvjp(_forward, _backward)


class LinearWeights(NamedTuple):
    """A layer's ``kernel`` ``[I, F]`` and ``bias`` ``[F]``."""

    kernel: Array
    bias: Array


class Linear(nn.Module):
    """A linear layer, ``[.., I] -> [.., features]``; flax's Dense can't initialise its bias from the fan-in.

    Attributes:
        features: width of the outputs.
        gain: None for torch's initialisation; otherwise the kernel is orthogonal with this gain, and the bias zero.
    """

    features: int
    gain: float | None = None

    @nn.compact
    def weights(self, num_inputs: int) -> LinearWeights:
        """Returns the weights for inputs of this width."""
        kernel_init = bias_init = torch_uniform(num_inputs)
        if self.gain is not None:
            kernel_init, bias_init = orthogonal(self.gain), nn.initializers.zeros
        return LinearWeights(
            self.param("kernel", kernel_init, (num_inputs, self.features), jnp.float32),
            self.param("bias", bias_init, (self.features,), jnp.float32),
        )

    def __call__(self, *inputs: Array) -> Array:
        """Applies the layer to ``[.., I_1]``, ``[.., I_2]``, .. concatenated."""
        kernel, bias = self.weights(sum(part.shape[-1] for part in inputs))
        if len(inputs) == 1:
            outputs = product(*inputs, kernel)
        elif block_form() is None:
            outputs = _product_side_by_side(kernel, *inputs)
        else:  # concatenated inputs would be one more array in an accelerator's memory
            parts = zip(inputs, jnp.split(kernel, _ends(inputs)), strict=True)
            outputs = functools.reduce(jnp.add, [product(*part) for part in parts])
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))


class TwoLayer(nn.Module):
    """Linear-ReLU-Linear, ``[.., I] -> [.., features]``."""

    hidden_dim: int
    features: int

    def setup(self) -> None:
        """Creates the layers; their parameters have the names of the attributes."""
        self.hidden = Linear(self.hidden_dim)
        self.out = Linear(self.features)

    def __call__(self, inputs: Array) -> Array:
        """Returns ``[.., features]`` of ``[.., I]``."""
        return self.out(nn.relu(self.hidden(inputs)))


class MLP(nn.Module):
    """Linear layers with ReLUs between them, ``[.., I] -> [.., features[-1]]``."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Returns ``[.., features[-1]]`` of ``[.., I]``; the last layer has no ReLU."""
        outputs = Linear(self.features[0], name="layer_0")(inputs)
        for layer, width in enumerate(self.features[1:], start=1):
            outputs = Linear(width, name=f"layer_{layer}")(nn.relu(outputs))
        return outputs
