"""Choices among available actions: greedy, epsilon-greedy and drawn from a policy; and the schedule of epsilon."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.types import Array, PRNGKey

UNAVAILABLE = -9999999.0
"""Replaces the values of unavailable actions before a maximum is taken, as in the authors' code."""


def greedy_actions(agent_qs: Array, avail_actions: Array) -> Array:
    """Returns each agent's best available action: two ``[.., N, A]`` -> ``[.., N]`` int32, the first of equals.

    The action is available whatever the values are, nan and infinities included; 0 where no action is available. A
    constant to the gradient.
    """
    return _best(_above_unavailable(jax.lax.stop_gradient(agent_qs)), avail_actions)


def _above_unavailable(agent_qs: Array) -> Array:
    """Raises -inf: an available one must beat an unavailable action; a nan passes, and wins the argmax."""
    return jnp.maximum(agent_qs, jnp.finfo(jnp.result_type(agent_qs, float)).min)


def _best(scores: Array, avail_actions: Array) -> Array:
    """Returns the available action of the highest score, the first of equals."""
    return jnp.argmax(jnp.where(avail_actions, scores, -jnp.inf), axis=-1).astype(jnp.int32)


def greedy_values(agent_qs: Array, avail_actions: Array) -> Array:
    """Returns the utility of each agent's best available action, ``[.., N]``, a constant to the gradient."""
    return jax.lax.stop_gradient(jnp.where(avail_actions, agent_qs, UNAVAILABLE)).max(-1)


def coordinate_ascent(
    values: Callable[[Array, Array], Array], start: Array, avail_actions: Array, num_sweeps: int
) -> Array:
    """Returns a joint action that no agent's turn made worse, ``[.., N]``: one agent after another takes its best one.

    Args:
        values: ``(agent, joint_action) -> [.., A]``, the values of the joint actions ``[.., N]`` in which ``agent``, a
            scalar int32, alone plays each of its actions.
        start: ``[.., N]`` int32, available actions.
        avail_actions: ``[.., N, A]`` bool.
        num_sweeps: turns of each agent.
    """
    num_agents = start.shape[-1]

    def turn(index: Array, joint_action: Array) -> Array:
        agent = index % num_agents
        avail = jax.lax.dynamic_index_in_dim(avail_actions, agent, axis=-2, keepdims=False)
        best = greedy_actions(values(agent, joint_action), avail)
        return jax.lax.dynamic_update_index_in_dim(joint_action, best, agent, axis=joint_action.ndim - 1)

    return jax.lax.fori_loop(0, num_sweeps * num_agents, turn, start)


def with_idle_action(avail_actions: Array) -> Array:
    """Makes action 0 available to each agent without any available action: ``[.., N, A]`` bool -> ``[.., N, A]`` bool.

    Such an agent plays action 0, and maxima over its available actions are the utility of action 0, as for a unit in
    SMAC that is dead. Rollout and replay apply this, so that no algorithm meets an agent without an action.
    """
    is_first = jnp.arange(avail_actions.shape[-1]).reshape((1,) * (avail_actions.ndim - 1) + (-1,)) == 0
    return avail_actions | (is_first & ~avail_actions.any(-1, keepdims=True))


def epsilon_greedy(key: PRNGKey, agent_qs: Array, avail_actions: Array, epsilon: Array) -> Array:
    """Explores, each agent independently, uniformly over available actions with probability ``epsilon`` (scalar).

    Shapes as `greedy_actions`.
    """
    return explore(sample_exploration(key, agent_qs.shape), agent_qs, avail_actions, epsilon)


class Exploration(NamedTuple):
    """The random numbers of epsilon-greedy choices.

    Attributes:
        uniform: ``[.., N]`` in [0, 1), an agent explores where it is below epsilon.
        gumbel: ``[.., N, A]``, standard Gumbel noise: the available action where it is highest is a uniform choice.
    """

    uniform: Array
    gumbel: Array


def sample_exploration(key: PRNGKey, shape: tuple[int, ...]) -> Exploration:
    """Draws the random numbers of `explore` for utilities of this shape, ``(.., N, A)``."""
    # Both are drawn for every agent: the numbers drawn don't depend on epsilon.
    explore_key, action_key = jax.random.split(key)
    return Exploration(jax.random.uniform(explore_key, shape[:-1]), jax.random.gumbel(action_key, shape))


def explore(noise: Exploration, agent_qs: Array, avail_actions: Array, epsilon: Array) -> Array:
    """Chooses as `epsilon_greedy` does, with random numbers that `sample_exploration` has drawn."""
    explores = (noise.uniform < epsilon)[..., None]
    scores = jnp.where(explores, noise.gumbel, _above_unavailable(jax.lax.stop_gradient(agent_qs)))
    return _best(scores, avail_actions)


def linear_epsilon(env_steps: Array, start: Array, finish: Array, anneal_steps: Array) -> Array:
    """Anneals linearly from ``start`` to ``finish`` over the first ``anneal_steps`` steps; constant afterwards."""
    progress = jnp.minimum(env_steps / anneal_steps, 1.0)
    return start + (finish - start) * progress


def epsilon_floor(logits: Array, avail_actions: Array, epsilon: Array) -> Array:
    """Returns (1 - epsilon) softmax(logits) + epsilon / A over all ``A`` actions, restricted to the available ones.

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
    """Draws an action of each policy: ``[.., A]`` probabilities, ``[.., A]`` standard Gumbel noise -> ``[..]`` int32.

    An action of probability 0 is never drawn.
    """
    return jnp.argmax(jnp.log(jax.lax.stop_gradient(policy)) + gumbel, axis=-1).astype(jnp.int32)


def draw_or_best(logits: Array, avail_actions: Array, epsilon: Array, gumbel: Array) -> Array:
    """Draws from the policy of `epsilon_floor`; takes the likeliest available action where epsilon is 0, in evaluation.

    Args:
        logits: ``[.., N, A]``.
        avail_actions: ``[.., N, A]`` bool.
        epsilon: scalar.
        gumbel: ``[.., N, A]``, standard Gumbel noise.

    Returns:
        ``[.., N]`` int32.
    """
    # The argmax of log-probabilities plus Gumbel noise is a draw. It is masked again: the policy of a seed whose
    # parameters are nan is nan everywhere, at unavailable actions too.
    perturbed = jnp.log(epsilon_floor(logits, avail_actions, epsilon)) + gumbel
    drawn = greedy_actions(perturbed, avail_actions)
    return jnp.where(epsilon > 0, drawn, greedy_actions(logits, avail_actions))


def straight_through(logits: Array, gumbel: Array, temperature: Array) -> Array:
    """Draws an action, one-hot ``[.., A]``, whose gradient is that of the Gumbel-softmax (arXiv 1611.01144).

    Args:
        logits: ``[.., A]``.
        gumbel: ``[.., A]``, standard Gumbel noise.
        temperature: scalar > 0, of the softmax that the gradient is taken of; the draw doesn't depend on it.
    """
    perturbed = logits + gumbel
    soft = jax.nn.softmax(perturbed / temperature)
    # Forward `hard`, backward `soft`: their difference is a constant.
    hard = jax.nn.one_hot(perturbed.argmax(-1), perturbed.shape[-1], dtype=soft.dtype)
    return soft + jax.lax.stop_gradient(hard - soft)
