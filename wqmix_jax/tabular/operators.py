"""The paper's operators on finite multi-agent MDPs: ``T*``, ``T*_Qmix``, ``T*_w`` and ``T*_WQMIX``.

The projections have several minimisers, of which the paper's operators draw one at random. Here the draw is seeded: a
seed makes an operator a function, so that it may have a fixed point, and other seeds are the restarts. With a
`numpy.random.Generator` instead, each application draws again.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from wqmix_jax.tabular.projection import Minimiser, argmax_set, solve
from wqmix_jax.tabular.weightings import JointAction

Seed = int | np.random.Generator

Plays = Literal["decentralised", "argmax"]
"""The choice among Q_tot's maxima: the agents' own actions, or a random element of the argmax set."""


class MMDP(NamedTuple):
    """A fully observable multi-agent MDP. The end of a task is a state without reward that leads to itself.

    Attributes:
        reward: ``[X, *A]``, expected reward of each joint action in each of the ``X`` states.
        transition: ``[X, *A, X]``, probabilities of the next states.
        discount: from 0 to below 1.
    """

    reward: np.ndarray
    transition: np.ndarray
    discount: float


class Trace(NamedTuple):
    """The trace of an operator that was applied ``K`` times.

    Attributes:
        q: ``[K + 1, X, *A]``, the start and the result of each application.
        changes: ``[K]``, the greatest change in each application.
        converged: whether the last change was within the tolerance.
    """

    q: np.ndarray
    changes: np.ndarray
    converged: bool

    @property
    def fixed_point(self) -> np.ndarray:
        """Returns the last table.

        Raises:
            ValueError: if the operator didn't converge.
        """
        if not self.converged:
            raise ValueError(f"no fixed point was reached in {len(self.changes)} applications")
        return self.q[-1]


def checked(mmdp: MMDP) -> MMDP:
    """Returns the MMDP as float64 arrays.

    Raises:
        ValueError: if its shapes, probabilities or discount are not allowed.
    """
    reward, transition = np.asarray(mmdp.reward, float), np.asarray(mmdp.transition, float)
    if reward.ndim < 2 or transition.shape != (*reward.shape, len(reward)):
        raise ValueError(
            f"transition of shape {transition.shape} is not allowed: "
            f"reward of shape {reward.shape} needs one axis of states, one per agent, and the next states last"
        )
    if not np.isfinite(reward).all():
        raise ValueError("reward is not allowed: each must be finite")
    if not (transition >= 0).all() or not np.allclose(transition.sum(-1), 1):
        raise ValueError("transition is not allowed: each joint action's probabilities must be at least 0 and sum to 1")
    if not 0 <= mmdp.discount < 1:
        raise ValueError(f"discount={mmdp.discount!r} is not allowed: a number from 0 to below 1 is needed")
    return MMDP(reward, transition, mmdp.discount)


def two_steps(payoff: np.ndarray, discount: float) -> MMDP:
    """Returns an MMDP in which state 0 pays nothing, state 1 after it pays ``payoff``, and state 2 is the end."""
    reward = np.stack([np.zeros_like(payoff), payoff, np.zeros_like(payoff)])
    return MMDP(reward, _to_states(reward.shape, [1, 2, 2]), discount)


def bellman(mmdp: MMDP, q: np.ndarray) -> np.ndarray:
    """Applies ``T*`` (eq. 1), a contraction by the discount; ``q`` ``[X, *A]``."""
    return _backup(mmdp, q.reshape(len(q), -1).max(1))


def qmix(mmdp: MMDP, q_tot: np.ndarray, *, seed: Seed = 0) -> np.ndarray:
    """Applies ``T*_Qmix = Pi_Qmix T*`` (section 3): Bellman targets of Q_tot itself, projected without a weighting."""
    return np.stack([each.q_tot for each in _projected(bellman(mmdp, q_tot), seed)])


def weighted(
    mmdp: MMDP, q_hat: np.ndarray, *, plays: Plays = "decentralised", seed: Seed = 0, **how: Any
) -> np.ndarray:
    """Applies ``T*_w`` (eq. 6) in the form of corollary 3: Q-hat of what its projection ``Pi_w`` plays.

    Args:
        mmdp: the task.
        q_hat: ``[X, *A]``, unrestricted.
        plays: the choice among Q_tot's maxima.
        seed: the seed of the draws among minimisers and among maxima.
        **how: further arguments of `project`: ``weighting``, ``alpha`` and so on.
    """
    rng = np.random.default_rng(seed)
    played = [_played(each, plays, rng) for each in _projected(q_hat, rng, **how)]
    return _backup(mmdp, np.array([table[each] for table, each in zip(q_hat, played, strict=True)]))


def weighted_q_tot(
    mmdp: MMDP, q_hat: np.ndarray, *, plays: Plays = "decentralised", seed: Seed = 0, **how: Any
) -> np.ndarray:
    """Applies ``T*_WQMIX = Pi_w T*_w`` (eq. 7), Q_tot of the next Q-hat; arguments as in `weighted`."""
    rng = np.random.default_rng(seed)
    target = weighted(mmdp, q_hat, plays=plays, seed=rng, **how)
    return np.stack([each.q_tot for each in _projected(target, rng, **how)])


def iterate(
    operator: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    *,
    tolerance: float = 1e-10,
    max_applications: int = 1000,
) -> Trace:
    """Applies an operator until no entry changes by more than ``tolerance``, at most ``max_applications`` times."""
    tables, changes = [np.asarray(start, float)], []
    for _ in range(max_applications):
        tables.append(operator(tables[-1]))
        changes.append(float(np.abs(tables[-1] - tables[-2]).max()))
        if changes[-1] <= tolerance:
            break
    return Trace(np.stack(tables), np.array(changes), bool(changes) and changes[-1] <= tolerance)


def restarts(
    operator: Callable[..., np.ndarray],
    mmdp: MMDP,
    *,
    num_restarts: int,
    start: np.ndarray | None = None,
    **options: Any,
) -> list[Trace]:
    """Iterates one of this module's operators with the seeds ``0 .. num_restarts - 1``, from zeros by default."""
    mmdp = checked(mmdp)
    start = np.zeros_like(mmdp.reward) if start is None else start

    def seeded(seed: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda q: operator(mmdp, q, seed=seed, **options)

    return [iterate(seeded(seed), start) for seed in range(num_restarts)]


def _backup(mmdp: MMDP, values: np.ndarray) -> np.ndarray:
    return mmdp.reward + mmdp.discount * mmdp.transition @ values


def _projected(q: np.ndarray, seed: Seed, **how: Any) -> list[Minimiser]:
    """Draws one minimiser per state at random."""
    rng = np.random.default_rng(seed)
    return [_drawn(solve(table, **how).minimisers, rng) for table in q]


def _drawn(choices: Any, rng: np.random.Generator) -> Any:
    return choices[rng.integers(len(choices))]


def _played(minimiser: Minimiser, plays: Plays, rng: np.random.Generator) -> JointAction:
    if plays == "decentralised":
        return minimiser.greedy
    if plays == "argmax":
        return _drawn(sorted(argmax_set(minimiser.q_tot)), rng)
    raise ValueError(f"plays={plays!r} is not allowed: decentralised or argmax is needed")


def _to_states(shape: tuple[int, ...], following: list[int]) -> np.ndarray:
    """Returns transitions in which every joint action in state x leads to ``following[x]``."""
    transition = np.zeros((*shape, shape[0]))
    for state, after in enumerate(following):
        transition[state, ..., after] = 1
    return transition
