"""Projections against numbers worked out by hand and against an independent brute-force solver."""

import itertools
import time
from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.tabular.brute_force import least_loss
from wqmix_jax.tabular import QTRAN, EpsilonGreedy, NoProofWarning, PracticalCentral, project, search
from wqmix_jax.tabular.claims import with_zero_actions
from wqmix_jax.tabular.isotonic import by_linear_programme, enumerated, fit, upper_sets
from wqmix_jax.tabular.search import best_monotonic, search_monotonic
from wqmix_jax.tabular.weightings import weight_tables

TABLE_1 = np.eye(2)
TABLE_2 = np.array([[8.0, -12, -12], [-12, 0, 0], [-12, 0, 0]])
TIED = np.array([[2.0, -10], [0, 1]])

SHAPES = ((3, 3), (2, 2, 2))


def payoffs(shape: tuple[int, ...] = (3, 3)) -> st.SearchStrategy[np.ndarray]:
    return hypothesis.extra.numpy.arrays(float, shape, elements=st.integers(-9, 9).map(float))


def is_monotonic(table: np.ndarray) -> bool:
    """Returns True if each agent's actions can be ordered such that the table falls along no axis."""
    for axis in range(table.ndim):
        slices = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
        if any((one < other).any() and (one > other).any() for one, other in itertools.combinations(slices, 2)):
            return False
    return True


def test_table_1_has_four_minimisers() -> None:
    projection = project("table1")
    assert projection.loss == pytest.approx(2 / 3, rel=1e-12)
    third = [[1, 1 / 3], [1 / 3, 1 / 3]], [[1 / 3, 1 / 3], [1 / 3, 1]]
    two_thirds = [[2 / 3, 2 / 3], [0, 2 / 3]], [[2 / 3, 0], [2 / 3, 2 / 3]]
    np.testing.assert_allclose(projection.minimisers, [third[0], *two_thirds, third[1]], atol=1e-12)
    np.testing.assert_array_equal(projection.q_tot, projection.minimisers[0])
    assert not projection.unique
    assert projection.argmax_set == {(0, 0)}
    assert projection.decentralised_greedy == (0, 0)


@pytest.mark.parametrize(
    ("how", "loss", "best", "rest"),
    [
        ({}, 288, 8, -6),
        ({"weighting": "central", "alpha": 0.1}, 28.8, 8, -6),
        ({"weighting": "optimistic", "alpha": 0.1}, 576 / 11, 8, -12 / 11),
        ({"weighting": PracticalCentral(0.1)}, 28.8, 8, -6),
        ({"weighting": lambda q: np.where(q == 8, 1.0, 0.5)}, 144, 8, -6),
    ],
)
def test_table_2_is_projected_to_its_optimum(how: dict[str, Any], loss: float, best: float, rest: float) -> None:
    projection = project("table2", **how)
    assert projection.loss == pytest.approx(loss, rel=1e-12)
    expected = np.full((3, 3), rest)
    expected[0, 0] = best
    np.testing.assert_allclose(projection.q_tot, expected, rtol=1e-12)
    assert projection.unique
    assert projection.proven
    assert projection.argmax_set == {(0, 0)}
    assert projection.decentralised_greedy == (0, 0)


def test_table_2_with_a_wrong_argmax_costs_320() -> None:
    """If the agents play (0, 1), the optimum is tied with it, at 315.43; all others leave the optimum out."""
    wrong = [project(TABLE_2, greedy=each) for each in np.ndindex(3, 3) if each != (0, 0)]
    tied = min(wrong, key=lambda each: each.loss)
    assert tied.loss == pytest.approx(2208 / 7, rel=1e-12)
    assert (0, 0) in tied.argmax_set
    best = min((each for each in wrong if (0, 0) not in each.argmax_set), key=lambda each: each.loss)
    assert best.loss == pytest.approx(320, rel=1e-12)
    np.testing.assert_allclose(best.q_tot, [[-8, -8, -8], [-8, 0, 0], [-8, 0, 0]], atol=1e-12)
    papers = np.array([[-12, -12, -12], [-12, 0, 0], [-12, 0, 0]])
    assert ((TABLE_2 - papers) ** 2).sum() == 400


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_more_zero_actions_turn_the_argmax_wrong(k: int) -> None:
    q = with_zero_actions(k)
    right, wrong = project(q, greedy=(0, 0)), project(q, greedy=(1, 1))
    assert right.loss == pytest.approx(144 * 2 * k**3 / (k**2 + 2 * k), rel=1e-12)
    assert wrong.loss == pytest.approx(400 * 2 * k / (2 * k + 1), rel=1e-12)
    assert ((0, 0) in project(q).argmax_set) == (k <= 2)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("weighting", ["central", "optimistic"])
