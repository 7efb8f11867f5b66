"""The projection of a payoff into the tables that QMIX, or VDN, can represent: eq. 2 and 3 of the paper, exactly.

A table is monotonic if each agent's actions can be ordered such that it falls along no axis; ``f_s`` must then only be
non-decreasing. For one ordering the problem is convex (`isotonic`), and the projection is the best over all
orderings (`search`).
"""

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np

from wqmix_jax.envs.payoffs import payoff_tensor
from wqmix_jax.tabular.additive import basis, best_additive
from wqmix_jax.tabular.degeneracy import Tables, representative
from wqmix_jax.tabular.isotonic import covers
from wqmix_jax.tabular.search import MAX_VISITS, SAME, Candidate, best_monotonic, is_enumerable, search_monotonic
from wqmix_jax.tabular.weightings import JointAction, Weighting, Weights, is_highest, weight_tables


class NoProofWarning(UserWarning):
    """A game is too large for all its orderings: the best one that a bounded search saw may not be the best."""


class Minimiser(NamedTuple):
    """One table of least loss.

    Attributes:
        q_tot: the table, of the payoff's shape.
        greedy: each agent's best action, the first if several are equally good.
    """

    q_tot: np.ndarray
    greedy: JointAction


class Projection(NamedTuple):
    """The projection of a payoff; ``q_tot``, ``argmax_set`` and ``decentralised_greedy`` describe its first minimiser.

    Attributes:
        q_tot: the table, of the payoff's shape.
        loss: the weighted sum of squared errors over joint actions.
        argmax_set: all joint actions where ``q_tot`` is greatest.
        decentralised_greedy: each agent's top action in the minimising ordering, which it plays independently; the
            first if several are equally good. Always one of ``argmax_set``, but not an arbitrary one.
        minimisers: all distinct tables of least loss, in descending order of their entries.
        unique: whether there is only one. If they form a continuum, ``minimisers`` has one of them and this is False.
        proven: whether all orderings were tried; otherwise nothing proves that there is no better table.
    """

    q_tot: np.ndarray
    loss: float
    argmax_set: frozenset[JointAction]
    decentralised_greedy: JointAction
    minimisers: tuple[np.ndarray, ...]
    unique: bool
    proven: bool = True


class Solution(NamedTuple):
    """The result of `solve`, with every minimiser.

    Attributes:
        loss: the least loss.
        minimisers: see `Projection`, here with each agent's best action.
        unique: see `Projection`.
        proven: see `Projection`.
    """

    loss: float
    minimisers: tuple[Minimiser, ...]
    unique: bool
    proven: bool


def project(
    q: Any,
    *,
    weighting: Weighting = "uniform",
    alpha: float | None = None,
    central_ties: Literal["all", "one"] = "all",
    function_class: Literal["monotonic", "additive"] = "monotonic",
    greedy: JointAction | None = None,
) -> Projection:
    """Projects a payoff, to the global optimum.

    For monotonic tables, all orderings are tried, up to a million with at most 10,000 upper sets each: 2 agents with 6
    actions, 3 agents with 3, 5 agents with 2. For larger games a bounded search tries some orderings, with a
    `NoProofWarning` and ``proven=False``.

    Args:
        q: the payoff: a nested list or an array with one axis per agent, any numbers of actions; or a preset's name.
        weighting: ``uniform`` (QMIX, eq. 2); ``central`` (eq. 4) or ``optimistic`` (eq. 5), which need ``alpha``; a
            function of ``q`` that returns fixed weights > 0; or a `GreedyWeighting`, such as `PracticalCentral`
            (eq. 10) and `QTRAN` (eq. 11), which is minimised over the greedy joint action as well.
        alpha: weight in (0, 1] of the other joint actions; ignored by other weightings.
        central_ties: whether eq. 4 puts weight 1 on all optimal joint actions or on the first alone.
        function_class: ``monotonic`` (QMIX) or ``additive`` (VDN).
        greedy: only tables in whose ordering these are the agents' top actions; all by default.

    Raises:
        ValueError: if an argument is not allowed.
    """
    solved = solve(
        q, weighting=weighting, alpha=alpha, central_ties=central_ties, function_class=function_class, greedy=greedy
    )
    first = solved.minimisers[0]
    return Projection(
        q_tot=first.q_tot,
        loss=solved.loss,
        argmax_set=argmax_set(first.q_tot),
        decentralised_greedy=first.greedy,
        minimisers=tuple(each.q_tot for each in solved.minimisers),
        unique=solved.unique,
        proven=solved.proven,
    )


