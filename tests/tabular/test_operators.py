"""The operators on small multi-agent MDPs whose values are known."""

from typing import Any

import numpy as np
import pytest

from wqmix_jax.tabular import PracticalCentral
from wqmix_jax.tabular.operators import (
    MMDP,
    bellman,
    checked,
    iterate,
    qmix,
    restarts,
    two_steps,
    weighted,
    weighted_q_tot,
)

TIED = np.array([[2.0, -10], [0, 1]])
"""Its projection ties the optimum 2 with the 0 below it, and the agents play the 0."""


def random_mmdp(seed: int) -> MMDP:
    """Three states, two agents with two actions."""
    rng = np.random.default_rng(seed)
    return MMDP(rng.normal(size=(3, 2, 2)), rng.dirichlet(np.ones(3), size=(3, 2, 2)), 0.8)


def test_bellman_iterates_to_the_optimal_values() -> None:
    mmdp = two_steps(TIED, 0.9)
    trace = iterate(lambda q: bellman(mmdp, q), np.zeros((3, 2, 2)))
    np.testing.assert_allclose(trace.fixed_point, [np.full((2, 2), 1.8), TIED, np.zeros((2, 2))])
    assert trace.q.shape == (4, 3, 2, 2)
    np.testing.assert_allclose(trace.changes, [10, 1.8, 0])


def test_bellman_contracts_by_the_discount() -> None:
    mmdp, rng = random_mmdp(0), np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.normal(size=(2, 3, 2, 2))
        apart = np.abs(bellman(mmdp, one) - bellman(mmdp, other)).max()
        assert apart <= 0.8 * np.abs(one - other).max() + 1e-12


def test_qmix_has_more_than_one_fixed_point() -> None:
    """Table 1 in the second state: QMIX's value of the first depends on which minimiser is drawn."""
    traces = restarts(qmix, two_steps(np.eye(2), 0.9), num_restarts=12)
    values = {round(float(trace.fixed_point[0, 0, 0]), 9) for trace in traces}
    assert values == {0.9, 0.6}


def test_a_new_draw_in_every_application_keeps_qmix_moving() -> None:
    mmdp, rng = two_steps(np.eye(2), 0.9), np.random.default_rng(0)
    trace = iterate(lambda q: qmix(mmdp, q, seed=rng), np.zeros((3, 2, 2)), tolerance=-1, max_applications=40)
    values = trace.q[10:, 0, 0, 0]
    assert set(np.round(values, 9)) == {0.9, 0.6}
    assert not trace.converged
    with pytest.raises(ValueError, match="no fixed point was reached in 40 applications"):
        _ = trace.fixed_point


def test_a_uniform_weighting_does_not_recover_qmix() -> None:
    """QMIX bootstraps from Q_tot's 1; with w = 1 the other operator asks Q-hat what (1, 0) is worth, which is 0."""
    mmdp = two_steps(TIED, 0.9)
    [by_qmix] = restarts(qmix, mmdp, num_restarts=1)
    [by_q_hat] = restarts(weighted, mmdp, num_restarts=1, weighting="uniform")
    np.testing.assert_allclose(by_qmix.fixed_point[1], [[1, -10], [1, 1]])
    np.testing.assert_allclose(by_qmix.fixed_point[0], 0.9)
    np.testing.assert_allclose(by_q_hat.fixed_point[1], TIED)
    np.testing.assert_allclose(by_q_hat.fixed_point[0], 0)


@pytest.mark.parametrize(("plays", "values"), [("decentralised", {0.0}), ("argmax", {0.0, 1.8})])
@pytest.mark.parametrize("weighting", ["central", "optimistic"])
def test_a_tie_keeps_the_weighted_operator_from_the_optimal_values(
    weighting: str, plays: str, values: set[float]
) -> None:
    traces = restarts(weighted, two_steps(TIED, 0.9), num_restarts=8, weighting=weighting, alpha=1e-3, plays=plays)
    assert {round(float(trace.fixed_point[0, 0, 0]), 9) for trace in traces} == values


@pytest.mark.parametrize(("weighting", "alpha"), [("central", 0.1), ("optimistic", 0.1), (PracticalCentral(0.1), None)])
def test_the_fixed_point_is_q_star_where_the_argmax_is_unique(weighting: Any, alpha: float | None) -> None:
    mmdp = two_steps(np.array([[8.0, -12, -12], [-12, 0, 0], [-12, 0, 0]]), 0.9)
    [trace] = restarts(weighted, mmdp, num_restarts=1, weighting=weighting, alpha=alpha)
    np.testing.assert_allclose(trace.fixed_point[0], 7.2)
    q_tot = weighted_q_tot(mmdp, trace.fixed_point, weighting=weighting, alpha=alpha)
    assert q_tot[1].max() == pytest.approx(8)
    assert q_tot[1].argmax() == 0


def test_eq_10_reaches_q_star_on_random_tasks() -> None:
    for seed in range(3):
        mmdp = random_mmdp(seed)
        q_star = iterate(lambda q, mmdp=mmdp: bellman(mmdp, q), np.zeros((3, 2, 2))).fixed_point
        [trace] = restarts(weighted, mmdp, num_restarts=1, weighting=PracticalCentral(1e-5))
        np.testing.assert_allclose(trace.fixed_point, q_star, atol=1e-8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transition": np.ones((3, 2, 2))}, r"transition of shape \(3, 2, 2\) is not allowed"),
        ({"transition": np.ones((3, 2, 2, 3))}, "probabilities must be at least 0 and sum to 1"),
        ({"reward": np.full((3, 2, 2), np.nan)}, "reward is not allowed: each must be finite"),
        ({"discount": 1.0}, "discount=1.0 is not allowed"),
    ],
)
def test_what_is_no_mmdp_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(random_mmdp(0)._replace(**changed))


def test_an_unknown_way_to_play_is_refused() -> None:
    with pytest.raises(ValueError, match="plays='best' is not allowed: decentralised or argmax"):
        restarts(weighted, two_steps(TIED, 0.9), num_restarts=1, weighting="uniform", plays="best")
