"""A user's own algorithm: IQL that minds outliers less."""

from typing import Any

import jax.numpy as jnp

from wqmix_jax.algos.base import Aux, PositiveFloat
from wqmix_jax.algos.iql import IQL
from wqmix_jax.ops.td import masked_mean
from wqmix_jax.options import options
from wqmix_jax.types import Array


@options
class HuberIQL(IQL):
    """IQL with the pseudo-Huber loss.

    Attributes:
        delta: TD errors beyond it count linearly.
    """

    delta: PositiveFloat

    def loss(self, params: Any, target: Any, batch: Any, hp: Any, ctx: Any, noise: Any) -> tuple[Array, Aux]:
        """Mean pseudo-Huber loss of the TD errors."""
        _, aux = super().loss(params, target, batch, hp, ctx, noise)
        td_error = aux.values["td_error"]
        losses = jnp.square(hp.delta) * (jnp.sqrt(1.0 + jnp.square(td_error / hp.delta)) - 1.0)
        if batch.importance is not None:  # with algo.prioritised=true
            losses *= batch.importance[..., None]
        loss = masked_mean(losses, jnp.broadcast_to(batch.mask[..., None], losses.shape))
        return loss, Aux(aux.metrics | {"loss": loss}, aux.values)
