"""The duplex duelling mixer of QPLEX (Wang et al., arXiv 2008.01062)."""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.networks.linear import MLP, TwoLayer, magnitude
from wqmix_jax.types import Array

TINY = 1e-10
"""Keeps the weights of utilities and heads positive, as in the authors' code."""


class Duel(NamedTuple):
    """The two parts of Q_tot.

    Attributes:
        value: ``[..]``, the sum of the transformed utilities of the actions taken.
        advantage: ``[..]``, what joint actions with an action that isn't greedy have beyond it; 0 for the greedy one.
    """

    value: Array
    advantage: Array


class AdvantageWeights(nn.Module):
    """lambda_i(s, u) > 0, a sum over heads of key x agent x action (``src/modules/mixers/dmaq_si_weight.py``).

    Attributes:
        hidden_dim: width of the three-layer networks.
        num_heads: heads.
    """

    hidden_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, state: Array, actions: Array) -> Array:
        """Returns each agent's weight: ``[.., D]``, one-hot ``[.., N, A]`` -> ``[.., N]``."""
        num_agents = actions.shape[-2]
        with_actions = jnp.concatenate([state, actions.reshape(*state.shape[:-1], -1)], axis=-1)
        keys = magnitude(self._heads("key_extractors", 1)(state)) + TINY
        agents = nn.sigmoid(self._heads("agents_extractors", num_agents)(state))
        taken = nn.sigmoid(self._heads("action_extractors", num_agents)(with_actions))
        return (keys * agents * taken).sum(0)

    def _heads(self, name: str, features: int) -> Any:
        """Creates one network per head, outputs ``[K, .., features]``; their parameters are stacked."""
        heads: Any = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # type: ignore[arg-type] (flax declares no type, and its default is an integer)
            axis_size=self.num_heads,
        )
        return heads((self.hidden_dim, self.hidden_dim, features), name=name)


class QPLEXMixer(nn.Module):
    """Q_tot = sum_i q_i + sum_i (lambda_i(s, u) - 1) (q_i - max q_i), with q_i = w_i(s) Q_i + b_i(s), w_i > 0.

    After ``src/modules/mixers/dmaq_general.py``. The advantages q_i - max q_i are constants to the gradient.

    Attributes:
        hypernet_dim: hidden width of the transformation's two-layer hypernetworks.
        attention_dim: see `AdvantageWeights`.
        num_heads: see `AdvantageWeights`.
    """

    hypernet_dim: int
    attention_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, chosen_qs: Array, greedy_qs: Array, actions: Array, state: Array) -> Duel:
        """Returns the two parts of Q_tot.

        Args:
            chosen_qs: ``[.., N]``, utilities of the joint action.
            greedy_qs: ``[.., N]``, each agent's largest.
            actions: ``[.., N, A]``, the joint action, one-hot.
            state: ``[.., D]``.
        """
        chex.assert_equal_shape([chosen_qs, greedy_qs])
        chex.assert_equal_shape_prefix([chosen_qs, state], chosen_qs.ndim - 1)
        num_agents = chosen_qs.shape[-1]
        # Utilities are scaled and shifted by the state, with positive scales, so that each agent's order stays.
        w = magnitude(TwoLayer(self.hypernet_dim, num_agents, name="hyper_w_final")(state)) + TINY
        b = TwoLayer(self.hypernet_dim, num_agents, name="v")(state)
        weights = AdvantageWeights(self.attention_dim, self.num_heads, name="si_weight")(state, actions)
        # At most 0, and 0 for greedy actions; positive weights keep it so, and the greedy joint action the best.
        advantages = jax.lax.stop_gradient((w * chosen_qs + b) - (w * greedy_qs + b))
        return Duel(value=(w * chosen_qs + b).sum(-1), advantage=(advantages * (weights - 1)).sum(-1))
