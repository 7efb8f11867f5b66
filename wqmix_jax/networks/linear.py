"""Linear layers and their company, initialised and differentiated as torch does."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.types import Array


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default for weights and biases alike."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def magnitude(inputs: Array) -> Array:
    """The absolute value, whose slope at zero is 0 as in torch; that of `jnp.abs` is 1."""
    return inputs * jnp.sign(inputs)


def product(inputs: Array, kernel: Array) -> Array:
    """``inputs @ kernel``, both in the dtype of the kernel, summed and given in that of the inputs."""
    return jnp.matmul(inputs.astype(kernel.dtype), kernel, preferred_element_type=inputs.dtype)


class Linear(nn.Module):
    """``[.., F] -> [.., features]``; flax's Dense can't initialise its bias from the fan-in."""

    features: int

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Applies the layer."""
        init = torch_uniform(inputs.shape[-1])
        kernel = self.param("kernel", init, (inputs.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        outputs = product(inputs, kernel)
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))


class TwoLayer(nn.Module):
    """Linear-ReLU-Linear, ``[.., F] -> [.., features]``."""

    hidden_dim: int
    features: int

    def setup(self) -> None:
        """Names the layers."""
        self.hidden = Linear(self.hidden_dim)
        self.out = Linear(self.features)

    def __call__(self, inputs: Array) -> Array:
        """Applies both layers."""
        return self.out(nn.relu(self.hidden(inputs)))


class MLP(nn.Module):
    """Linear layers with ReLUs between them, ``[.., F] -> [.., features[-1]]``."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Applies all layers."""
        outputs = Linear(self.features[0], name="layer_0")(inputs)
        for layer, width in enumerate(self.features[1:], start=1):
            outputs = Linear(width, name=f"layer_{layer}")(nn.relu(outputs))
        return outputs
