"""Isotonic regression on a grid, exactly, for convex losses and many problems at once.

Once each agent's actions are ordered, a monotonic Q_tot is a table that falls along no axis, and the projection is a
convex problem: minimise ``sum_u under(u) (q - x)_+^2 + over(u) (x - q)_+^2`` over such tables x. No well-kept solver
covers a partial order together with a square that is asymmetric, so this is the classical recursion on level sets
(Maxwell and Muckstadt 1985; Hochbaum and Queyranne 2003 for any convex loss): fit a constant to a block of cells, find
the upper set that the loss pulls up the most, and where any is pulled up, split the block there and go on with both
parts. Nothing is iterated to a tolerance; the tests compare it with `scipy.optimize.nnls` on the cone's generators.

Tables lie flat: ``C`` cells in C order, index 0 of each axis the lowest. ``P`` counts problems.
"""

import functools
from collections.abc import Callable

import numpy as np
import scipy

MAX_UPPER_SETS = 10_000
"""Grids with more are not enumerated: 6 x 6 has 924, 3 x 3 x 3 has 980, 2 x 2 x 2 x 2 x 2 has 7581."""

_MAX_BASE = 3000
"""With more upper sets one axis more has too many, and comparing all pairs of them would be slow."""

_MAX_SUMS = 1_000_000
"""Sums over upper sets that are held in memory at once."""

_PROGRAMMES = 64
"""Linear programmes that are solved in one."""

_NO_GAIN = 1e-12
"""A pull this small beside the block's is rounding."""

BestUpperSet = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""``[P, C]`` values to the upper set of greatest sum of each row, ``[P, C]`` bool, and that sum, ``[P]``."""


def fit(q: np.ndarray, under: np.ndarray, over: np.ndarray, best_upper_set: BestUpperSet) -> np.ndarray:
    """The isotonic tables of least loss.

    Args:
        q: ``[P, C]`` targets.
        under: ``[P, C]`` weights > 0 of squared errors where the table lies below its target.
        over: ``[P, C]`` weights where it lies above, from 0 to ``under``.
        best_upper_set: the grid's, from `enumerated` or `by_linear_programme`.

    Returns:
        ``[P, C]``; the minimiser is the only one where all weights are positive.
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
    """The constant of least loss for each block, ``[P]``: a weighted mean, or an expectile where the loss is skew.

    Newton's method on the derivative, which is piecewise linear, and convex since ``over <= under``: from the left it
    climbs to the root in at most as many steps as there are pieces. Of several roots it takes the lowest.
    """
    under, over = under * block, over * block
    level = (under * q).sum(1) / under.sum(1)
    if np.array_equal(under, over):
        return level
    highest = np.where(block, q, -np.inf).max(1)
    below = None
    for _ in range(q.shape[1] + 1):
        level = np.minimum(level, highest)  # by rounding it may pass it, where no weight is left
        before, below = below, q >= level[:, None]
        if before is not None and np.array_equal(before, below):
            break
        weights = np.where(below, under, over)
        level = (weights * q).sum(1) / weights.sum(1)
    return level


@functools.cache
def enumerated(shape: tuple[int, ...]) -> BestUpperSet | None:
    """Looks the best upper set up among all of them, or None where a grid has more than `MAX_UPPER_SETS`."""
    sets = upper_sets(shape)
    if sets is None:
        return None
    columns = sets.T.astype(float)
    at_once = max(1, _MAX_SUMS // len(sets))

    def best(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen, gain = np.empty(len(values), int), np.empty(len(values))
        for start in range(0, len(values), at_once):
            rows = slice(start, start + at_once)
            sums = values[rows] @ columns
            chosen[rows], gain[rows] = sums.argmax(1), sums.max(1)
        return sets[chosen], gain

    return best


def upper_sets(shape: tuple[int, ...]) -> np.ndarray | None:
    """All upper sets of a grid, ``[U, C]`` bool, or None where there are more than `MAX_UPPER_SETS`.

    One of ``shape`` is a sequence of as many of ``shape[1:]`` as the first axis is long, each inside the next.
    """
    sets = np.array([[False], [True]])
    for length in reversed(shape):
        if length == 1:
            continue
        if len(sets) > _MAX_BASE:
            return None
        inside = ~(sets.astype(np.float32) @ ~sets.T > 0)  # [i, j]: set i lies in set j
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
    """All rows as one programme, since a call costs more than a small programme does."""
    all_falls = scipy.sparse.kron(scipy.sparse.eye(len(values)), falls, format="csr")
    aim, limits = -values.ravel(), np.zeros(all_falls.shape[0])
    solved = scipy.optimize.linprog(aim, A_ub=all_falls, b_ub=limits, bounds=(0, 1), method="highs")
    return solved.x.reshape(values.shape) > 0.5


def covers(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of a grid: flat indices of the lower and of the upper cell of each pair."""
    cells = np.arange(np.prod(shape)).reshape(shape)
    pairs = [(np.delete(cells, -1, axis).ravel(), np.delete(cells, 0, axis).ravel()) for axis in range(len(shape))]
    low, high = zip(*pairs, strict=True)
    return np.concatenate(low), np.concatenate(high)
