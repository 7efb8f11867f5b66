"""Stochastic policies over discrete actions: an epsilon floor, draws from given noise, and gradients through a draw."""

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array


def epsilon_floor(logits: Array, avail_actions: Array, epsilon: Array) -> Array:
    """(1 - epsilon) softmax(logits) + epsilon / A over all ``A`` actions, then restricted to the available ones.

    The floor of COMA (Foerster et al., arXiv 1705.08926), which appendix B of the paper takes over. As in the authors'
    code, softmax and floor know nothing of availability; masking and renormalising come after them.

    Args:
        logits: ``[.., A]``.
        avail_actions: ``[.., A]`` bool.
        epsilon: scalar in [0, 1].

    Returns:
        Probabilities ``[.., A]``; ones where nothing is available (padding), so that logarithms stay finite.
    """
    floored = (1 - epsilon) * jax.nn.softmax(logits) + epsilon / logits.shape[-1]
    allowed = jnp.where(avail_actions, floored, 0)
    playable = avail_actions.any(-1, keepdims=True)
    total = jnp.where(playable, allowed.sum(-1, keepdims=True), 1)  # a division by zero would spoil the gradient
    return jnp.where(playable, allowed / total, 1)


def draw(policy: Array, gumbel: Array) -> Array:
    """An action of each policy: ``[.., A]`` probabilities, ``[.., A]`` standard Gumbel noise -> ``[..]`` int32.

    An action of probability 0 is never drawn.
    """
    return jnp.argmax(jnp.log(jax.lax.stop_gradient(policy)) + gumbel, axis=-1).astype(jnp.int32)


def straight_through(logits: Array, gumbel: Array, temperature: Array) -> Array:
    """A drawn action as a one-hot vector whose gradient is that of the Gumbel-softmax (arXiv 1611.01144).

    Args:
        logits: ``[.., A]``.
        gumbel: ``[.., A]``, standard Gumbel noise.
        temperature: scalar > 0, of the softmax that the gradient is taken of; the draw doesn't depend on it.
    """
    perturbed = logits + gumbel
    soft = jax.nn.softmax(perturbed / temperature)
    hard = jax.nn.one_hot(perturbed.argmax(-1), perturbed.shape[-1], dtype=soft.dtype)
    return soft + jax.lax.stop_gradient(hard - soft)
