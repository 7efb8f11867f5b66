"""Temporal-difference targets and masked losses."""

import chex
import jax
import jax.numpy as jnp

from wqmix_jax.types import Array


def td_target(reward: Array, discount: Array, gamma: Array, next_value: Array) -> Array:
    """Returns y = r + gamma * discount * V(s'), the target of eq. 6 of the paper (arXiv 2006.10800).

    All arguments broadcast; ``discount`` is 0 where the task terminated and 1 elsewhere.
    """
    return reward + gamma * discount * next_value


def lambda_return(
    reward: Array,
    discount: Array,
    gamma: Array,
    next_value: Array,
    td_lambda: Array,
    correction: Array | None = None,
) -> Array:
    """Returns y_t = r_t + gamma * discount_t * ((1 - lambda_t) * V_t+1 + lambda_t * (y_t+1 + c_t+1)) of one row.

    With the greedy joint actions' values it is TD(lambda), Peng's Q(lambda); with those of the actions taken,
    SARSA(lambda) without importance weights, as in SMIX(lambda) (Wen et al., arXiv 1911.04094). With the correction
    c = V(s) - Q(s, u), which replaces the value of an action taken by the greedy one's, it is Q(lambda) with off-policy
    corrections (Harutyunyan et al., arXiv 1602.04951).

    Args:
        reward: ``[T]``.
        discount: ``[T]``, 0 where the task terminated and 1 elsewhere.
        gamma: scalar.
        next_value: ``[T, ..]``, V of the state after each step.
        td_lambda: ``[T]``, 0 at each episode's last step: there the target is `td_target`, which bootstraps past a time
            limit, and nothing comes in from the places after it, padding or another episode.
        correction: ``[T, ..]``, c of the state before each step; 0 if absent.

    Returns:
        ``[T, ..]``.
    """
    chex.assert_equal_shape_prefix([reward, discount, next_value, td_lambda], 1)
    # y_t = own_t + factor_t * y_t+1. Such maps compose to maps of the same kind, so that log2(T) rounds of operations
    # on all steps do it, where a loop over time would cost an accelerator several kernels per step.
    per_step = (len(reward), *(1,) * (next_value.ndim - 1))
    reward, discount, td_lambda = (leaf.reshape(per_step) for leaf in (reward, discount, td_lambda))
    value = (1 - td_lambda) * next_value
    if correction is not None:
        value += td_lambda * _one_later(correction)
    own = td_target(reward, discount, gamma, value)
    factor = gamma * discount * td_lambda

    def composed(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    return jax.lax.associative_scan(composed, (own, factor), reverse=True)[0]


def sum_to_the_end(values: Array, is_followed: Array) -> Array:
    """Returns the sum of each step's value and of those after it in its episode.

    Args:
        values: ``[B, T]``.
        is_followed: ``[B, T]``, 0 at each episode's last step, and 1 where another one of it follows.
    """
    each_row = jax.vmap(lambda_return, (0, 0, None, 0, 0))
    return each_row(values, jnp.ones_like(values), jnp.ones((), values.dtype), jnp.zeros_like(values), is_followed)


def n_step_return(
    reward: Array, discount: Array, gamma: Array, next_value: Array, is_followed: Array, num_steps: int
) -> Array:
    """Returns y_t = r_t + gamma r_t+1 + .. + gamma^n V_t+n of one row, over fewer steps where the episode ends earlier.

    Args:
        reward: ``[T]``.
        discount: ``[T]``, 0 where the task terminated and 1 elsewhere.
        gamma: scalar.
        next_value: ``[T, ..]``, V of the state after each step.
        is_followed: ``[T]``, 0 at each episode's last step, and 1 where another one of it follows.
        num_steps: n.

    Returns:
        ``[T, ..]``.
    """
    per_step = (len(reward), *(1,) * (next_value.ndim - 1))
    reward, discount, is_followed = (leaf.reshape(per_step) for leaf in (reward, discount, is_followed))
    y = td_target(reward, discount, gamma, next_value)
    for _ in range(num_steps - 1):  # the return over one step more: the next step's takes the place of V
        y = td_target(reward, discount, gamma, jnp.where(is_followed > 0, _one_later(y), next_value))
    return y


def _one_later(values: Array) -> Array:
    """Returns the values of the next step, ``[T, ..]``; zero after the last."""
    return jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])


def masked_mean_square(error: Array, mask: Array, weights: Array | None = None) -> Array:
    """Returns sum(w * (error * mask)^2) / sum(mask), a scalar; ``weights`` default to 1 (eq. 8 of the paper)."""
    # As in the authors' code, the mask multiplies the error before it is squared.
    squares = jnp.square(error * mask)
    return (squares if weights is None else weights * squares).sum() / _count(mask)


def masked_mean(value: Array, mask: Array) -> Array:
    """Returns the mean of ``value`` over the entries where ``mask`` is 1, a scalar."""
    return (value * mask).sum() / _count(mask)


def _count(mask: Array) -> Array:
    """Counts the entries that are 1; at least 1, for a batch of episodes that failed at their first step."""
    return jnp.maximum(mask.sum(), 1.0)
