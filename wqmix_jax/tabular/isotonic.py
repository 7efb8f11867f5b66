"""Isotonic regression on a grid, exactly, for convex losses and many problems in one call.

Once each agent's actions are ordered, a monotonic Q_tot is a table that falls along no axis, and the projection is a
convex problem: minimise ``sum_u under(u) (q - x)_+^2 + over(u) (x - q)_+^2`` over such tables x. No well-kept solver
covers a partial order together with a square that is asymmetric, so this is the classical recursion on level sets
(Maxwell and Muckstadt 1985; Hochbaum and Queyranne 2003 for any convex loss): fit a constant to a block of cells, find
the upper set that the loss pulls up the most, and if there is one, split the block there and continue with both
parts. Nothing is iterated to a tolerance; the tests compare it with `scipy.optimize.nnls` on the cone's generators.

Tables are flat: ``C`` cells in C order, index 0 of each axis the lowest. ``P`` counts problems.
"""

import functools
from collections.abc import Callable

import numpy as np
import scipy

MAX_UPPER_SETS = 10_000
"""Grids with more upper sets are not enumerated: 6 x 6 has 924, 3 x 3 x 3 has 980, 2 x 2 x 2 x 2 x 2 has 7581."""

_MAX_BASE = 3000
"""With more upper sets, one more axis would have too many, and comparing all pairs of them would be slow."""

_MAX_SUMS = 1_000_000
"""The most sums over upper sets that are in memory simultaneously."""

_PROGRAMMES = 64
"""The number of linear programmes that are solved as one."""

_NO_GAIN = 1e-12
"""A pull this small, relative to the block's, is rounding."""

BestUpperSet = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""``[P, C]`` values to the upper set of greatest sum of each row, ``[P, C]`` bool, and that sum, ``[P]``."""


def fit(q: np.ndarray, under: np.ndarray, over: np.ndarray, best_upper_set: BestUpperSet) -> np.ndarray:
    """Fits the isotonic tables of least loss.

    Args:
        q: ``[P, C]`` targets.
        under: ``[P, C]`` weights > 0 of squared errors where the table is below its target.
        over: ``[P, C]`` weights where it is above, from 0 to ``under``.
        best_upper_set: the grid's, from `enumerated` or `by_linear_programme`.

    Returns:
        ``[P, C]``; the minimiser is unique if all weights are positive.
    """
    fitted = np.empty_like(q)
    problem, block = np.arange(len(q)), np.ones(q.shape, bool)
    while len(problem):
        level = _best_constant(q[problem], under[problem], over[problem], block)
        error = q[problem] - level[:, None]
        pull = np.where(error >= 0, under[problem], over[problem]) * error * block
        upper, gain = best_upper_set(pull)
        upper, lower = block & upper, block & ~upper
        splits = (gain > _NO_GAIN * np.abs(pull).sum(1)) & upper.any(1) & lower.any(1)
        done, cells = np.nonzero(block & ~splits[:, None])
        fitted[problem[done], cells] = level[done]
        problem = np.concatenate([problem[splits], problem[splits]])
        block = np.concatenate([upper[splits], lower[splits]])
    return fitted


def _best_constant(q: np.ndarray, under: np.ndarray, over: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Returns the constant of least loss for each block, ``[P]``: a weighted mean, or an expectile for a skew loss.

    It applies Newton's method to the derivative, which is piecewise linear, and convex since ``over <= under``: from
    the left it climbs to the root in at most as many steps as there are pieces. If there are several roots, it returns
    the lowest.
    """
    under, over = under * block, over * block
    level = (under * q).sum(1) / under.sum(1)
    if np.array_equal(under, over):
        return level
    highest = np.where(block, q, -np.inf).max(1)
    below = None
    for _ in range(q.shape[1] + 1):
        level = np.minimum(level, highest)  # rounding may exceed it, where no weight is left
        before, below = below, q >= level[:, None]
        if before is not None and np.array_equal(before, below):
            break
        weights = np.where(below, under, over)
        level = (weights * q).sum(1) / weights.sum(1)
    return level


@functools.cache
def enumerated(shape: tuple[int, ...]) -> BestUpperSet | None:
    """Returns a function that compares all upper sets, or None if a grid has more than `MAX_UPPER_SETS`."""
    sets = upper_sets(shape)
    if sets is None:
        return None
    columns = sets.T.astype(float)
    per_product = max(1, _MAX_SUMS // len(sets))

    def best(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen, gain = np.empty(len(values), int), np.empty(len(values))
        for start in range(0, len(values), per_product):
            rows = slice(start, start + per_product)
            sums = values[rows] @ columns
            chosen[rows], gain[rows] = sums.argmax(1), sums.max(1)
        return sets[chosen], gain

    return best


def upper_sets(shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns all upper sets of a grid, ``[U, C]`` bool, or None if there are more than `MAX_UPPER_SETS`.

    An upper set of ``shape`` is a sequence of upper sets of ``shape[1:]``, one per index of the first axis, each inside
    the next.
    """
    sets = np.array([[False], [True]])
    for length in reversed(shape):
        if length == 1:
            continue
        if len(sets) > _MAX_BASE:
            return None
        inside = ~(sets.astype(np.float32) @ ~sets.T > 0)  # [i, j]: set i is inside set j
        chains = np.arange(len(sets))[:, None]
        for _ in range(length - 1):
            if inside[chains[:, -1]].sum() > MAX_UPPER_SETS:
                return None
            rows, following = np.nonzero(inside[chains[:, -1]])
            chains = np.column_stack([chains[rows], following])
        sets = sets[chains].reshape(len(chains), -1)
    return sets


def by_linear_programme(shape: tuple[int, ...]) -> BestUpperSet:
    """Finds the best upper set by a linear programme (HiGHS), whose vertices are the upper sets; for large grids."""
    low, high = covers(shape)
    rows = np.arange(len(low))
    entries = (np.repeat([1.0, -1.0], len(low)), (np.tile(rows, 2), np.concatenate([low, high])))
    falls = scipy.sparse.csr_matrix(entries, shape=(len(low), int(np.prod(shape))))

    def best(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = np.empty(values.shape, bool)
        for start in range(0, len(values), _PROGRAMMES):
            rows = slice(start, start + _PROGRAMMES)
            inside[rows] = _highest_vertices(values[rows], falls)
        return inside, (values * inside).sum(1)

    return best


def _highest_vertices(values: np.ndarray, falls: "scipy.sparse.csr_matrix") -> np.ndarray:
    """Solves all rows as one programme, since a call costs more than a small programme."""
    all_falls = scipy.sparse.kron(scipy.sparse.eye(len(values)), falls, format="csr")
    aim, limits = -values.ravel(), np.zeros(all_falls.shape[0])
    solved = scipy.optimize.linprog(aim, A_ub=all_falls, b_ub=limits, bounds=(0, 1), method="highs")
    return solved.x.reshape(values.shape) > 0.5


def covers(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the neighbours of a grid: flat indices of the lower and of the upper cell of each pair."""
    cells = np.arange(np.prod(shape)).reshape(shape)
    pairs = [(np.delete(cells, -1, axis).ravel(), np.delete(cells, 0, axis).ravel()) for axis in range(len(shape))]
    low, high = zip(*pairs, strict=True)
    return np.concatenate(low), np.concatenate(high)
