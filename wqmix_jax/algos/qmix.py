"""Value factorisation with a monotonic mixer: QMIX, VDN and Qatten."""

from typing import Literal

import flax.linen as nn

from wqmix_jax.algos.factored import FactoredQLearner
from wqmix_jax.algos.q_learning import gather_actions
from wqmix_jax.networks.agent import with_ids
from wqmix_jax.networks.mixers import QattenMixer, QMIXMixer, VDNMixer
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, Observation


@options
class QMIX(FactoredQLearner):
    """QMIX, VDN and Qatten: a monotonic mixer of the utilities.

    Q_tot never falls in a utility, so that each agent's greedy action is part of the greedy joint action.

    Attributes:
        mixer: how the chosen utilities become Q_tot: ``qmix``, ``vdn`` or ``qatten``, whose keys are the
            agents' observations and ids.
        mixer_embed_dim: width of QMIX's mixing network, or of Qatten's queries and keys.
        hypernet_dim: hidden width of the hypernetworks.
        num_heads: Qatten's heads.
    """

    mixer: Literal["qmix", "vdn", "qatten"]
    mixer_embed_dim: PositiveInt
    hypernet_dim: PositiveInt
    num_heads: PositiveInt

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        sizes = {"vdn": ("mixer_embed_dim", "hypernet_dim", "num_heads"), "qmix": ("num_heads",), "qatten": ()}
        return super().without_effect() | dict.fromkeys(sizes.get(self.mixer, ()), f"algo.mixer={self.mixer}")

    @property
    def mixer_net(self) -> nn.Module:
        """See `FactoredQLearner.mixer_net`."""
        match self.mixer:
            case "vdn":
                return VDNMixer()
            case "qmix":
                return QMIXMixer(self.mixer_embed_dim, self.hypernet_dim)
            case "qatten":
                return QattenMixer(self.mixer_embed_dim, self.hypernet_dim, self.num_heads)

    def mixer_inputs(self, agent_qs: Array, joint_action: Array, seen: Observation) -> tuple[Array, ...]:
        """Returns the chosen utilities and the state; see `FactoredQLearner.mixer_inputs`."""
        inputs = (gather_actions(agent_qs, joint_action), seen.state)
        return (*inputs, with_ids(seen.obs)) if self.mixer == "qatten" else inputs
