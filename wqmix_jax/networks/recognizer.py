"""The recogniser of potentially optimal joint actions of POWQMIX (arXiv 2405.08036)."""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax.numpy as jnp

from wqmix_jax.networks.linear import MLP, magnitude
from wqmix_jax.types import Array


class Recognized(NamedTuple):
    """The parts of Q_r.

    Attributes:
        v: ``[..]``, V(s).
        advantage: ``[..]``, sum_i lambda_i(s, u) (Q_i(u_i) - max_a Q_i(a)): 0 for the greedy joint action, at most 0
            for all others.
    """

    v: Array
    advantage: Array


class Recognizer(nn.Module):
    """Q_r(s, u) = V(s) + sum_i lambda_i(s, u) (Q_i(u_i) - max_a Q_i(a)), with lambda_i >= 0.

    The three-layer hypernetworks of state and joint action make ``|W|`` ``[N, embed_dim]`` and ``|w|``
    ``[embed_dim]``; lambda is ``|W| |w|``.

    Attributes:
        v_dim: width of V's two hidden layers.
        hypernet_dim: width of the hypernetworks' two hidden layers.
        embed_dim: inner width of the product that is lambda.
    """

    v_dim: int
    hypernet_dim: int
    embed_dim: int

    @nn.compact
    def __call__(self, advantages: Array, actions: Array, state: Array) -> Recognized:
        """Returns the parts of Q_r.

        Args:
            advantages: ``[.., N]``, Q_i(u_i) - max_a Q_i(a) of each agent.
            actions: ``[.., N, A]``, the joint action, one-hot.
            state: ``[.., D]``.
        """
        chex.assert_equal_shape_prefix([advantages, actions, state], advantages.ndim - 1)
        num_agents, hidden = advantages.shape[-1], (self.hypernet_dim, self.hypernet_dim)
        with_actions = jnp.concatenate([state, actions.reshape(*state.shape[:-1], -1)], axis=-1)
        w_1 = MLP((*hidden, num_agents * self.embed_dim), name="hyper_w_1")(with_actions)
        w_1 = magnitude(w_1).reshape(*advantages.shape, self.embed_dim)
        w_final = magnitude(MLP((*hidden, self.embed_dim), name="hyper_w_final")(with_actions))
        weights = (w_1 * w_final[..., None, :]).sum(-1)  # lambda, [.., N]
        v = MLP((self.v_dim, self.v_dim, 1), name="v")(state)
        return Recognized(v=v[..., 0], advantage=(weights * advantages).sum(-1))
