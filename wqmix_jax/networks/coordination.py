"""The payoff network of deep coordination graphs (Boehmer et al., arXiv 1910.00091)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.networks.linear import Linear, product
from wqmix_jax.types import Array


class PairPayoffs(nn.Module):
    """Payoffs of pairs of agents by their hidden states, the same network for all pairs.

    It computes both orders of a pair and takes their mean, so that a payoff doesn't depend on the order of its agents.

    Attributes:
        edges: the pairs.
        num_actions: ``A``.
        rank: a payoff is a sum of so many outer products of vectors; None for any ``A`` x ``A`` matrix.
        hidden_dims: widths of the hidden layers.
    """

    edges: tuple[tuple[int, int], ...]
    num_actions: int
    rank: int | None = None
    hidden_dims: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Returns the payoffs: ``[.., N, H]`` -> ``[.., E, A, A]``, first the action of the edge's first agent."""
        num_outputs = self.num_actions**2 if self.rank is None else 2 * self.rank * self.num_actions
        widths = (*self.hidden_dims, num_outputs)
        # The first layer's product with [h_i; h_j] is a sum of products with h_i and h_j, which are computed once for
        # each agent and not once for each pair.
        kernel, bias = Linear(widths[0], name="layer_0").weights(2 * hidden.shape[-1])
        parts = [product(hidden, part) for part in jnp.split(kernel, 2)]  # [.., N, F]
        both_orders = np.array([*self.edges, *(edge[::-1] for edge in self.edges)])  # [2E, 2]
        one, other = (_features_by_number(part, agents) for part, agents in zip(parts, both_orders.T, strict=True))
        outputs = one + other + bias.reshape((1,) * (hidden.ndim - 1) + (-1,))  # [.., 2E, F]
        for layer, width in enumerate(widths[1:], start=1):
            outputs = Linear(width, name=f"layer_{layer}")(nn.relu(outputs))
        ordered, exchanged = jnp.split(self._matrices(outputs), 2, axis=-3)
        return (ordered + exchanged.swapaxes(-1, -2)) / 2

    def _matrices(self, outputs: Array) -> Array:
        """Returns a matrix for each output vector: ``[.., F]`` -> ``[.., A, A]``."""
        if self.rank is None:
            return outputs.reshape(*outputs.shape[:-1], self.num_actions, self.num_actions)
        vectors = outputs.reshape(*outputs.shape[:-1], self.rank, 2, self.num_actions)
        return jnp.einsum("...ka,...kb->...ab", vectors[..., 0, :], vectors[..., 1, :])


def _features_by_number(features: Array, agents: np.ndarray) -> Array:
    """Returns the features of each of the agents: ``[.., N, F]``, ``[K]`` -> ``[.., K, F]``."""
    # An exact product, since a gather's gradient is a scatter, which is slow on every backend.
    is_agent = jnp.asarray(agents[:, None] == np.arange(features.shape[-2]), features.dtype)
    return jnp.einsum("kn,...nf->...kf", is_agent, features, precision=jax.lax.Precision.HIGHEST)
