"""The weightings w(s, u) of the paper, elementwise over joint actions that were taken."""

import jax.numpy as jnp

from wqmix_jax.types import Array


def optimistic(td_error: Array, alpha: Array) -> Array:
    """Returns the optimistic weights (OW), eq. 5: 1 where Q_tot underestimates its target, alpha elsewhere.

    Args:
        td_error: ``Q_tot - y``, any shape.
        alpha: scalar in [0, 1]; QTRAN passes 0.
    """
    return jnp.where(td_error < 0, jnp.ones_like(td_error), alpha)


def central(is_greedy: Array, td_target: Array, greedy_value: Array, alpha: Array) -> Array:
    """Returns the central weights (CW), eq. 10: 1 where the joint action is greedy or better than that, else alpha.

    Args:
        is_greedy: bool, every agent took the argmax of its utility.
        td_target: ``y``, same shape.
        greedy_value: the central estimate of the greedy joint action, same shape; the comparison is strict.
        alpha: scalar in (0, 1].
    """
    return jnp.where(is_greedy | (td_target > greedy_value), jnp.ones_like(td_target), alpha)


def qtran(is_greedy: Array, td_error: Array, lambda_opt: Array, lambda_nopt: Array) -> Array:
    """Returns the weights of QTRAN, seen as a Weighted QMIX: eq. 11.

    Args:
        is_greedy: bool, every agent took the argmax of its utility.
        td_error: ``Q_tot - Q*``, same shape: a joint action that is overestimated and not greedy gets no weight.
        lambda_opt: scalar, the weight of greedy joint actions.
        lambda_nopt: scalar, the weight of the others.
    """
    return jnp.where(is_greedy, lambda_opt, jnp.where(td_error < 0, lambda_nopt, jnp.zeros_like(td_error)))


def potentially_optimal(advantage: Array, threshold: Array, alpha: Array) -> Array:
    """Returns the weights of POWQMIX: 1 where a joint action's value is almost that of the greedy one, else alpha.

    Args:
        advantage: Q_r(s, u) - Q_r(s, greedy), any shape, at most 0.
        threshold: scalar above 0, the smallest difference that counts.
        alpha: scalar in [0, 1].
    """
    return jnp.where(jnp.abs(advantage) < threshold, jnp.ones_like(advantage), alpha)