def test_an_optimum_tied_with_a_worse_action_is_not_played(weighting: str, alpha: float) -> None:
    projection = project(TIED, weighting=weighting, alpha=alpha)
    shared = 2 / (1 + alpha)
    np.testing.assert_allclose(projection.minimisers, [[[shared, -10], [shared, 1]]], rtol=1e-9)
    assert projection.loss == pytest.approx(4 * alpha / (1 + alpha), rel=1e-9)
    assert projection.argmax_set == {(0, 0), (1, 0)}
    assert projection.decentralised_greedy == (1, 0)


@pytest.mark.parametrize("alpha", [1e-3, 0.1])
def test_an_optimum_that_is_the_only_maximum_costs_more(alpha: float) -> None:
    single = project(TIED, weighting="central", alpha=alpha, greedy=(0, 0))
    assert single.argmax_set == {(0, 0)}
    assert single.loss == pytest.approx(60.5 * alpha, rel=1e-9)


@pytest.mark.parametrize("weighting", ["uniform", "central", "optimistic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_minimisers_are_those_of_brute_force(shape: tuple[int, ...], weighting: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        q = rng.integers(-10, 11, size=shape).astype(float)
        alpha = float(rng.choice([0.01, 0.1, 0.5]))
        projection = project(q, weighting=weighting, alpha=alpha)
        weights = np.where(q == q.max(), 1.0, alpha) if weighting == "central" else np.ones(shape)
        loss, tables = least_loss(q, weights, alpha * np.ones(shape) if weighting == "optimistic" else weights)
        assert projection.loss == pytest.approx(loss, rel=1e-6, abs=1e-9)
        assert len(projection.minimisers) == len(tables)
        assert all(min(np.abs(each - other).max() for other in tables) < 1e-5 for each in projection.minimisers)


@pytest.mark.parametrize("weighting", ["uniform", "central", "optimistic", PracticalCentral(0.1)])
def test_bounds_rule_out_no_optimum(weighting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small games are fitted in one chunk, all orderings; one by one, the bounds decide."""
    rng = np.random.default_rng(0)
    games = rng.integers(-9, 10, size=(20, 3, 3)).astype(float)
    fitted_all = [project(q, weighting=weighting, alpha=0.1) for q in games]
    monkeypatch.setattr(search, "_CHUNKS", (1, 1))
    for q, every in zip(games, fitted_all, strict=True):
        bounded = project(q, weighting=weighting, alpha=0.1)
        assert bounded.loss == pytest.approx(every.loss, rel=1e-12)
        np.testing.assert_allclose(bounded.minimisers, every.minimisers, atol=1e-9)


@hypothesis.given(payoffs(), st.sampled_from([0.01, 0.1, 0.5]))
def test_eq_10_is_the_best_over_all_greedy_joint_actions(q: np.ndarray, alpha: float) -> None:
    projection = project(q, weighting=PracticalCentral(alpha))
    losses = []
    for greedy in np.ndindex(q.shape):
        weights = np.where(q > q[greedy], 1.0, alpha)
        weights[greedy] = 1.0
        losses.append(project(q, weighting=lambda _, weights=weights: weights, greedy=greedy).loss)
    assert projection.loss == pytest.approx(min(losses), rel=1e-9, abs=1e-9)


@hypothesis.given(payoffs(), st.sampled_from(["uniform", "central", "optimistic"]), st.data())
def test_a_projection_is_monotonic_and_local_changes_do_not_help(q: np.ndarray, weighting: str, data: Any) -> None:
    projection = project(q, weighting=weighting, alpha=0.1)
    tables = weight_tables(q, weighting, alpha=0.1, central_ties="all")
    for table in projection.minimisers:
        assert is_monotonic(np.round(table, 9))
        other = project(data.draw(payoffs())).q_tot  # a random monotonic table
        for orders in itertools.islice(itertools.product(itertools.permutations(range(3)), repeat=2), 36):
            moved = 0.9 * table + 0.1 * other[np.ix_(*orders)]
            if is_monotonic(moved):
                error = q.ravel() - moved.ravel()
                loss = (np.where(error > 0, tables.under[0], tables.over[0]) * error**2).sum()
                assert loss >= projection.loss * (1 - 1e-9) - 1e-9


@hypothesis.given(payoffs(), st.sampled_from(["uniform", "central", "optimistic"]))
def test_names_and_scale_of_actions_do_not_matter(q: np.ndarray, weighting: str) -> None:
    projection = project(q, weighting=weighting, alpha=0.1)
    moved = project(3 * q[[2, 0, 1]].T - 5, weighting=weighting, alpha=0.1)
    assert moved.loss == pytest.approx(9 * projection.loss, rel=1e-9, abs=1e-9)
    assert len(moved.minimisers) == len(projection.minimisers)
    back = [((each + 5) / 3).T[[1, 2, 0]] for each in moved.minimisers]
    for each in projection.minimisers:
        assert min(np.abs(each - other).max() for other in back) < 1e-6


def test_central_ties_may_be_one_alone() -> None:
    """With the weight 1 on the first of table 1's optima alone, the other is given up."""
    both = project(TABLE_1, weighting="central", alpha=0.1)
    one = project(TABLE_1, weighting="central", alpha=0.1, central_ties="one")
    assert both.loss > one.loss == pytest.approx(0.2 / 3, rel=1e-12)  # 0, 0 and 1, of weight 0.1 each, share a third
    np.testing.assert_allclose(one.minimisers, [[[1, 1 / 3], [1 / 3, 1 / 3]]], rtol=1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "central", "optimistic", PracticalCentral(0.1)])
def test_additive_tables_solve_their_normal_equations(weighting: Any) -> None:
    """At the best sum of utilities the weighted errors of every action of every agent add up to nothing."""
    q = np.random.default_rng(0).normal(size=(3, 4))
    projection = project(q, weighting=weighting, alpha=0.1, function_class="additive")
    table = projection.q_tot
    np.testing.assert_allclose(table - table[:1] - table[:, :1] + table[0, 0], 0, atol=1e-9)
    if not isinstance(weighting, PracticalCentral):  # whose greedy joint action is a constraint as well
        weights = weight_tables(q, weighting, alpha=0.1, central_ties="all")
        pull = np.where(q > table, weights.under.reshape(q.shape), weights.over.reshape(q.shape)) * (q - table)
        np.testing.assert_allclose(pull.sum(0), 0, atol=1e-9)
        np.testing.assert_allclose(pull.sum(1), 0, atol=1e-9)
    assert projection.decentralised_greedy in projection.argmax_set


def test_vdn_on_table_2() -> None:
    """Row and column means less the mean: -40/9 in all, rows -16/3, -4, -4."""
    projection = project(TABLE_2, function_class="additive")
    np.testing.assert_allclose(projection.q_tot[:2, :2], [[-56 / 9, -44 / 9], [-44 / 9, -32 / 9]], rtol=1e-9)
    assert projection.decentralised_greedy == (1, 1)


@pytest.mark.parametrize("function_class", ["additive", "monotonic"])
def test_qtran_leaves_a_continuum(function_class: Any) -> None:
    projection = project(TABLE_2, weighting=QTRAN(1.0, 0.1), function_class=function_class)
    assert projection.loss == pytest.approx(0, abs=1e-20)
    assert not projection.unique
    assert len(projection.minimisers) == 1
    assert projection.q_tot[0, 0] == pytest.approx(8)
    assert (projection.q_tot >= TABLE_2 - 1e-6).all()
    assert projection.argmax_set == {(0, 0)}


def test_qtran_may_have_one_solution() -> None:
    """Additive tables on table 1: no other action may add to a greedy 1, and the other 1 must not be underestimated."""
    projection = project(TABLE_1, weighting=QTRAN(), function_class="additive")
    np.testing.assert_allclose(projection.q_tot, np.ones((2, 2)), atol=1e-9)
    assert projection.unique


def test_epsilon_greedy_weights_are_the_behaviour_policy() -> None:
    weights = EpsilonGreedy(0.4, (1, 0))(np.zeros((2, 4)))
    np.testing.assert_allclose(weights, np.outer([0.2, 0.8], [0.7, 0.1, 0.1, 0.1]))
    np.testing.assert_allclose(EpsilonGreedy(1.0, (1, 0))(np.zeros((2, 4))), 1 / 8)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)])
