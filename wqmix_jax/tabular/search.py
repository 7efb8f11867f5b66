"""Finds the best monotonic table over all orderings of the agents' actions, or over those of a bounded search."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from wqmix_jax.tabular.isotonic import MAX_UPPER_SETS, BestUpperSet, by_linear_programme, enumerated, fit
from wqmix_jax.tabular.weightings import JointAction, Weights, squared_loss

MAX_ORDERINGS = 1_000_000
"""The most joint orderings that are enumerated: 2 agents with 6 actions have 518,400, 3 agents with 3 have 216."""

MAX_VISITS = 300
"""The number of orderings that the bounded search tries."""

_LOSS_TIE = 1e-9
"""Losses that differ by less than this part are equal."""

SAME = 1e-9
"""Tables that differ by less than this part of the payoff's range are one."""

_ROUNDING = 1e-12
"""The part of the best constant's loss that rounding may add to a loss."""

_CHUNKS = (64, 4096)
"""The numbers of orderings that are fitted in one call: few at first, for a loss that rules out most of the others."""

Orders = tuple[np.ndarray, ...]
"""For each agent some orderings of its actions, ``[K_a, A_a]``, the worst action first."""


class Candidate(NamedTuple):
    """A table of least loss, or within rounding of it.

    Attributes:
        loss: the weighted sum of squared errors.
        q_tot: the table, of the payoff's shape.
        cells: ``[C]`` joint actions in the ordering's C order, as flat indices; the last is the greedy one.
    """

    loss: float
    q_tot: np.ndarray
    cells: np.ndarray


def is_enumerable(shape: tuple[int, ...]) -> bool:
    """Returns True if all orderings of games of this shape are tried, each over all upper sets of its grid."""
    return num_orderings(shape) <= MAX_ORDERINGS and enumerated(shape) is not None


def num_orderings(shape: tuple[int, ...]) -> float:
    """Counts the joint orderings, the product of each agent's factorial; infinite above 170 actions."""
    return math.prod(math.factorial(length) if length <= 170 else math.inf for length in shape)


def best_monotonic(q: np.ndarray, tables: Weights, greedy: JointAction | None) -> list[Candidate]:
    """Finds the tables of least loss over all orderings, for a shape that `is_enumerable`.

    Dropping all constraints but one agent's leaves chains, whose losses bound that of the grid from below. Orderings
    are tried in ascending order of this bound, until no bound is below the best loss any more.

    Args:
        q: the payoff.
        tables: ``[G, C]``, see `weight_tables`.
        greedy: if given, only orderings with these as the agents' top actions.
    """
    best_upper_set = enumerated(q.shape)
    if best_upper_set is None:
        raise ValueError(f"a grid of shape {q.shape} has more than {MAX_UPPER_SETS} upper sets")
    orders = tuple(_orders(length, None if greedy is None else greedy[axis]) for axis, length in enumerate(q.shape))
    bounds = _bounds(q, tables, orders)
    found = _Found(q, tables, best_upper_set)
    for chunk in _chunks(np.argsort(bounds, kind="stable")):
        chunk = chunk[bounds[chunk] <= found.highest()]
        if not len(chunk):
            break
        indices = np.unravel_index(chunk, [len(each) for each in orders])
        found.visit(tuple(each[index] for each, index in zip(orders, indices, strict=True)))
    return found.candidates()


def search_monotonic(q: np.ndarray, tables: Weights, greedy: JointAction | None, seed: int = 0) -> list[Candidate]:
    """Finds good tables by a bounded search over orderings; nothing proves that there are no better ones.

    It starts from the actions' means, then from their maxima, then at random. As long as the loss falls, it moves one
    action of one agent to another rank, until `MAX_VISITS` orderings were fitted.
    """
    best_upper_set = enumerated(q.shape) or by_linear_programme(q.shape)
    found = _Found(q, tables, best_upper_set)
    starts = _starts(q, greedy, np.random.default_rng(seed))
    while found.num_visits < MAX_VISITS:
        here = next(starts)
        loss = found.visit(tuple(each[None] for each in here))[0]
        while (moves := _moves(here, greedy)) and found.num_visits < MAX_VISITS:
            moves = moves[: MAX_VISITS - found.num_visits]
            losses = found.visit(tuple(np.array(each) for each in zip(*moves, strict=True)))
            if losses.min() >= loss * (1 - _LOSS_TIE):
                break
            here, loss = moves[int(losses.argmin())], losses.min()
    return found.candidates()


