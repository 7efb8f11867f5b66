"""QPLEX (Wang et al., arXiv 2008.01062; ``src/learners/dmaq_qatten_learner.py`` of the authors' code)."""

import jax

from wqmix_jax.algos.base import Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.factored import FactoredQLearner
from wqmix_jax.algos.q_learning import gather_actions
from wqmix_jax.networks.functional import apply_net
from wqmix_jax.networks.qplex import QPLEXMixer
from wqmix_jax.ops.action_selection import greedy_values
from wqmix_jax.ops.td import masked_mean
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, Episode, Observation, PyTree


@options
class QPLEX(FactoredQLearner):
    """Q_tot may take any values whose greedy joint action is made of each agent's greedy action.

    Attributes:
        hypernet_dim: hidden width of the hypernetworks that transform the utilities.
        attention_dim: width of the networks that weigh the advantages.
        num_heads: their heads.
    """

    hypernet_dim: PositiveInt
    attention_dim: PositiveInt
    num_heads: PositiveInt

    @property
    def mixer_net(self) -> QPLEXMixer:
        """See `FactoredQLearner.mixer_net`."""
        return QPLEXMixer(self.hypernet_dim, self.attention_dim, self.num_heads)

    def mixer_inputs(self, agent_qs: Array, joint_action: Array, seen: Observation) -> tuple[Array, ...]:
        """Returns the inputs of the duel; see `FactoredQLearner.mixer_inputs`."""
        actions = jax.nn.one_hot(joint_action, agent_qs.shape[-1], dtype=agent_qs.dtype)
        chosen_qs, greedy_qs = gather_actions(agent_qs, joint_action), greedy_values(agent_qs, seen.avail_actions)
        return chosen_qs, greedy_qs, actions, seen.state

    def mix(
        self, mixer_params: PyTree, agent_qs: Array, joint_action: Array, seen: Observation
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the sum of the duel's parts, and the parts; see `FactoredQLearner.mix`."""
        duel = apply_net(self.mixer_net, mixer_params, *self.mixer_inputs(agent_qs, joint_action, seen))
        return duel.value + duel.advantage, {"q_value": duel.value, "q_advantage": duel.advantage}

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the mean square TD error of Q_tot; ``greedy_mean`` is the share of greedy actions (``hit_prob``)."""
        loss, aux = super().loss(params, target, batch, hp, ctx, noise)
        # Per agent, [B, T, N]; the mean over agents comes first, as in the authors' log.
        is_greedy = batch.joint_action == aux.values["greedy_actions"][:, :-1]
        greedy_mean = masked_mean(is_greedy.mean(-1, dtype=batch.mask.dtype), batch.mask)
        return loss, Aux(aux.metrics | {"greedy_mean": greedy_mean}, aux.values)
