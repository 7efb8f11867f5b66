"""Nets of agents that share a latent: an output layer made of it, and a discriminator that recognises it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.agent import AgentForm
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.linear import MLP, Linear, product
from wqmix_jax.networks.recurrent import GRU, encoded_unroll
from wqmix_jax.types import Array, PRNGKey, PyTree


class LatentHead(nn.Module):
    """One agent's output layer, whose weights a linear hypernetwork makes of a one-hot latent and the agent's id.

    MAVEN's (Mahajan et al., arXiv 1910.07483; ``src/modules/agents/noise_rnn_agent.py`` of its code). It has no bias.

    Attributes:
        num_actions: ``A``.
        gain: None for torch's initialisation of the hypernetwork; otherwise its kernel is orthogonal with this gain.
        layer_norm: whether the hidden states are normalised first.
    """

    num_actions: int
    gain: float | None = None
    layer_norm: bool = False

    @nn.compact
    def __call__(self, hiddens: Array, identity: Array, latent: Array) -> Array:
        """Returns utilities ``[.., A]``.

        Args:
            hiddens: ``[.., H]``.
            identity: ``[N]``, the agent's id, one-hot.
            latent: ``[.., Z]``, one-hot.
        """
        num_latents, width = latent.shape[-1], hiddens.shape[-1]
        if self.layer_norm:
            hiddens = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(hiddens)
        hypernet = Linear(self.num_actions * width, self.gain, name="hypernet")
        kernel, bias = hypernet.weights(num_latents + len(identity))
        # The weights of all latents, [Z, A, H], and then the utilities of all, of which the latent selects one: a
        # product with H x (Z A) weights takes less than weights for each step would.
        identities = jnp.broadcast_to(identity[None, :], (num_latents, len(identity)))
        inputs = jnp.concatenate([jnp.eye(num_latents, dtype=hiddens.dtype), identities], axis=-1)
        weights = product(inputs, kernel) + bias[None, :]
        utilities = product(hiddens, weights.reshape(-1, width).T.astype(kernel.dtype))
        utilities = utilities.reshape(*latent.shape, self.num_actions)
        return jnp.where(latent[..., None] > 0, utilities, 0).sum(-2)


def with_latent_heads(agents: AgentForm, params: PyTree, key: PRNGKey, num_agents: int, num_latents: int) -> PyTree:
    """Adds a ``latent_head`` to each set of weights of `AgentForm.init`, whose own last layer then is idle."""
    inputs = jnp.zeros((1, agents.hidden_dim)), jnp.zeros(num_agents), jnp.zeros((1, num_latents))

    def draw(key: PRNGKey) -> PyTree:
        return {"latent_head": init_net(_head(agents), key, *inputs)}

    if agents.groups is None:
        return params | draw(key)
    [(stack, nets)] = params.items()  # one stack of all groups' weights
    return {stack: nets | jax.vmap(draw)(jax.random.split(key, max(agents.groups) + 1))}


def latent_utilities(agents: AgentForm, params: PyTree, hiddens: Array, latent: Array) -> Array:
    """Returns the utilities of all agents, ``[.., N, A]``.

    Args:
        agents: their form.
        params: see `with_latent_heads`.
        hiddens: ``[.., N, H]``.
        latent: ``[.., Z]``, one-hot, the same for all agents.
    """

    def one_agent(params: PyTree, hiddens: Array, identity: Array) -> Array:
        return apply_net(_head(agents), params["latent_head"], hiddens, identity, latent)

    in_axes = (None if agents.groups is None else 0, -2, 0)
    identities = jnp.eye(hiddens.shape[-2], dtype=hiddens.dtype)
    return jax.vmap(one_agent, in_axes, out_axes=-2)(agents.by_agent(params), hiddens, identities)


def _head(agents: AgentForm) -> LatentHead:
    return LatentHead(agents.num_actions, agents.head_gain, agents.layer_norm and agents.recurrent)


class Discriminator(nn.Module):
    """Logits of the latent, from the agents' policies and the state.

    Attributes:
        num_latents: ``Z``.
        hidden_dim: width of the hidden layers.
        num_layers: hidden layers.
        memory_dim: width of a GRU over the episode before them, ``M``; 0 for none.
    """

    num_latents: int
    hidden_dim: int
    num_layers: int
    memory_dim: int = 0

    @nn.compact
    def __call__(self, features: Array, starts: Array | None = None, num_places: Array | None = None) -> Array:
        """Returns ``[B, T, Z]``: of each step alone, or, with a GRU, of the episode up to it.

        Args:
            features: ``[B, T, F]``.
            starts: ``[B, T]`` bool, where an episode begins; None for the first step alone.
            num_places: scalar int32, the number of steps that the GRU takes; None for all.
        """
        if self.memory_dim:
            weights = GRU(self.memory_dim, name="gru")(features.shape[-1])
            # It starts at ones, as in MAVEN's code. Time comes first inside.
            carry = jnp.ones((len(features), self.memory_dim), features.dtype)
            starts = None if starts is None else starts.swapaxes(0, 1)
            hiddens = encoded_unroll(None, weights, carry, features.swapaxes(0, 1), starts, num_places)
            features = hiddens.swapaxes(0, 1)
        return MLP((self.hidden_dim,) * self.num_layers + (self.num_latents,), name="mlp")(features)
