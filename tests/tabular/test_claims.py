"""The paper's statements on random payoffs: what holds for all of them, and where it stops."""

from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from wqmix_jax.tabular import PracticalCentral, project
from wqmix_jax.tabular.claims import (
    argmax_is_right,
    followed_policy,
    greedy_is_right,
    largest_alpha,
    proof_alpha,
    stable_policies,
    stretch,
    underestimate,
    unique_argmax_is_exact,
    with_zero_actions,
)
from wqmix_jax.tabular.projection import argmax_set

TIED = np.array([[2.0, -10], [0, 1]])

PAYOFFS = st.sampled_from([(3, 3), (2, 2, 2), (2, 4)]).flatmap(
    lambda shape: hypothesis.extra.numpy.arrays(float, shape, elements=st.integers(-9, 9).map(float))
)
WEIGHTINGS = st.sampled_from(["central", "optimistic"])


def below(limit: float, share: float) -> float:
    """An alpha below a limit, and of use to the solver."""
    return max(min(limit, 1.0) * share, 1e-8)


@hypothesis.given(PAYOFFS, WEIGHTINGS, st.sampled_from([0.999, 0.1]))
def test_below_the_alpha_of_the_proofs_the_argmax_set_holds_an_optimum(
    q: np.ndarray, weighting: Any, share: float
) -> None:
    """Theorems 1 and 2 for all payoffs, up to ties."""
    projection = project(q, weighting=weighting, alpha=below(proof_alpha(q), share))
    assert argmax_is_right(q, projection)


@hypothesis.given(PAYOFFS, WEIGHTINGS)
def test_where_the_argmax_is_unique_the_theorems_hold(q: np.ndarray, weighting: Any) -> None:
    """And propositions 1 and 2: the maximum is exact."""
    projection = project(q, weighting=weighting, alpha=below(proof_alpha(q), 0.5))
    if all(len(argmax_set(each)) == 1 for each in projection.minimisers):
        assert greedy_is_right(q, projection)
        assert all(each.max() == pytest.approx(q.max()) for each in projection.minimisers)


@hypothesis.given(PAYOFFS, st.sampled_from(["uniform", "central", "optimistic"]), st.sampled_from([0.01, 0.3, 1.0]))
def test_a_unique_argmax_is_exact_for_every_alpha(q: np.ndarray, weighting: Any, alpha: float) -> None:
    """Corollary 2."""
    assert unique_argmax_is_exact(q, project(q, weighting=weighting, alpha=alpha))


@hypothesis.given(PAYOFFS, st.sampled_from([0.499, 0.05]))
def test_eq_10_needs_no_condition_below_half_the_alpha_of_the_proofs(q: np.ndarray, share: float) -> None:
    """The weighting that is trained, minimised over u-hat too: all maxima of Q_tot are optimal, and so is the play."""
    projection = project(q, weighting=PracticalCentral(below(proof_alpha(q), share)))
    assert greedy_is_right(q, projection)
    assert all(argmax_set(each) <= argmax_set(q) for each in projection.minimisers)


@hypothesis.given(PAYOFFS)
def test_where_qmix_misses_the_optimum_it_underestimates_it(q: np.ndarray) -> None:
    projection = project(q)
    if not argmax_set(projection.q_tot) & argmax_set(q):
        assert underestimate(q, projection) > 0


def test_qmix_underestimates_the_optimum_with_a_third_zero_action() -> None:
    q = with_zero_actions(3)
    projection = project(q)
    assert not argmax_is_right(q, projection)
    assert underestimate(q, projection) == pytest.approx(8 + 64 / 7)
    assert underestimate(with_zero_actions(2), project(with_zero_actions(2))) == 0


@pytest.mark.parametrize("weighting", ["central", "optimistic"])
def test_the_theorems_stop_at_ties(weighting: Any) -> None:
    assert largest_alpha(TIED, weighting) == 1
    assert largest_alpha(TIED, weighting, greedy_is_right) is None


def test_the_alpha_of_the_proofs() -> None:
    """Gap 8 and range 20 over 9 joint actions; table 1: 1, 1 and 4."""
    assert proof_alpha(with_zero_actions(2)) == pytest.approx(0.16 / 9)
    assert proof_alpha(np.eye(2)) == 0.25
    assert proof_alpha(np.ones((2, 2))) == np.inf


@pytest.mark.parametrize("weighting", ["central", "optimistic"])
def test_bisection_ends_at_the_boundary(weighting: Any) -> None:
    q = with_zero_actions(3)
    alpha = largest_alpha(q, weighting, greedy_is_right)
    assert alpha is not None
    assert proof_alpha(q) < alpha < 1
    assert greedy_is_right(q, project(q, weighting=weighting, alpha=alpha))
    assert not greedy_is_right(q, project(q, weighting=weighting, alpha=alpha * 1.002))


@pytest.mark.parametrize("weighting", ["central", "optimistic"])
def test_no_alpha_serves_all_payoffs(weighting: Any) -> None:
    """The smaller the optimum's lead over the 8, the smaller alpha must be: it shares a level with the 3."""
    largest = [largest_alpha(np.array([[3, 8 + lead, 8], [2, -7, 5]]), weighting) for lead in (0.1, 0.01, 0.001)]
    np.testing.assert_allclose(largest, [0.1 / 5, 0.01 / 5, 0.001 / 5], rtol=2e-3)


def test_qmix_is_no_contraction() -> None:
    """Table 1, one optimum raised by a thousandth or the other: the projections choose different ones."""
    raised = [np.diag([1.001, 1.0]), np.diag([1.0, 1.001])]
    assert stretch(*raised) > 100
    assert stretch(TIED, TIED + 0.5) == pytest.approx(1)


def test_epsilon_greedy_behaviour_on_four_actions() -> None:
    """Rare exploration confirms what is played, be it right or wrong; a uniform policy has one answer."""
    q = with_zero_actions(3)
    assert stable_policies(q, 1.0) == {(1, 1)}
    often = stable_policies(q, 0.05)
    assert {(0, 0), (1, 1)} <= often
    assert followed_policy(q, 1.0, (0, 0)) == (1, 1)
    assert followed_policy(q, 0.05, (0, 0)) == (0, 0)
