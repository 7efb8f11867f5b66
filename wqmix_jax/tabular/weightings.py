"""The weightings w(u) of the paper as two tables each: one where Q_tot underestimates, one where it overestimates.

In that form every loss here is convex once the greedy joint action (the paper's u-hat) is given; some weightings don't
depend on it.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

JointAction = tuple[int, ...]

NAMES = ("uniform", "central", "optimistic")

TIE = 1e-10
"""Values that differ by less than this part of their table's range are equal."""

_ROUNDING = 1e-13
"""The part of the largest value that rounding may add."""


class Weights(NamedTuple):
    """The weights of squared errors, tables of Q's shape.

    Attributes:
        under: > 0, where Q_tot is at most Q.
        over: from 0 to ``under``, where Q_tot is above Q.
    """

    under: np.ndarray
    over: np.ndarray


class GreedyWeighting(abc.ABC):
    """A weighting that depends on Q_tot's greedy joint action as well."""

    @abc.abstractmethod
    def weights(self, q: np.ndarray, greedy: JointAction) -> Weights:
        """Returns the weights of ``q`` if ``greedy`` has each agent's best action."""


@dataclasses.dataclass(frozen=True)
class PracticalCentral(GreedyWeighting):
    """The centrally-weighted loss as it is trained, eq. 10: 1 where u is greedy or better than the greedy, else alpha.

    Attributes:
        alpha: in (0, 1].
    """

    alpha: float

    def __post_init__(self) -> None:
        checked_alpha(self.alpha)

    def weights(self, q: np.ndarray, greedy: JointAction) -> Weights:
        """See `GreedyWeighting`; the comparison is strict."""
        weights = np.where(q > q[greedy], 1.0, self.alpha)
        weights[greedy] = 1.0
        return Weights(weights, weights)


@dataclasses.dataclass(frozen=True)
class QTRAN(GreedyWeighting):
    """QTRAN's loss as a weighting, eq. 11: no weight where Q_tot overestimates, unless the joint action is greedy.

    The paper pairs it with the additive class.

    Attributes:
        lambda_opt: > 0, weight of the greedy joint action.
        lambda_nopt: > 0, weight of the joint actions that are underestimated.
    """

    lambda_opt: float = 1.0
    lambda_nopt: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < np.inf:
                raise ValueError(f"{name}={value!r} is not allowed: a number above 0 is needed")

    def weights(self, q: np.ndarray, greedy: JointAction) -> Weights:
        """See `GreedyWeighting`."""
        under, over = np.full(q.shape, self.lambda_nopt), np.zeros(q.shape)
        under[greedy] = over[greedy] = self.lambda_opt
        return Weights(under, over)


@dataclasses.dataclass(frozen=True)
class EpsilonGreedy:
    """The probabilities of an epsilon-greedy behaviour policy (sections 5 and 6) as a fixed weighting.

    Attributes:
        epsilon: in (0, 1], the share of steps in which an agent, independently, draws uniformly from all its actions.
        greedy: the joint action of the other steps.
    """

    epsilon: float
    greedy: JointAction

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon={self.epsilon!r} is not allowed: a number above 0 and at most 1 is needed")

    def __call__(self, q: np.ndarray) -> np.ndarray:
        """Returns the probability of every joint action."""
        weights = np.ones(())
        for action, num_actions in zip(self.greedy, q.shape, strict=True):
            chances = np.full(num_actions, self.epsilon / num_actions)
            chances[action] += 1 - self.epsilon
            weights = np.multiply.outer(weights, chances)
        return weights


Weighting = str | Callable[[np.ndarray], np.ndarray] | GreedyWeighting
"""One of `NAMES`, a function of Q that returns weights > 0, or a `GreedyWeighting`."""


def weight_tables(
    q: np.ndarray, weighting: Weighting, *, alpha: float | None, central_ties: Literal["all", "one"]
) -> Weights:
    """Returns the weights as ``[G, C]`` tables, C joint actions in C order; arguments as in `project`.

    Returns:
        One row if they don't depend on the greedy joint action, else one per greedy joint action, in C order.

    Raises:
        ValueError: if an argument is not allowed.
    """
    if isinstance(weighting, GreedyWeighting):
        rows = [weighting.weights(q, greedy) for greedy in np.ndindex(q.shape)]
    else:
        rows = [_fixed_weights(q, weighting, alpha, central_ties)]
    under, over = zip(*rows, strict=True)
    return Weights(np.reshape(under, (len(rows), -1)), np.reshape(over, (len(rows), -1)))


def squared_loss(q: np.ndarray, q_tot: np.ndarray, weights: Weights) -> np.ndarray:
    """Returns the weighted sum of squared errors over the last axis."""
    error = q - q_tot
    return (np.where(error >= 0, weights.under, weights.over) * error**2).sum(-1)


def _fixed_weights(q: np.ndarray, weighting: Any, alpha: float | None, central_ties: str) -> Weights:
    if callable(weighting):
        weights = np.asarray(weighting(q), float)
        if weights.shape != q.shape or not (np.isfinite(weights) & (weights > 0)).all():
            raise ValueError(f"weighting is not allowed: it must return finite weights above 0 of shape {q.shape}")
        return Weights(weights, weights)
    ones = np.ones(q.shape)
    match weighting:
        case "uniform":
            return Weights(ones, ones)
        case "optimistic":
            return Weights(ones, checked_alpha(alpha) * ones)
        case "central":
            weights = np.where(_optimal(q, central_ties), 1.0, checked_alpha(alpha))
            return Weights(weights, weights)
    allowed = f"one of {', '.join(NAMES)}, a function of q or a GreedyWeighting is needed"
    raise ValueError(f"weighting={weighting!r} is not allowed: {allowed}")


def _optimal(q: np.ndarray, central_ties: str) -> np.ndarray:
    """Returns True where eq. 4 has weight 1: at all maxima of ``q``, or only at the first in C order."""
    if central_ties not in ("all", "one"):
        raise ValueError(f"central_ties={central_ties!r} is not allowed: all or one is needed")
    if central_ties == "all":
        return is_highest(q)
    return np.arange(q.size).reshape(q.shape) == q.argmax()


def is_highest(table: np.ndarray) -> np.ndarray:
    """Returns True where a table is at its maximum, up to `TIE` and rounding."""
    return table >= table.max() - TIE * np.ptp(table) - _ROUNDING * np.abs(table).max()


def checked_alpha(alpha: float | None) -> float:
    """Returns ``alpha``.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if alpha is None or not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha!r} is not allowed: a number above 0 and at most 1 is needed")
    return alpha
