"""The claims of the paper's sections 3 and 4, as questions about one payoff, for tests and ``experiments.tabular``.

The statements are delicate if there are ties: a Q_tot may tie the optimum with a worse joint action. Its argmax *set*
is then right, and the agents may still play the other one.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from wqmix_jax.envs.payoffs import PRESETS, payoff_tensor
from wqmix_jax.tabular.projection import Projection, argmax_set, project
from wqmix_jax.tabular.weightings import EpsilonGreedy, JointAction

Works = Callable[[np.ndarray, Projection], bool]
"""Returns True if a payoff's projection is right, in some sense."""

GRID = tuple(float(alpha) for alpha in np.logspace(-9, 0, 28))
"""The alphas that `largest_alpha` tries before it bisects: three per factor of ten."""


def argmax_is_right(q: np.ndarray, projection: Projection) -> bool:
    """Returns True if every minimiser's argmax set has an optimal joint action: theorems 1 and 2, up to ties."""
    return all(argmax_set(each) & argmax_set(q) for each in projection.minimisers)


def greedy_is_right(q: np.ndarray, projection: Projection) -> bool:
    """Returns True if the agents play an optimal joint action with the first minimiser."""
    return projection.decentralised_greedy in argmax_set(q)


def unique_argmax_is_exact(q: np.ndarray, projection: Projection) -> bool:
    """Checks corollary 2: a single maximum of Q_tot has Q's value there. Returns True if there are several maxima."""
    return all(
        np.isclose(each[next(iter(maxima))], q[next(iter(maxima))], rtol=0, atol=1e-9 * (np.ptp(q) or 1.0))
        for each in projection.minimisers
        if len(maxima := argmax_set(each)) == 1
    )


def underestimate(q: np.ndarray, projection: Projection) -> float:
    """Returns by how much ``q_tot`` underestimates the optimal joint action that it estimates best; at least 0."""
    return max(0.0, min(float(q[best] - projection.q_tot[best]) for best in argmax_set(q)))


def proof_alpha(q: np.ndarray) -> float:
    """Returns the bound on alpha in the proofs of theorems 1 and 2: (gap / range)^2 / number of joint actions.

    The appendix has ``R_max / (1 - gamma)`` instead of the range of Q. A constant payoff has no bound: infinity.
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
    """Returns the largest alpha that works, to a relative ``precision``, or None if none in `GRID` does.

    First comes the largest alpha of `GRID` that works, then bisection finds the boundary above it; the search assumes
    that between two neighbours of the grid there is a single boundary.
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
    """Returns Table 2's game with another number of actions that pay 0 together; the table itself has two."""
    table = np.array(PRESETS["table2"])
    kept = table[:2, :2]
    return np.pad(kept, (0, num_zero_actions - 1), mode="edge")


def stretch(first: np.ndarray, second: np.ndarray, **how: Any) -> float:
    """Returns the ratio of two payoffs' distances after and before projection; a contraction has less than 1.

    Distances are in the maximum norm; if there are several minimisers, the two closest are compared.
    """
    ends = [project(each, **how).minimisers for each in (first, second)]
    nearest = min(np.abs(one - other).max() for one in ends[0] for other in ends[1])
    return float(nearest / np.abs(first - second).max())


def stable_policies(q: np.ndarray, epsilon: float, **how: Any) -> frozenset[JointAction]:
    """Returns the joint actions that are greedy in a projection weighted by their own epsilon-greedy policy."""
    return frozenset(greedy for greedy in np.ndindex(q.shape) if _next_policy(q, epsilon, greedy, how) == greedy)


def followed_policy(q: np.ndarray, epsilon: float, start: JointAction, **how: Any) -> JointAction | None:
    """Alternates projection and epsilon-greedy behaviour, and returns the final joint action; None if it cycles."""
    seen: list[JointAction] = []
    here = start
    while here not in seen:
        seen.append(here)
        here = _next_policy(q, epsilon, here, how)
    return here if here == seen[-1] else None


def _next_policy(q: np.ndarray, epsilon: float, greedy: JointAction, how: dict[str, Any]) -> JointAction:
    return project(q, weighting=EpsilonGreedy(epsilon, greedy), **how).decentralised_greedy