def test_agents_may_have_different_numbers_of_actions(shape: tuple[int, ...]) -> None:
    q = np.random.default_rng(1).normal(size=shape)
    loss, tables = least_loss(q, np.ones(shape), np.ones(shape))
    projection = project(q)
    assert projection.loss == pytest.approx(loss, rel=1e-9)
    np.testing.assert_allclose(projection.q_tot, tables[0], atol=1e-6)


def test_what_is_monotonic_is_its_own_projection() -> None:
    q = np.add.outer([3.0, 1, 2], [0.0, 5, 1])
    for weighting in ("uniform", "central", "optimistic"):
        projection = project(q, weighting=weighting, alpha=0.1)
        assert projection.loss == pytest.approx(0, abs=1e-20)
        np.testing.assert_allclose(projection.q_tot, q, rtol=1e-12)
        assert projection.unique
        assert projection.decentralised_greedy == (0, 1)


def test_three_actions_take_less_than_a_second_and_five_less_than_a_minute() -> None:
    rng = np.random.default_rng(0)
    for size, limit in ((3, 1), (5, 60)):
        for weighting in ("uniform", "central", "optimistic"):
            started = time.perf_counter()
            project(rng.normal(size=(size, size)), weighting=weighting, alpha=0.1)
            assert time.perf_counter() - started < limit


