"""Coordination graphs: the value of a joint action as utilities and payoffs of pairs, and its maximisation.

The graphs, the value and max-plus with anytime extension and normalised messages are those of deep coordination graphs
(Boehmer et al., arXiv 1910.00091, algorithms 2 and 3) and Kok and Vlassis (JMLR 2006).
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.types import Array

Topology = Literal["full", "line", "cycle", "star", "vdn"]
"""The graphs that have a name; ``vdn`` has no edge."""

TIE = 64
"""Sums with messages that differ by less than so many roundings of the largest one are equal."""

Edges = tuple[tuple[int, int], ...]
"""Pairs of agents."""


class GraphValues(NamedTuple):
    """The terms of a joint action's value.

    Attributes:
        utilities: ``[.., N, A]``.
        payoffs: ``[.., E, A, A]``; the first action is that of the edge's first agent.
    """

    utilities: Array
    payoffs: Array


def named_edges(graph: Topology, num_agents: int) -> Edges:
    """Returns the edges of a named graph; a cycle of fewer than three agents is a line."""
    line = tuple((agent, agent + 1) for agent in range(num_agents - 1))
    if graph == "vdn":
        return ()
    if graph == "line":
        return line
    if graph == "cycle":
        return (*line, (num_agents - 1, 0)) if num_agents > 2 else line
    if graph == "star":
        return tuple((0, agent) for agent in range(1, num_agents))
    return tuple((one, other) for one in range(num_agents) for other in range(one + 1, num_agents))


def joint_value(values: GraphValues, joint_action: Array, edges: Edges) -> Array:
    """Returns the mean utility of the agents' actions plus the mean payoff of the pairs of actions on edges.

    Args:
        values: leaves ``[.., ..]``.
        joint_action: ``[.., N]``.
        edges: the pairs of agents, ``E``.

    Returns:
        ``[..]``.
    """
    num_actions = values.utilities.shape[-1]
    chosen = _taken(values.utilities, joint_action).mean(-1)
    if not edges:
        return chosen
    first, second = np.array(edges).T
    pairs = joint_action[..., first] * num_actions + joint_action[..., second]
    return chosen + _taken(values.payoffs.reshape(*pairs.shape, num_actions**2), pairs).mean(-1)


def greedy_joint_actions(
    values: GraphValues, avail_actions: Array, edges: Edges, *, iterations: int, anytime: bool, normalised: bool
) -> Array:
    """Searches for the joint action of the highest `joint_value` by max-plus message passing.

    In one iteration each agent sends a message to each of its neighbours: for each action of the receiver the most that
    the sender's current utility, less the receiver's last message, and the payoff of both add up to. An agent's current
    utility is its own plus all messages to it. On a graph without cycles, as many iterations as its longest path has
    edges find the optimum if it is unique.

    Args:
        values: leaves ``[.., ..]``; constants to the gradient.
        avail_actions: ``[.., N, A]`` bool. An agent without an available action may take all of them.
        edges: the pairs of agents.
        iterations: how often all messages are sent; without any, and without edges, each agent maximises its utility.
        anytime: whether the result is the best of the joint actions after each iteration, and not the last one.
        normalised: whether the mean over the receiver's actions is subtracted from messages.

    Returns:
        ``[.., N]`` int32. All actions are available, whatever the values are.
    """
    chex.assert_equal_shape([values.utilities, avail_actions])
    values = jax.lax.stop_gradient(values)
    avail_actions = avail_actions | ~avail_actions.any(-1, keepdims=True)
    if not edges or iterations == 0:
        return greedy_actions(values.utilities, avail_actions)
    own = jnp.where(avail_actions, values.utilities / avail_actions.shape[-2], -jnp.inf)
    utilities = _sums_with_messages(own, values.payoffs / len(edges), edges, iterations, normalised=normalised)
    if not anytime:
        return _first_best(utilities[-1], avail_actions)
    each = jax.vmap(_first_best, (0, None))(utilities, avail_actions)  # [I, .., N]
    # One after another, since the values of all iterations together take a CPU ten times as long.
    best = jax.lax.map(lambda joint_action: joint_value(values, joint_action, edges), each).argmax(0)
    return jnp.take_along_axis(each, best[None, ..., None], axis=0)[0]


def _sums_with_messages(own: Array, payoffs: Array, edges: Edges, iterations: int, *, normalised: bool) -> Array:
    """Returns each agent's utilities plus all messages to it, after each iteration.

    Args:
        own: ``[.., N, A]``, the utilities; -inf where an action is not available.
        payoffs: ``[.., E, A, A]``.
        edges: the pairs of agents.
        iterations: ``I``.
        normalised: see `greedy_joint_actions`.

    Returns:
        ``[I, .., N, A]``.
    """
    leading, (num_agents, num_actions) = own.shape[:-2], own.shape[-2:]
    # States come last inside: maxima over actions are then vector operations, several times as fast on a CPU.
    own, payoffs = (jnp.moveaxis(leaf.reshape(-1, *leaf.shape[len(leading) :]), 0, -1) for leaf in (own, payoffs))
    # Messages both ways are one array, [2E, A, B], by the receiver's actions; the answer to each is half of it away.
    senders, receivers = np.array([*edges, *(edge[::-1] for edge in edges)]).T
    by_sender = jnp.concatenate([payoffs, payoffs.swapaxes(1, 2)])  # [2E, A of the sender, A of the receiver, B]
    is_to = jnp.asarray(np.arange(num_agents)[:, None] == receivers, own.dtype)

    def iterate(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        messages, current = state
        known = current[senders] - jnp.roll(messages, len(edges), axis=0)
        messages = (known[:, :, None] + by_sender).max(1)
        if normalised:
            messages -= messages.mean(1, keepdims=True)
        current = own + jnp.einsum("ne,eab->nab", is_to, messages, precision=jax.lax.Precision.HIGHEST)
        return (messages, current), current

    nothing = jnp.zeros((len(senders), *own.shape[1:]), own.dtype)
    _, sums = jax.lax.scan(iterate, (nothing, own), None, length=iterations)
    return jnp.moveaxis(sums, -1, 1).reshape(iterations, *leading, num_agents, num_actions)


def _first_best(sums: Array, avail_actions: Array) -> Array:
    """Returns each agent's best available action by its utility and messages, the first of equals.

    On graphs with cycles, actions are often equally good: messages around a cycle meet the same terms in another order.
    Rounding would decide then, and the same episode would have other actions in another batch.
    """
    allowed = jnp.where(avail_actions, sums, -jnp.inf)
    largest = jnp.where(avail_actions, jnp.abs(sums), 0).max((-2, -1), keepdims=True)
    best = allowed.max(-1, keepdims=True)
    is_best = allowed >= best - TIE * jnp.finfo(sums.dtype).eps * largest
    return greedy_actions(jnp.where(is_best, best, sums), avail_actions)


def _taken(table: Array, index: Array) -> Array:
    """Returns the entries of a table: ``[.., K, A]``, ``[.., K]`` -> ``[.., K]``."""
    # A masked sum, since a gather's gradient is a scatter, which is slow on every backend.
    is_taken = index[..., None] == jnp.arange(table.shape[-1]).reshape((1,) * index.ndim + (-1,))
    return jnp.where(is_taken, table, 0).sum(-1)
