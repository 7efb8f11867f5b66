"""The unrestricted central estimate Q* of the paper."""

import chex
import flax.linen as nn
import jax

from wqmix_jax.networks.linear import Linear, TwoLayer
from wqmix_jax.types import Array


class FeedForwardQStar(nn.Module):
    """Three ReLU layers on the state and the chosen utilities of Q*'s agents, plus V(s).

    Figure 1 (right) of the paper; V(s) is in the authors' code (``src/modules/mixers/qmix_central_no_hyper.py``) only.
    """

    hidden_dim: int

    def setup(self) -> None:
        """Creates the layers; their parameters have the names of the attributes."""
        self.net_0 = Linear(self.hidden_dim)
        self.net_1 = Linear(self.hidden_dim)
        self.net_2 = Linear(self.hidden_dim)
        self.net_3 = Linear(1)
        self.v = TwoLayer(self.hidden_dim, 1)

    def __call__(self, chosen_qs: Array, state: Array) -> Array:
        """Returns Q*(s, u), whose weights may have any sign: ``[.., N]``, ``[.., D]`` -> ``[..]``."""
        return self._after_first_layer(self._first_layer(chosen_qs, state)) + self.v(state)[..., 0]

    def deviations(self, agent_qs: Array, chosen_qs: Array, state: Array) -> Array:
        """Returns the estimates of all joint actions in which one agent alone deviates.

        The first layer is computed once and corrected by what one utility changes, and V(s) doesn't depend on them.

        Args:
            agent_qs: ``[.., N, A]``, the utilities that an agent may put in the place of its chosen one.
            chosen_qs: ``[.., N]``.
            state: ``[.., D]``.

        Returns:
            The outputs of `__call__` with ``chosen_qs[.., n]`` replaced by ``agent_qs[.., n, a]``, ``[.., N, A]``.
        """
        num_agents = chosen_qs.shape[-1]
        first = self._first_layer(chosen_qs, state)
        # [.., N, A, 1] x [N, 1, hidden]: what another utility of one agent changes in the first layer.
        kernel = self.net_0.variables["params"]["kernel"][-num_agents:]  # the rows of the utilities
        change = (agent_qs - chosen_qs[..., None])[..., None] * kernel.reshape(
            (1,) * (agent_qs.ndim - 2) + (num_agents, 1, -1)
        )
        return self._after_first_layer(first[..., None, None, :] + change) + self.v(state)[..., None]

    def deviations_of(self, agent: Array, agent_qs: Array, chosen_qs: Array, state: Array) -> Array:
        """Returns the estimates of the joint actions in which this agent deviates, ``[.., A]``.

        Args:
            agent: scalar int32.
            agent_qs: see `deviations`, and so for the others.
            chosen_qs: ``[.., N]``.
            state: ``[.., D]``.
        """
        kernel = self.net_0.variables["params"]["kernel"][-chosen_qs.shape[-1] :][agent]
        its_qs = jax.lax.dynamic_index_in_dim(agent_qs, agent, axis=-2, keepdims=False)
        chosen = jax.lax.dynamic_index_in_dim(chosen_qs, agent, axis=-1)
        change = (its_qs - chosen)[..., None] * kernel.reshape((1,) * its_qs.ndim + (-1,))
        return self._after_first_layer(self._first_layer(chosen_qs, state)[..., None, :] + change) + self.v(state)

    def _first_layer(self, chosen_qs: Array, state: Array) -> Array:
        chex.assert_equal_shape_prefix([chosen_qs, state], chosen_qs.ndim - 1)
        return self.net_0(state, chosen_qs)

    def _after_first_layer(self, first: Array) -> Array:
        hidden = nn.relu(self.net_1(nn.relu(first)))
        return self.net_3(nn.relu(self.net_2(hidden)))[..., 0]


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
        """Returns Q*(s, u), whose weights may have any sign: ``[.., N]``, ``[.., D]`` -> ``[..]``."""
        chex.assert_equal_shape_prefix([chosen_qs, state], chosen_qs.ndim - 1)
        num_agents = chosen_qs.shape[-1]
        logits = TwoLayer(self.hypernet_dim, num_agents * self.hidden_dim, name="attention")(state)
        # Over agents, one distribution per head: [.., N, K].
        attention = jax.nn.softmax(logits.reshape(*state.shape[:-1], num_agents, self.hidden_dim), axis=-2)
        hidden = (chosen_qs[..., None] * attention).sum(-2)
        for layer in range(2):
            hidden = nn.relu(Linear(self.hidden_dim, name=f"net_{layer}")(hidden))
        v = TwoLayer(self.hidden_dim, 1, name="v")(state)
        return (Linear(1, name="net_2")(hidden) + v)[..., 0]
