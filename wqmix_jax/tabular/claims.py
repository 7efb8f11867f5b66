"""What the paper's sections 3 and 4 claim, as questions about one payoff, for tests and ``experiments.tabular``.

Ties are where the statements are delicate. A Q_tot may tie the optimum with a worse joint action: its argmax *set* is
then right, and the agents may still play the other one.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from wqmix_jax.envs.payoffs import PRESETS, payoff_tensor
from wqmix_jax.tabular.projection import Projection, argmax_set, project
from wqmix_jax.tabular.weightings import EpsilonGreedy, JointAction

Works = Callable[[np.ndarray, Projection], bool]
"""Whether a payoff's projection is right, in some sense."""

GRID = tuple(float(alpha) for alpha in np.logspace(-9, 0, 28))
"""The alphas that `largest_alpha` tries before it bisects: three per factor of ten."""


def argmax_is_right(q: np.ndarray, projection: Projection) -> bool:
    """Whether the argmax set holds an optimal joint action, for every minimiser: what is left of theorems 1 and 2."""
    return all(argmax_set(each) & argmax_set(q) for each in projection.minimisers)


def greedy_is_right(q: np.ndarray, projection: Projection) -> bool:
    """Whether the agents play an optimal joint action, for the first minimiser."""
    return projection.decentralised_greedy in argmax_set(q)


def unique_argmax_is_exact(q: np.ndarray, projection: Projection) -> bool:
    """Corollary 2: where Q_tot has a single maximum, it has Q's value there; True where it has several."""
    return all(
        np.isclose(each[next(iter(maxima))], q[next(iter(maxima))], rtol=0, atol=1e-9 * (np.ptp(q) or 1.0))
        for each in projection.minimisers
        if len(maxima := argmax_set(each)) == 1
    )


def underestimate(q: np.ndarray, projection: Projection) -> float:
    """How far ``q_tot`` lies below the value of the optimal joint action that it estimates best; at least 0."""
    return max(0.0, min(float(q[best] - projection.q_tot[best]) for best in argmax_set(q)))


def proof_alpha(q: np.ndarray) -> float:
    """The alpha that the proofs of theorems 1 and 2 need to be below: (gap / range)^2 / number of joint actions.

    The appendix has ``R_max / (1 - gamma)`` in the place of the range of Q. A constant payoff needs none: infinite.
    """
    worse = ~np.isin(np.arange(q.size), [np.ravel_multi_index(best, q.shape) for best in argmax_set(q)])
    if not worse.any():
        return np.inf
    gap = q.max() - q.ravel()[worse].max()
    return float((gap / np.ptp(q)) ** 2 / q.size)


def largest_alpha(
    q: Any,
    weighting: Literal["central", "optimistic"],
    works: Works = argmax_is_right,
    *,
    precision: float = 1e-3,
) -> float | None:
    """The largest alpha that works, to a relative ``precision``, or None where none in `GRID` does.

    The largest of `GRID` that works is found first, and the boundary above it by bisection; between two neighbours of
    the grid, working is taken to change once.
    """
    q = payoff_tensor(q)

    def right(alpha: float) -> bool:
        return works(q, project(q, weighting=weighting, alpha=alpha))

    index = next((index for index in reversed(range(len(GRID))) if right(GRID[index])), None)
    if index is None or index == len(GRID) - 1:
        return None if index is None else GRID[index]
    low, high = GRID[index], GRID[index + 1]
    while high / low > 1 + precision:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if right(middle) else (low, middle)
    return low


def with_zero_actions(num_zero_actions: int) -> np.ndarray:
    """Table 2's game with another number of actions that are worth 0 together; the table itself has two."""
    table = np.array(PRESETS["table2"])
    kept = table[:2, :2]
    return np.pad(kept, (0, num_zero_actions - 1), mode="edge")


def stretch(first: np.ndarray, second: np.ndarray, **how: Any) -> float:
    """How many times farther apart, in the maximum norm, two payoffs are after projection; a contraction has below 1.

    Of several minimisers the two closest are compared.
    """
    ends = [project(each, **how).minimisers for each in (first, second)]
    nearest = min(np.abs(one - other).max() for one in ends[0] for other in ends[1])
    return float(nearest / np.abs(first - second).max())


def stable_policies(q: np.ndarray, epsilon: float, **how: Any) -> frozenset[JointAction]:
    """The joint actions that reproduce themselves: greedy in a projection weighted by their epsilon-greedy policy."""
    return frozenset(greedy for greedy in np.ndindex(q.shape) if _next_policy(q, epsilon, greedy, how) == greedy)


def followed_policy(q: np.ndarray, epsilon: float, start: JointAction, **how: Any) -> JointAction | None:
    """Where epsilon-greedy behaviour ends, projected and greedy again and again; None where it runs in a circle."""
    seen: list[JointAction] = []
    here = start
    while here not in seen:
        seen.append(here)
        here = _next_policy(q, epsilon, here, how)
    return here if here == seen[-1] else None


def _next_policy(q: np.ndarray, epsilon: float, greedy: JointAction, how: dict[str, Any]) -> JointAction:
    return project(q, weighting=EpsilonGreedy(epsilon, greedy), **how).decentralised_greedy
