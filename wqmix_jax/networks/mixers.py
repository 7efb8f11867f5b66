"""Monotonic mixers: chosen utilities and state to Q_tot."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import Linear, TwoLayer, magnitude
from wqmix_jax.types import Array


class VDNMixer(nn.Module):
    """Q_tot is the sum of the utilities (Sunehag et al., arXiv 1706.05296)."""

    def __call__(self, chosen_qs: Array, state: Array) -> Array:
        """Returns Q_tot: ``[.., N]``, ``[.., D]`` -> ``[..]``."""
        del state
        return chosen_qs.sum(-1)


class QMIXMixer(nn.Module):
    """A two-layer mixing network whose non-negative weights come from the state (Rashid et al., arXiv 1803.11485).

    Attributes:
        embed_dim: width of the mixing network.
        hypernet_dim: hidden width of the two-layer hypernetworks; None: linear ones, PyMARL's ``hypernet_layers: 1``.
    """

    embed_dim: int
    hypernet_dim: int | None

    def hypernet(self, features: int, name: str) -> nn.Module:
        """Returns a hypernetwork of the weights."""
        return (
            Linear(features, name=name)
            if self.hypernet_dim is None
            else TwoLayer(self.hypernet_dim, features, name=name)
        )

    @nn.compact
    def __call__(self, chosen_qs: Array, state: Array) -> Array:
        """Returns Q_tot, non-decreasing in every utility: ``[.., N]``, ``[.., D]`` -> ``[..]``."""
        chex.assert_equal_shape_prefix([chosen_qs, state], chosen_qs.ndim - 1)
        num_agents = chosen_qs.shape[-1]
        # Hypernetworks make the weights of the state; their absolute values keep the mix monotonic.
        w_1 = self.hypernet(num_agents * self.embed_dim, "hyper_w_1")(state)
        w_1 = magnitude(w_1).reshape(*state.shape[:-1], num_agents, self.embed_dim)
        b_1 = Linear(self.embed_dim, name="hyper_b_1")(state)
        w_final = magnitude(self.hypernet(self.embed_dim, "hyper_w_final")(state))
        v = TwoLayer(self.embed_dim, 1, name="v")(state)
        # [.., N] x [.., N, embed_dim] -> [.., embed_dim]
        hidden = nn.elu(jnp.einsum("...n,...ne->...e", chosen_qs, w_1) + b_1)
        return (hidden * w_final).sum(-1) + v[..., 0]


class QattenMixer(nn.Module):
    """Heads of attention over agents, weighed by the state, plus c(s) (Qatten, Yang et al., arXiv 2002.03939).

    A head's query comes from the state and its keys from the agents. The paper makes keys of the units' features, cut
    from SMAC's state; here each agent's features are given, since other environments' states can't be cut.

    Attributes:
        embed_dim: width of queries and keys, hidden width of c(s).
        hypernet_dim: hidden width of the queries' and the heads' weights.
        num_heads: heads.
    """

    embed_dim: int
    hypernet_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, chosen_qs: Array, state: Array, features: Array) -> Array:
        """Returns Q_tot, non-decreasing in every utility: ``[.., N]``, ``[.., D]``, ``[.., N, I]`` -> ``[..]``."""
        chex.assert_equal_shape_prefix([chosen_qs, state, features], chosen_qs.ndim - 1)
        heads = (self.num_heads, self.embed_dim)
        query = TwoLayer(self.hypernet_dim, self.num_heads * self.embed_dim, name="query")(state)
        keys = Linear(self.num_heads * self.embed_dim, name="key")(features)
        query, keys = query.reshape(*state.shape[:-1], *heads), keys.reshape(*features.shape[:-1], *heads)
        # Each head attends to the agents, [.., K, N]; its value is a weighted mean of the utilities, [.., K].
        logits = jnp.einsum("...he,...nhe->...hn", query, keys) / self.embed_dim**0.5
        head_qs = (jax.nn.softmax(logits) * chosen_qs[..., None, :]).sum(-1)
        weights = magnitude(TwoLayer(self.hypernet_dim, self.num_heads, name="head")(state))
        c = TwoLayer(self.embed_dim, 1, name="c")(state)
        return (weights * head_qs).sum(-1) + c[..., 0]
