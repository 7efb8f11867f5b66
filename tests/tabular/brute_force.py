"""The least loss over monotonic tables by other means than the package's: one non-negative least squares per ordering.

An isotonic table is a constant plus a non-negative sum of indicators of upper sets. A square that counts ``over`` times
above its target and ``under`` times below is a symmetric one with a slack s >= 0 that costs ``under over / (under -
over) s^2``. No bound rules an ordering out.
"""

import itertools

import numpy as np
from scipy.optimize import lsq_linear, nnls


def least_loss(q: np.ndarray, under: np.ndarray, over: np.ndarray) -> tuple[float, list[np.ndarray]]:
    """The loss, and the distinct tables that have it."""
    sets = _upper_sets(q.shape)
    found = []
    for orders in itertools.product(*(list(itertools.permutations(range(length))) for length in q.shape)):
        index = np.ix_(*orders)
        table = np.empty(q.shape)
        table[index] = _isotonic(q[index].ravel(), under[index].ravel(), over[index].ravel(), sets).reshape(q.shape)
        error = q - table
        found.append((float((np.where(error > 0, under, over) * error**2).sum()), table))
    loss = min(each for each, _ in found)
    distinct: list[np.ndarray] = []
    for each, table in found:
        is_best = each <= loss * (1 + 1e-8) + 1e-10
        if is_best and not any(np.allclose(table, other, rtol=0, atol=1e-6 * np.ptp(q)) for other in distinct):
            distinct.append(table)
    return loss, distinct


def _isotonic(q: np.ndarray, under: np.ndarray, over: np.ndarray, sets: np.ndarray) -> np.ndarray:
    lowest = q.min()  # no best table is below
    generators, root = sets.T.astype(float), np.sqrt(under)[:, None]
    skew = np.flatnonzero(over < under)
    slack = np.eye(len(q))[:, skew]
    cost = np.diag(np.sqrt(under * over / np.where(over < under, under - over, 1))[skew])
    matrix = np.block([[root * generators, -root * slack], [np.zeros((len(skew), generators.shape[1])), cost]])
    amounts = _non_negative(matrix, np.append(root[:, 0] * (q - lowest), np.zeros(len(skew))))
    return lowest + generators @ amounts[: generators.shape[1]]


def _non_negative(matrix: np.ndarray, aim: np.ndarray) -> np.ndarray:
    """By `nnls`, and where that stops short of an optimum (scipy 1.17 does, rarely), by the slower `lsq_linear`."""
    amounts, _ = nnls(matrix, aim)
    gain = matrix.T @ (aim - matrix @ amounts)
    if (amounts >= 0).all() and gain.max() < 1e-9 and abs(gain @ amounts) < 1e-9:
        return amounts
    return lsq_linear(matrix, aim, (0, np.inf), method="bvls", tol=1e-15, max_iter=1000).x


def _upper_sets(shape: tuple[int, ...]) -> np.ndarray:
    """All subsets of the grid that hold, with a cell, all above it; the empty one left out."""
    num_cells = int(np.prod(shape))
    subsets = (np.arange(1, 2**num_cells)[:, None] >> np.arange(num_cells) & 1).astype(bool).reshape(-1, *shape)
    rises = [
        (np.diff(subsets.astype(int), axis=axis) >= 0).reshape(len(subsets), -1).all(1)
        for axis in range(1, len(shape) + 1)
    ]
    return subsets[np.all(rises, axis=0)].reshape(-1, num_cells)
