"""What all algorithms with a recurrent utility network share: unrolling it, acting with it, reading values off it."""

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import AgentInputs, Algorithm, Context, Hyperparams
from wqmix_jax.config import options
from wqmix_jax.exploration import epsilon_greedy
from wqmix_jax.networks.agent import RecurrentAgent, agent_inputs
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree

UNAVAILABLE = -9999999.0
"""The value that stands where an action is unavailable before a maximum is taken (as in the authors' code)."""


@options
class QLearner(Algorithm):
    """Parameters ``{"agent": ..}``; acts epsilon-greedily on the utilities."""

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """The agent's parameters; families with more nets add to this."""
        return {"agent": init_agent(key, self.hidden_dim, env_spec)}

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Array:
        """Zeros, ``[.., N, H]``."""
        return jnp.zeros((*batch_shape, self.hidden_dim))

    def act(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, key: PRNGKey
    ) -> tuple[Array, Array]:
        """Epsilon-greedy over the available actions; see `Algorithm.act`."""
        del hp
        carry, agent_qs = self.step(params["agent"], carry, inputs)
        return epsilon_greedy(key, agent_qs, inputs.avail_actions, ctx.epsilon), carry

    def step(self, agent_params: PyTree, carry: Array, inputs: AgentInputs) -> tuple[Array, Array]:
        """The recurrent state after one step and the utilities at it, ``[.., N, H]`` and ``[.., N, A]``."""
        num_actions = inputs.avail_actions.shape[-1]
        features = agent_inputs(inputs.obs, inputs.last_action, num_actions)
        agent = RecurrentAgent(self.hidden_dim, num_actions)
        carry, agent_qs = apply_net(agent, agent_params, carry, features[None])
        return carry, agent_qs[0]

    def unroll(self, agent_params: PyTree, batch: Episode) -> Array:
        """Utilities of whole episodes from a fresh recurrent state: ``[B, T+1, N, A]``."""
        num_actions = batch.avail_actions.shape[-1]
        first = jnp.full_like(batch.joint_action[:, :1], -1)
        last_action = jnp.concatenate([first, batch.joint_action], axis=1)
        features = agent_inputs(batch.obs, last_action, num_actions).swapaxes(0, 1)
        carry = self.initial_carry(features.shape[1:3]).astype(features.dtype)
        agent = RecurrentAgent(self.hidden_dim, num_actions)
        return apply_net(agent, agent_params, carry, features)[1].swapaxes(0, 1)


def init_agent(key: PRNGKey, hidden_dim: int, env_spec: EnvSpec) -> PyTree:
    """Draws the parameters of one `RecurrentAgent`."""
    obs = jnp.zeros((1, env_spec.num_agents, env_spec.obs_dim))
    features = agent_inputs(obs, jnp.full(obs.shape[:-1], -1), env_spec.num_actions)
    carry = jnp.zeros((env_spec.num_agents, hidden_dim))
    return init_net(RecurrentAgent(hidden_dim, env_spec.num_actions), key, carry, features)


def gather_actions(agent_qs: Array, joint_action: Array) -> Array:
    """The utilities of the given actions: ``[.., N, A]``, ``[.., N]`` -> ``[.., N]``."""
    # A masked sum, since a gather's gradient is a scatter, which is slow on every backend.
    taken = joint_action[..., None] == jnp.arange(agent_qs.shape[-1]).reshape((1,) * joint_action.ndim + (-1,))
    return jnp.where(taken, agent_qs, 0).sum(-1)


def greedy_actions(agent_qs: Array, avail_actions: Array) -> Array:
    """Each agent's best available action, ``[.., N]``; action 0 where none is (padding)."""
    return jnp.argmax(jax.lax.stop_gradient(jnp.where(avail_actions, agent_qs, UNAVAILABLE)), axis=-1)
