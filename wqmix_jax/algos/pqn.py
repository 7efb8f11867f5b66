"""PQN with a mixer (Gallici et al., arXiv 2407.04811; github.com/mttga/purejaxql, ``pqn_vdn_rnn_jaxmarl.py``)."""

from typing import ClassVar

from wqmix_jax.algos.base import Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.q_learning import seen_after, seen_before
from wqmix_jax.algos.qmix import QMIX
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import options
from wqmix_jax.types import Array, Episode, PyTree


@options
class PQN(QMIX):
    """Q-learning from the episodes just played, whose targets bootstrap from the online nets; no target nets.

    Normalised layers (`QLearner.layer_norm`) keep this stable. The released code learns from
    parts of episodes, each after the four steps before it (its memory window); here episodes are whole.
    """

    is_on_policy: ClassVar[bool] = True

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        unused = ("double_q", "target_update_interval", "target_update_tau")
        return super().without_effect() | dict.fromkeys(unused, "an algorithm that reads no target nets")

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the mean square error of Q_tot; its targets are constants made by the same nets."""
        del target, ctx, noise
        agent_qs = self.unroll(params["agent"], batch)
        greedy, before = greedy_actions(agent_qs, batch.avail_actions), seen_before(batch)

        def value(joint_action: Array) -> Array:
            return self.mix(params["mixer"], agent_qs[:, :-1], joint_action, before)[0]

        next_actions = self.next_actions(greedy, batch)
        next_q, _ = self.mix(params["mixer"], agent_qs[:, 1:], next_actions, seen_after(batch))
        y = self.td_targets(batch, hp, next_q, self.correction(batch, greedy, value))
        q_tot = value(batch.joint_action)
        loss = masked_mean_square(q_tot - y, batch.mask)
        metrics = {"q_tot_mean": masked_mean(q_tot, batch.mask), "td_target_mean": masked_mean(y, batch.mask)}
        values = {"agent_qs": agent_qs, "greedy_actions": greedy, "q_tot": q_tot}
        return loss, Aux({"loss": loss, **metrics}, values | {"td_target": y, "next_value": next_q})
