"""Decides by linear programmes (HiGHS) if a loss that ignores overestimates (eq. 11) has one minimiser or many."""

from typing import NamedTuple

import numpy as np
import scipy

from wqmix_jax.tabular.weightings import Weights

_EQUAL = 1e-6
"""Part of the payoff's range below which nothing counts as movement; HiGHS itself is exact to 1e-7."""


class Tables(NamedTuple):
    """The tables ``columns @ z`` with ``falls @ z <= 0``: a cone.

    Attributes:
        columns: ``[C, Z]``.
        falls: ``[K, Z]``.
    """

    columns: np.ndarray
    falls: np.ndarray


def representative(q: np.ndarray, q_tot: np.ndarray, weights: Weights, cone: Tables) -> np.ndarray | None:
    """Returns a minimiser inside the continuum, if there is one: the mean of those with an extreme estimate.

    Errors with a weight are the same in all minimisers, since squares are strictly convex. Only estimates that are not
    below their target may differ, where overestimates have no weight.

    Args:
        q: ``[C]`` targets.
        q_tot: ``[C]``, one minimiser.
        weights: ``[C]`` each.
        cone: the set of tables to choose from; it must bound the free estimates from above.

    Returns:
        ``[C]``, or None if ``q_tot`` is the only minimiser.
    """
    scale, offset = np.ptp(q) or 1.0, q.mean()
    target, here = (q - offset) / scale, (q_tot - offset) / scale
    free = (weights.over == 0) & (here >= target - _EQUAL)
    if not free.any():
        return None
    pinned, loose = cone.columns[~free], cone.columns[free]
    limits = {
        "A_ub": np.concatenate([-loose, cone.falls]),
        "b_ub": np.concatenate([-np.minimum(target, here)[free], np.zeros(len(cone.falls))]),
        "A_eq": pinned,
        "b_eq": here[~free],
        "bounds": (None, None),
        "method": "highs",
    }

    def extreme(direction: np.ndarray) -> np.ndarray:
        solved = scipy.optimize.linprog(direction, **limits)
        if solved.x is None:
            raise ArithmeticError(f"HiGHS found no minimiser next to a given one: {solved.message}")
        return cone.columns @ solved.x

    extremes = np.array([extreme(sign * row) for row in loose for sign in (1, -1)])
    return extremes.mean(0) * scale + offset if np.ptp(extremes, axis=0).max() > _EQUAL else None
