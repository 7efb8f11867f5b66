"""The unrestricted central estimate Q* of the paper."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import Linear, TwoLayer
from wqmix_jax.types import Array


class FeedForwardQStar(nn.Module):
    """Three ReLU layers on the state and the chosen utilities of Q*'s own agents, plus V(s).

    Figure 1 (right) of the paper; V(s) is in the authors' code (``src/modules/mixers/qmix_central_no_hyper.py``) only.
    """

    hidden_dim: int

    @nn.compact
    def __call__(self, chosen_qs: Array, state: Array) -> Array:
        """``[.., N]``, ``[.., D]`` -> ``[..]``, without any restriction of sign."""
        chex.assert_equal_shape_prefix([chosen_qs, state], chosen_qs.ndim - 1)
        hidden = jnp.concatenate([state, chosen_qs], axis=-1)
        for layer in range(3):
            hidden = nn.relu(Linear(self.hidden_dim, name=f"net_{layer}")(hidden))
        v = TwoLayer(self.hidden_dim, 1, name="v")(state)
        return (Linear(1, name="net_3")(hidden) + v)[..., 0]


class AttentionQStar(nn.Module):
    """Heads that attend to the agents in the place of the first layer, two ReLU layers on them, plus V(s).

    Figure 6 of the paper (appendix B): a hypernetwork makes the first layer's weights of the state, and a softmax over
    the agents normalises them, one head for each unit. The state reaches the rest through V(s) alone
    (``src/modules/mixers/qmix_central_attention.py`` of the authors' code).

    Attributes:
        hidden_dim: heads, and the width of the other layers.
        hypernet_dim: hidden width of the hypernetwork.
    """

    hidden_dim: int
    hypernet_dim: int

    @nn.compact
    def __call__(self, chosen_qs: Array, state: Array) -> Array:
        """``[.., N]``, ``[.., D]`` -> ``[..]``, without any restriction of sign."""
        chex.assert_equal_shape_prefix([chosen_qs, state], chosen_qs.ndim - 1)
        num_agents = chosen_qs.shape[-1]
        logits = TwoLayer(self.hypernet_dim, num_agents * self.hidden_dim, name="attention")(state)
        attention = jax.nn.softmax(logits.reshape(*state.shape[:-1], num_agents, self.hidden_dim), axis=-2)
        hidden = (chosen_qs[..., None] * attention).sum(-2)
        for layer in range(2):
            hidden = nn.relu(Linear(self.hidden_dim, name=f"net_{layer}")(hidden))
        v = TwoLayer(self.hidden_dim, 1, name="v")(state)
        return (Linear(1, name="net_2")(hidden) + v)[..., 0]