def test_a_large_game_is_searched_and_said_to_be_unproven() -> None:
    q = np.random.default_rng(0).normal(size=(7, 7))
    with pytest.warns(NoProofWarning, match=r"\(7, 7\) actions have too many orderings.* is no proof"):
        projection = project(q)
    assert not projection.proven
    assert is_monotonic(projection.q_tot)


def test_the_search_finds_small_optima() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        q = rng.normal(size=(4, 4))
        tables = weight_tables(q, "optimistic", alpha=0.1, central_ties="all")
        exact, searched = (
            min(each.loss for each in find(q, tables, None)) for find in (best_monotonic, search_monotonic)
        )
        assert searched == pytest.approx(exact, rel=1e-9)


def test_upper_sets_are_counted_right() -> None:
    """Plane partitions in a box: 20, 980; the Dedekind numbers 20 and 168."""
    for shape, count in (((3, 3), 20), ((2, 2, 2), 20), ((3, 3, 3), 980), ((2, 2, 2, 2), 168)):
        found = upper_sets(shape)
        assert found is not None
        assert len(found) == count
    assert upper_sets((2,) * 6) is None
    assert upper_sets((4, 4, 4)) is None


def test_a_linear_programme_finds_the_same_upper_sets() -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(20, 12))
    looked_up = enumerated((3, 4))
    assert looked_up is not None
    weights = np.ones_like(q), np.full_like(q, 0.1)
    np.testing.assert_allclose(fit(q, *weights, by_linear_programme((3, 4))), fit(q, *weights, looked_up), atol=1e-12)


@pytest.mark.parametrize(
    ("q", "how", "message"),
    [
        ("table3", {}, "a preset is one of table1, table2"),
        ([[1, 2], [3]], {}, "lists on the same level must be equally long"),
        ([[1, float("nan")]], {}, "each payoff must be finite"),
        (TABLE_1, {"weighting": "centre"}, "weighting='centre' is not allowed: one of uniform, central, optimistic"),
        (TABLE_1, {"weighting": "central"}, "alpha=None is not allowed: a number above 0 and at most 1"),
        (TABLE_1, {"weighting": "optimistic", "alpha": 0}, "alpha=0 is not allowed"),
        (TABLE_1, {"weighting": "optimistic", "alpha": 1.1}, "alpha=1.1 is not allowed"),
        (TABLE_1, {"weighting": "central", "alpha": 0.1, "central_ties": "two"}, "central_ties='two' is not allowed"),
        (TABLE_1, {"weighting": lambda q: 0 * q}, "weighting is not allowed: it must return finite weights above 0"),
        (TABLE_1, {"weighting": lambda q: q[0] + 1}, r"of shape \(2, 2\)"),
        (TABLE_1, {"function_class": "linear"}, "function_class='linear' is not allowed: monotonic or additive"),
        (TABLE_1, {"greedy": (0, 2)}, r"greedy=\(0, 2\) is not allowed"),
    ],
)
def test_what_is_not_allowed_is_said(q: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project(q, **how)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PracticalCentral(0.0), "alpha=0.0 is not allowed"),
        (lambda: QTRAN(lambda_nopt=0.0), "lambda_nopt=0.0 is not allowed"),
        (lambda: EpsilonGreedy(0.0, (0, 0)), "epsilon=0.0 is not allowed"),
    ],
)
def test_weightings_refuse_what_is_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
