"""Finds the best sum of per-agent utilities, VDN's class, by bounded least squares (`scipy.optimize.lsq_linear`).

A skew square is a symmetric one with a slack s >= 0: ``min_s (e + s)^2 + b s^2`` is ``e^2`` where the error e = q - x
is positive and ``b / (1 + b) e^2`` where it is negative.
"""

from typing import NamedTuple

import numpy as np
import scipy

from wqmix_jax.tabular.weightings import JointAction, Weights, squared_loss

_TOLERANCE = 1e-15
"""Relative change of the loss at which the active sets are final."""


class AdditiveFit(NamedTuple):
    """A sum of utilities.

    Attributes:
        loss: the weighted sum of squared errors.
        q_tot: the table, of the payoff's shape.
        greedy: the joint action that the weights depend on, or None if they don't.
    """

    loss: float
    q_tot: np.ndarray
    greedy: JointAction | None


def best_additive(q: np.ndarray, tables: Weights, greedy: JointAction | None) -> list[AdditiveFit]:
    """Fits the payoff once for each greedy joint action on which the weights depend, or once if they don't.

    Args:
        q: the payoff.
        tables: ``[G, C]``, see `weight_tables`.
        greedy: if given, only tables with these as the agents' best actions.
    """
    if len(tables.under) == 1:
        return [_fit(q, Weights(tables.under[0], tables.over[0]), greedy)]
    joint_actions = list(np.ndindex(q.shape)) if greedy is None else [greedy]
    rows = [int(np.ravel_multi_index(each, q.shape)) for each in joint_actions]
    weights = [Weights(tables.under[row], tables.over[row]) for row in rows]
    return [_fit(q, row, each) for row, each in zip(weights, joint_actions, strict=True)]


def basis(shape: tuple[int, ...], reference: JointAction | None) -> np.ndarray:
    """Returns columns that span the additive tables, ``[C, 1 + sum(A_a - 1)]``.

    The first is a constant, the value of ``reference`` (by default the first joint action); the others are what each
    other action of each agent adds to it.
    """
    joint_actions = np.indices(shape).reshape(len(shape), -1)
    columns = [np.ones(joint_actions.shape[1])]
    for axis, length in enumerate(shape):
        skipped = 0 if reference is None else reference[axis]
        columns += [joint_actions[axis] == action for action in range(length) if action != skipped]
    return np.column_stack(columns).astype(float)


def _fit(q: np.ndarray, weights: Weights, greedy: JointAction | None) -> AdditiveFit:
    """Fits one table; with ``greedy``, no other action may add anything to its value."""
    columns, target = basis(q.shape, greedy), q.ravel()
    skew = np.flatnonzero(weights.over < weights.under)
    under, over = weights.under[skew], weights.over[skew]
    slack = np.zeros((q.size, len(skew)))
    slack[skew, np.arange(len(skew))] = 1
    root = np.sqrt(weights.under)[:, None]
    penalty = np.sqrt(under * over / (under - over))
    matrix = np.block([[root * columns, -root * slack], [np.zeros((len(skew), columns.shape[1])), np.diag(penalty)]])
    lower, upper = np.full(matrix.shape[1], -np.inf), np.full(matrix.shape[1], np.inf)
    lower[columns.shape[1] :] = 0
    if greedy is not None:
        upper[1 : columns.shape[1]] = 0
    aim = np.append(root[:, 0] * target, np.zeros(len(skew)))
    bounds, patience = (lower, upper), 100 * matrix.shape[1]
    solved = scipy.optimize.lsq_linear(matrix, aim, bounds, method="bvls", tol=_TOLERANCE, max_iter=patience)
    q_tot = columns @ solved.x[: columns.shape[1]]
    return AdditiveFit(float(squared_loss(target, q_tot, weights)), q_tot.reshape(q.shape), greedy)
