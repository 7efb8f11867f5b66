"""The joint network of QTRAN-base (Son et al., arXiv 1905.05408)."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax.numpy as jnp

from wqmix_jax.networks.linear import MLP, TwoLayer
from wqmix_jax.types import Array


class JointValue(NamedTuple):
    """The joint network's values of a joint action.

    Attributes:
        q: ``[..]``, Q(s, u), unrestricted.
        v: ``[..]``, V(s), which closes the gap between Q and the sum of the utilities.
    """

    q: Array
    v: Array


class QTRANJoint(nn.Module):
    """Q of the state and the sum of all agents' encodings, and V of the state (``src/modules/mixers/qtran.py``).

    An agent's encoding is made of its hidden state and action.

    Attributes:
        hidden_dim: width of both networks.
        num_layers: hidden layers of both networks: 2 in the authors' ``network_size: small``, 3 in ``big``.
    """

    hidden_dim: int
    num_layers: int

    @nn.compact
    def __call__(self, hidden: Array, actions: Array, state: Array) -> JointValue:
        """Returns Q and V: ``[.., N, H]``, one-hot ``[.., N, A]``, ``[.., D]`` -> ``[..]`` each."""
        chex.assert_equal_shape_prefix([hidden, actions], hidden.ndim - 1)
        chex.assert_equal_shape_prefix([hidden, state], state.ndim - 1)
        features = (self.hidden_dim,) * self.num_layers + (1,)
        pairs = jnp.concatenate([hidden, actions], axis=-1)
        # The sum over agents makes Q independent of their number and order.
        encoding = TwoLayer(pairs.shape[-1], pairs.shape[-1], name="action_encoding")(pairs).sum(-2)
        q = MLP(features, name="q")(jnp.concatenate([state, encoding], axis=-1))
        v = MLP(features, name="v")(state)
        return JointValue(q[..., 0], v[..., 0])