def solve(
    q: Any,
    *,
    weighting: Weighting = "uniform",
    alpha: float | None = None,
    central_ties: Literal["all", "one"] = "all",
    function_class: Literal["monotonic", "additive"] = "monotonic",
    greedy: JointAction | None = None,
) -> Solution:
    """Projects a payoff as `project` does, and returns each minimiser's greedy joint action as well."""
    q = payoff_tensor(q)
    tables = weight_tables(q, weighting, alpha=alpha, central_ties=central_ties)
    greedy = _checked_greedy(q, greedy)
    if function_class == "additive":
        return _best(q, tables, _additive(q, tables, greedy), proven=True)
    if function_class != "monotonic":
        raise ValueError(f"function_class={function_class!r} is not allowed: monotonic or additive is needed")
    if is_enumerable(q.shape):
        return _best(q, tables, _monotonic(q, tables, best_monotonic(q, tables, greedy)), proven=True)
    message = f"{q.shape} actions have too many orderings: the best of {MAX_VISITS} that a search tried is no proof"
    warnings.warn(message, NoProofWarning, stacklevel=3)
    return _best(q, tables, _monotonic(q, tables, search_monotonic(q, tables, greedy)), proven=False)


def argmax_set(table: np.ndarray) -> frozenset[JointAction]:
    """Returns all joint actions where a table is greatest."""
    return frozenset(tuple(each) for each in np.argwhere(is_highest(table)).tolist())


class _Fit(NamedTuple):
    """A candidate of either class, with its row of the weight tables and the cone of tables it was chosen from."""

    loss: float
    q_tot: np.ndarray
    greedy: JointAction
    row: int
    cone: Tables | None


def _additive(q: np.ndarray, tables: Weights, greedy: JointAction | None) -> list[_Fit]:
    fits = best_additive(q, tables, greedy)
    lowest = min(each.loss for each in fits)
    rounding = 1e-12 * float((tables.under[0] * (q.ravel() - q.mean()) ** 2).sum())
    found = []
    for loss, q_tot, chosen in fits:
        if loss > lowest * (1 + SAME) + rounding:
            continue
        if chosen is None:
            found.append(_Fit(loss, q_tot, _first_on_top(q_tot), 0, None))
            continue
        columns = basis(q.shape, chosen)
        row = int(np.ravel_multi_index(chosen, q.shape)) if len(tables.under) > 1 else 0
        found.append(_Fit(loss, q_tot, chosen, row, Tables(columns, np.eye(columns.shape[1])[1:])))
    return found


def _monotonic(q: np.ndarray, tables: Weights, candidates: list[Candidate]) -> list[_Fit]:
    low, high = covers(q.shape)
    is_skew = (tables.over == 0).any()
    found = []
    for loss, q_tot, cells in candidates:
        top = int(cells[-1])
        greedy = tuple(int(action) for action in np.unravel_index(top, q.shape))
        rise = np.eye(q.size)[cells]
        cone = Tables(np.eye(q.size), rise[low] - rise[high]) if is_skew else None
        found.append(_Fit(loss, q_tot, greedy, top if len(tables.under) > 1 else 0, cone))
    return found


def _best(q: np.ndarray, tables: Weights, fits: list[_Fit], *, proven: bool) -> Solution:
    """Merges equal tables, and looks for a continuum if overestimates may have no weight."""
    loss = min(each.loss for each in fits)
    same = SAME * (np.ptp(q) or 1.0)
    merged: list[Minimiser] = []
    for each in sorted(fits, key=lambda fit: fit.greedy):
        if not any(np.abs(each.q_tot - other.q_tot).max() <= same for other in merged):
            merged.append(Minimiser(each.q_tot, each.greedy))
    merged.sort(key=lambda each: tuple(np.round(each.q_tot.ravel() / same, -2)), reverse=True)
    for each in fits:
        if each.cone is None:
            continue
        weights = Weights(tables.under[each.row], tables.over[each.row])
        moved = representative(q.ravel(), each.q_tot.ravel(), weights, each.cone)
        if moved is not None:
            return Solution(loss, (Minimiser(moved.reshape(q.shape), each.greedy),), unique=False, proven=proven)
    return Solution(loss, tuple(merged), unique=len(merged) == 1, proven=proven)


def _first_on_top(q_tot: np.ndarray) -> JointAction:
    """Returns the first maximum, agent by agent, of a table that is a sum of utilities."""
    return tuple(int(action) for action in np.argwhere(is_highest(q_tot)).min(0))


def _checked_greedy(q: np.ndarray, greedy: JointAction | None) -> JointAction | None:
    if greedy is None:
        return None
    chosen = tuple(greedy)
    if len(chosen) != q.ndim or not all(0 <= action < length for action, length in zip(chosen, q.shape, strict=True)):
        raise ValueError(f"greedy={chosen} is not allowed: one action per agent of a game of {q.shape} is needed")
    return chosen
