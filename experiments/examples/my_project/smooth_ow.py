"""A custom algorithm: QMIX with weights that fall smoothly from 1 to alpha, instead of jumping as in eq. 5."""

from typing import Any

import jax

from wqmix_jax.algos.base import Aux, PositiveFloat, PositiveFraction, mean_over_steps
from wqmix_jax.algos.qmix import QMIX
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import options
from wqmix_jax.types import Array, Episode


@options
class SmoothOW(QMIX):
    """QMIX with a sigmoid of the TD error as its weighting.

    Types and ranges are here, values in the yaml. A type from `algos.base` marks an option that one call can sweep.

    Attributes:
        alpha: the weight of joint actions that Q_tot overestimates most.
        temperature: the TD error over which the weight falls.
    """

    alpha: PositiveFraction
    temperature: PositiveFloat

    @mean_over_steps
    def loss(self, params: Any, target: Any, batch: Episode, hp: Any, ctx: Any, noise: Any) -> tuple[Array, Aux]:
        """Returns the weighted mean square TD error; `init` returns `params` and `target`, `hp` has the options."""
        _, aux = super().loss(params, target, batch, hp, ctx, noise)  # QMIX's own loss is unused; XLA removes it
        td_error = aux.values["td_error"]  # [B, T], Q_tot - y
        weights = hp.alpha + (1.0 - hp.alpha) * jax.nn.sigmoid(-td_error / hp.temperature)
        weights = jax.lax.stop_gradient(weights)
        loss = masked_mean_square(td_error, batch.mask, weights)
        metrics = {"loss": loss, "weight_mean": masked_mean(weights, batch.mask)}
        return loss, Aux(aux.metrics | metrics, aux.values | {"weights": weights})
