"""ResQ (Shen et al., NeurIPS 2022; ``restq_learner_central.py`` of the code of its authors, xmu-rl-3dv/ResQ).

Seen as a Weighted QMIX: Q* and the targets are the same, and a residual that is 0 at the greedy joint action takes the
place of the weighting.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.q_learning import gather_actions, init_central, seen_before
from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.networks.functional import apply_net
from wqmix_jax.networks.linear import magnitude
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Episode, Observation, PRNGKey, PyTree


@options
class ResQ(WQMIX):
    """ResQ: Q_tot plus a residual of at most 0 learns the value of all joint actions but the greedy one.

    Parameters: those of WQMIX with a ``Q*`` plus ``{"residual_agent", "residual_mixer"}``. The residual has agents,
    which start as a copy of the acting ones, and a mixing net of the same kind as Q*'s.

    Attributes:
        residual_sign: how the residual is kept from being positive: ``loss``, by the mean square of its positive part;
            ``negative_abs``, by taking minus its absolute value; or ``none``, not at all.
        q_star: Q*'s mixing net and the residual's: ``feedforward`` or ``attention``.
    """

    residual_sign: Literal["loss", "negative_abs", "none"]
    q_star: Literal["feedforward", "attention"]

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of WQMIX's nets and of the residual's mixing net."""
        wqmix_key, residual_key = jax.random.split(key)
        params = super().init(wqmix_key, env_spec)
        return params | {
            "residual_agent": jax.tree.map(jnp.copy, params["agent"]),
            "residual_mixer": init_central(self.q_star_net, residual_key, env_spec),
        }

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the losses of Q_tot with its residual, of Q* and of the residual's sign, summed."""
        del ctx, noise
        utilities = self._utilities(params, target, batch, params["residual_agent"])
        agent_qs, central_qs, target_qs, choosing_qs, residual_qs = utilities
        greedy, before = greedy_actions(agent_qs, batch.avail_actions), seen_before(batch)
        to_bootstrap = self.greedy_to_bootstrap(agent_qs, choosing_qs, batch)
        bootstrap = self._bootstrap(target, target_qs, batch, greedy, to_bootstrap, hp)
        y = bootstrap.td_target

        q_tot, _ = self.mix(params["mixer"], agent_qs[:, :-1], batch.joint_action, before)
        q_star = self.central_estimate(params, central_qs[:, :-1], batch.joint_action, before)
        residual = self.residual(params, residual_qs[:, :-1], batch.joint_action, before)
        # The greedy joint action has no residual, so that Q_tot alone learns its value.
        residual_weights = (batch.joint_action != greedy[:, :-1]).any(-1).astype(residual.dtype)
        td_error = q_tot + residual_weights * residual - y
        weights = self._weights(td_error, y, greedy, bootstrap, batch, hp)
        # The sign's loss counts the greedy joint action, too.
        positive = jnp.maximum(residual, 0) if self.residual_sign == "loss" else jnp.zeros_like(residual)

        importance = batch.importance
        both = weights if importance is None else weights * importance
        losses = {
            "qmix_loss": masked_mean_square(td_error, batch.mask, both),
            "q_star_loss": masked_mean_square(q_star - y, batch.mask, importance),
            "sign_loss": masked_mean_square(positive, batch.mask, importance),
        }
        loss = losses["qmix_loss"] + losses["q_star_loss"] + losses["sign_loss"]
        logged = {"q_tot_mean": q_tot, "residual_mean": residual, "td_target_mean": y, "weight_mean": weights}
        means = {name: masked_mean(value, batch.mask) for name, value in logged.items()}
        values = {"agent_qs": agent_qs, "greedy_actions": greedy, "td_error": td_error, "weights": weights}
        values |= {"q_tot": q_tot, "q_star": q_star, "residual": residual, "residual_weights": residual_weights}
        return loss, Aux({"loss": loss} | losses | means, values | bootstrap._asdict())

    def residual(self, params: PyTree, agent_qs: Array, joint_action: Array, seen: Observation) -> Array:
        """Returns Q_r(s, u), ``[..]``, from the residual's utilities; see `FactoredQLearner.mixer_inputs`."""
        chosen_qs = gather_actions(agent_qs, joint_action)
        residual = apply_net(self.q_star_net, params["residual_mixer"], chosen_qs, seen.state)
        return -magnitude(residual) if self.residual_sign == "negative_abs" else residual