class _Found:
    """Fits orderings, and keeps those with the least loss so far."""

    def __init__(self, q: np.ndarray, tables: Weights, best_upper_set: BestUpperSet) -> None:
        self._q, self._tables, self._best_upper_set = q, tables, best_upper_set
        self._kept: list[Candidate] = []
        self._same = SAME * (np.ptp(q) or 1.0)
        self._merges = bool((tables.over > 0).all())  # else a table may move in one ordering, not in another
        self._lowest = math.inf
        self.num_visits = 0
        first = Weights(tables.under[0], tables.over[0])
        mean = np.average(q.ravel(), weights=first.under)
        self._rounding = _ROUNDING * float(squared_loss(q.ravel(), mean, first))

    def highest(self) -> float:
        """Returns the loss up to which a table still counts as one of the best."""
        return self._lowest * (1 + _LOSS_TIE) + self._rounding

    def visit(self, orders: Orders) -> np.ndarray:
        """Returns the losses of joint orderings, ``[K]``, given per agent as ``[K, A_a]``."""
        cells = _cells(self._q.shape, orders)
        row = cells[:, -1] if len(self._tables.under) > 1 else np.zeros(len(cells), int)
        q = self._q.ravel()[cells]
        weights = Weights(*(table[row[:, None], cells] for table in self._tables))
        fitted = fit(q, weights.under, weights.over, self._best_upper_set)
        losses = squared_loss(q, fitted, weights)
        self.num_visits += len(losses)
        self._lowest = min(self._lowest, float(losses.min()))
        self._kept = self.candidates()
        for index in np.flatnonzero(losses <= self.highest()):
            q_tot = np.empty(self._q.size)
            q_tot[cells[index]] = fitted[index]
            self._keep(Candidate(float(losses[index]), q_tot.reshape(self._q.shape), cells[index]))
        return losses

    def candidates(self) -> list[Candidate]:
        """Returns the tables of least loss; equal ones are merged if possible, with the first greedy joint action."""
        return [candidate for candidate in self._kept if candidate.loss <= self.highest()]

    def _keep(self, candidate: Candidate) -> None:
        for index, other in enumerate(self._kept if self._merges else ()):
            if np.abs(candidate.q_tot - other.q_tot).max() <= self._same:
                self._kept[index] = min(other, candidate, key=lambda each: each.cells[-1])
                return
        self._kept.append(candidate)


def _orders(num_actions: int, top: int | None) -> np.ndarray:
    """Returns all orderings of one agent's actions, ``[K, A]``, or those with ``top`` as the best action."""
    orders = np.array(list(itertools.permutations(range(num_actions))))
    return orders if top is None else orders[orders[:, -1] == top]


def _cells(shape: tuple[int, ...], orders: Orders) -> np.ndarray:
    """Returns flat indices of the joint actions in each joint ordering's C order, ``[K, C]``."""
    cells = np.zeros((len(orders[0]), 1), int)
    for length, each in zip(shape, orders, strict=True):
        cells = (cells[:, :, None] * length + each[:, None, :]).reshape(len(each), -1)
    return cells


def _bounds(q: np.ndarray, tables: Weights, orders: Orders) -> np.ndarray:
    """Returns a lower bound on the loss of each joint ordering, flat in C order: the best of the agents' bounds."""
    least = Weights(*(table.min(0).reshape(q.shape) for table in tables))  # whatever the greedy joint action
    bounds = np.zeros(())
    for axis, each in enumerate(orders):
        bounds = np.maximum.outer(bounds, _chain_losses(q, least, axis, each))
    return bounds.ravel()


def _chain_losses(q: np.ndarray, weights: Weights, axis: int, orders: np.ndarray) -> np.ndarray:
    """Returns the loss that one agent's ordering enforces, ``[K]``: the table's lines along its axis are separate."""
    chain = enumerated((q.shape[axis],))
    if chain is None:
        return np.zeros(len(orders))

    def lines(table: np.ndarray) -> np.ndarray:
        return np.moveaxis(table, axis, -1).reshape(-1, q.shape[axis])[:, orders].swapaxes(0, 1)

    targets, under, over = lines(q), lines(weights.under), lines(weights.over)

    def flat(table: np.ndarray) -> np.ndarray:
        return table.reshape(-1, q.shape[axis])

    fitted = fit(flat(targets), flat(under), flat(over), chain).reshape(targets.shape)
    return squared_loss(targets, fitted, Weights(under, over)).sum(1)


def _chunks(order: np.ndarray) -> Iterator[np.ndarray]:
    size, largest = _CHUNKS
    while len(order):
        yield order[:size]
        order, size = order[size:], min(4 * size, largest)


def _starts(q: np.ndarray, greedy: JointAction | None, rng: np.random.Generator) -> Iterator[Orders]:
    """Yields orderings by each action's mean, by its maximum, and then random ones without end."""

    def with_top(order: np.ndarray, axis: int) -> np.ndarray:
        if greedy is None:
            return order
        return np.append(order[order != greedy[axis]], greedy[axis])

    def sort(score: np.ndarray, axis: int) -> np.ndarray:
        return with_top(np.argsort(score, kind="stable"), axis)

    others = [tuple(set(range(q.ndim)) - {axis}) for axis in range(q.ndim)]
    yield tuple(sort(q.mean(each), axis) for axis, each in enumerate(others))
    yield tuple(sort(q.max(each), axis) for axis, each in enumerate(others))
    while True:
        yield tuple(with_top(rng.permutation(length), axis) for axis, length in enumerate(q.shape))


def _moves(here: Orders, greedy: JointAction | None) -> list[Orders]:
    """Returns the orderings with one action of one agent at another rank; with ``greedy`` the top action stays."""
    moves = []
    for axis, order in enumerate(here):
        ranks = range(len(order) - (greedy is not None))
        for source, target in itertools.permutations(ranks, 2):
            if target == source - 1:
                continue  # the same as moving the other one up
            moved = np.insert(np.delete(order, source), target, order[source])
            moves.append((*here[:axis], moved, *here[axis + 1 :]))
    return moves
