"""The critic of COMA (Foerster et al., arXiv 1705.08926, section 4): its inputs, and all agents' outputs."""

import jax.numpy as jnp

from wqmix_jax.networks.agent import AgentForm, SeenByAgents, Unrolled, unroll_agents
from wqmix_jax.types import Array, PyTree


def critic_inputs(obs: Array, state: Array, actions: Array) -> Array:
    """Returns what a critic sees: state, own observation, actions of the other agents, last actions of all.

    Args:
        obs: ``[B, T, N, O]``.
        state: ``[B, T, D]``.
        actions: ``[B, T, N, A]``, one-hot.

    Returns:
        ``[B, T, N, D + O + 2 * N * A]``. The agent's own action is zero, and so are last actions at the first step.
    """
    *lead, num_agents, num_actions = actions.shape
    is_other = 1 - jnp.eye(num_agents, dtype=actions.dtype)
    others = actions[..., None, :, :] * is_other.reshape((1,) * len(lead) + (num_agents, num_agents, 1))
    last = jnp.pad(actions[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))

    def seen_by_all(features: Array) -> Array:
        return jnp.broadcast_to(features[..., None, :], (*lead, num_agents, features.shape[-1]))

    width = num_agents * num_actions
    parts = seen_by_all(state), obs, others.reshape(*lead, num_agents, width)
    return jnp.concatenate([*parts, seen_by_all(last.reshape(*lead, width))], axis=-1)


def apply_critic(form: AgentForm, params: PyTree, inputs: Array) -> Unrolled:
    """Returns the hidden layer and the outputs of a critic without memory: ``[T, .., N, F]`` -> ``[T, .., N, ..]``.

    Args:
        form: of the critic, without last actions.
        params: see `AgentForm.init`.
        inputs: those of `critic_inputs`; the ids are added if ``form`` has them.
    """
    no_action, carry = jnp.full(inputs.shape[:-1], -1), jnp.zeros((*inputs.shape[1:-1], form.hidden_dim))
    return unroll_agents(form, [params], (), carry, SeenByAgents(inputs, no_action), keeps_hiddens=True)[0]
