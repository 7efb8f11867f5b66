"""Value factorisation with a monotonic mixer: QMIX and VDN (``src/learners/q_learner.py`` of the authors' code)."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, Context, Hyperparams
from wqmix_jax.algos.q_learning import QLearner, gather_actions, greedy_actions
from wqmix_jax.config import PositiveInt, options
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.mixers import QMIXMixer, VDNMixer
from wqmix_jax.td import masked_mean, masked_mean_square, td_target
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree


@options
class QMIX(QLearner):
    """Parameters ``{"agent", "mixer"}``; Q_tot learns the double-Q target of eq. 3 in the paper's section 2.1.

    Attributes:
        mixer: how the chosen utilities become Q_tot: ``qmix`` or ``vdn``.
        mixer_embed_dim: width of QMIX's mixing network.
        hypernet_dim: hidden width of its hypernetworks.
    """

    mixer: Literal["qmix", "vdn"]
    mixer_embed_dim: PositiveInt
    hypernet_dim: PositiveInt

    @property
    def mixer_net(self) -> nn.Module:
        """The mixer as a flax module."""
        return VDNMixer() if self.mixer == "vdn" else QMIXMixer(self.mixer_embed_dim, self.hypernet_dim)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Agent and mixer."""
        agent_key, mixer_key = jax.random.split(key)
        return super().init(agent_key, env_spec) | {"mixer": init_mixer(self.mixer_net, mixer_key, env_spec)}

    def mix(self, mixer_params: PyTree, chosen_qs: Array, state: Array) -> Array:
        """Q_tot, ``[B, T]``."""
        return apply_net(self.mixer_net, mixer_params, chosen_qs, state)

    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Mean square TD error of Q_tot."""
        del ctx, noise
        agent_qs = self.unroll(params["agent"], batch)
        greedy = greedy_actions(agent_qs, batch.avail_actions)
        q_tot = self.mix(params["mixer"], gather_actions(agent_qs[:, :-1], batch.joint_action), batch.state[:, :-1])
        target_qs = gather_actions(self.unroll(target["agent"], batch), greedy)
        next_q = self.mix(target["mixer"], target_qs[:, 1:], batch.state[:, 1:])
        y = jax.lax.stop_gradient(td_target(batch.reward, batch.discount, hp.gamma, next_q))
        loss = masked_mean_square(q_tot - y, batch.mask)
        metrics = {
            "loss": loss,
            "q_tot_mean": masked_mean(q_tot, batch.mask),
            "td_target_mean": masked_mean(y, batch.mask),
        }
        values = {"agent_qs": agent_qs, "greedy_actions": greedy, "q_tot": q_tot}
        values |= {"td_target": y, "next_value": next_q, "td_error": q_tot - y}
        return loss, Aux(metrics, values)


def init_mixer(net: nn.Module, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
    """Draws the parameters of a net on chosen utilities and state."""
    chosen_qs, state = jnp.zeros((1, env_spec.num_agents)), jnp.zeros((1, env_spec.state_dim))
    return init_net(net, key, chosen_qs, state)
