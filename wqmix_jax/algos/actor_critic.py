"""The base of MADDPG and MASAC: recurrent decentralised actors, and one central critic built like Q* (appendix B)."""

import flax.linen as nn
import jax

from wqmix_jax.algos.q_learning import QLearner, gather_actions, init_central
from wqmix_jax.networks.functional import apply_net, block_form
from wqmix_jax.networks.q_star import FeedForwardQStar
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, PRNGKey, PyTree


@options
class ActorCritic(QLearner):
    """Decentralised actors and a central critic of the joint action.

    Parameters: ``{"agent", "q_star_agent", "q_star_mixer"}``, the actors, the critic's utilities and their mixer.

    One loss is the sum of the actors' and the critic's. Each leaves the other's parameters alone, so that the sum's
    gradient holds both, and one optimiser with one joint clip moves them, as in the authors' code.

    Attributes:
        q_star_dim: width of the critic's mixing layers.
    """

    q_star_dim: PositiveInt

    @property
    def head_gain(self) -> float:
        """See `QLearner.head_gain`: actors start nearly uniform."""
        return 0.01

    @property
    def q_star_net(self) -> nn.Module:
        """The critic's mixer as a flax module."""
        return FeedForwardQStar(self.q_star_dim)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of actors and critic."""
        actor_key, agent_key, mixer_key = jax.random.split(key, 3)
        return super().init(actor_key, env_spec) | {
            "q_star_agent": self.init_agents(agent_key, env_spec),
            "q_star_mixer": init_central(self.q_star_net, mixer_key, env_spec),
        }

    def critic_values(self, mixer_params: PyTree, critic_qs: Array, joint_action: Array, state: Array) -> Array:
        """Returns the critic's value of joint actions: ``[B, T, N, A]``, ``[B, T, N]``, ``[B, T, D]`` -> ``[B, T]``."""
        return apply_net(self.q_star_net, mixer_params, gather_actions(critic_qs, joint_action), state)

    def deviations(self, mixer_params: PyTree, critic_qs: Array, joint_action: Array, state: Array) -> Array:
        """Returns the critic's values if one agent alone deviates: as `critic_values` -> ``[B, T, N, A]``."""

        def at_one_time(step: tuple[Array, Array, Array]) -> Array:
            return apply_net(self.q_star_net, mixer_params, *step, method="deviations")

        # N * A values per state in wide layers: on a CPU, those of more than one time step would exceed every cache. An
        # accelerator takes as many steps as it unrolls in a block, which is a block's share of the kernels.
        form = block_form()
        steps = None if form is None else form.max_steps
        chosen_qs = gather_actions(critic_qs, joint_action)  # [B, T, N]
        by_time = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (critic_qs, chosen_qs, state))
        return jax.lax.map(at_one_time, by_time, batch_size=steps).swapaxes(0, 1)
