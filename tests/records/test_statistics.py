"""Statistics over seeds against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from tests.recorded import evaluated
from wqmix_jax.records import statistics
from wqmix_jax.records.statistics import (
    horizon,
    iqm,
    iqm_difference,
    iqm_estimate,
    mann_whitney_p,
    mean_estimate,
    mean_over_training,
    probability_of_improvement,
    quartiles,
    seed_curves,
    standard_deviation,
)

EIGHT = np.array([100.0, 3.0, 1.0, 4.0, -50.0, 2.0, 5.0, 0.0])


def two_seeds() -> list[dict[str, Any]]:
    """One seed that reaches 20 steps and one that reaches 16, evaluated at different steps."""
    return evaluated(0, {0: 0.0, 10: 10.0, 20: 0.0}) + evaluated(1, {0: 2.0, 8: 2.0, 16: 10.0})


def test_seeds_are_interpolated_as_far_as_all_of_them_come() -> None:
    assert horizon(two_seeds()) == 16
    curves = seed_curves(two_seeds(), "episode_return")
    assert curves.env_steps.tolist() == [0, 8, 10, 16]
    np.testing.assert_allclose(curves.values.T, [[0, 8, 10, 4], [2, 2, 4, 10]])
    np.testing.assert_allclose(seed_curves(two_seeds(), "episode_return", [4, 12]).values.T, [[4, 8], [2, 6]])
    with pytest.raises(ValueError, match="env_steps=17 is not allowed: all seeds have come as far as 16"):
        seed_curves(two_seeds(), "episode_return", [0, 17])


def test_swept_values_of_a_seed_are_curves_of_their_own() -> None:
    records = evaluated(0, {0: 0.0, 8: 4.0}, **{"algo.lr": 0.1}) + evaluated(0, {0: 1.0, 8: 3.0}, **{"algo.lr": 0.2})
    np.testing.assert_allclose(seed_curves(records, "episode_return", [4]).values, [[2, 2]])
    assert seed_curves(records, "episode_return").values.tolist() == [[0, 1], [4, 3]]


def test_the_mean_over_training_is_the_area_by_the_length() -> None:
    """Over 0..16: (0..10: 50, 10..16: 42) and (0..8: 16, 8..16: 48)."""
    curves = seed_curves(two_seeds(), "episode_return")
    np.testing.assert_allclose(mean_over_training(curves), [92 / 16, 64 / 16])
    at_a_point = seed_curves(two_seeds(), "episode_return", [8])
    np.testing.assert_allclose(mean_over_training(at_a_point), [8, 2])


def test_quartiles_are_over_the_last_axis() -> None:
    middle, low, high = quartiles(np.array([[4.0, 0.0, 1.0, 3.0, 2.0], [50.0, 10.0, 20.0, 30.0, 40.0]]))
    assert (middle.tolist(), low.tolist(), high.tolist()) == ([2, 30], [1, 20], [3, 40])


def test_the_iqm_leaves_out_a_quarter_at_either_end() -> None:
    assert iqm(EIGHT) == (1 + 2 + 3 + 4) / 4
    assert iqm(np.array([0.0, 1.0, 5.0, 90.0])) == 3
    assert iqm(np.array([0.0, 1.0, 5.0])) == 2  # nothing to leave out
    assert iqm(np.stack([EIGHT, EIGHT + 1], axis=0)).tolist() == [2.5, 3.5]


def test_intervals_hold_what_resampled_seeds_give() -> None:
    value, low, high = iqm_estimate(np.array([0.0, 1.0]))
    assert (value, low, high) == (0.5, 0, 1)  # both seeds twice: a quarter of the samples each
    value, low, high = iqm_estimate(np.array([[7.0, 7.0, 7.0], [0.0, 3.0, 6.0]]))
    assert (value[0], low[0], high[0]) == (7, 7, 7)
    assert low[1] in (0, 1)
    assert high[1] in (5, 6)
    again = iqm_estimate(EIGHT)
    assert again == iqm_estimate(EIGHT)
    assert again.low < again.value < again.high


def test_a_wider_confidence_gives_a_wider_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = [], []
    for confidence, found in ((0.5, narrow), (0.95, wide)):
        monkeypatch.setattr(statistics, "CONFIDENCE", confidence)
        found += iqm_estimate(EIGHT)
    assert wide[1] < narrow[1] < narrow[2] < wide[2]


def test_one_seed_has_no_interval() -> None:
    value, low, high = iqm_estimate(np.array([3.0]))
    assert value == 3
    assert np.isnan([low, high]).all()
    assert np.isnan(iqm_difference(np.array([3.0]), np.array([1.0, 2.0])).low)


def test_a_difference_is_of_groups_that_are_drawn_apart() -> None:
    value, low, high = iqm_difference(np.array([10.0, 11.0]), np.array([0.0, 5.0]))
    assert value == 10.5 - 2.5
    assert (low, high) == (10 - 5, 11 - 0)


def test_the_probability_of_improvement_counts_pairs() -> None:
    better, worse = np.array([1.0, 3.0, 3.0]), np.array([0.0, 3.0])
    assert probability_of_improvement(better, worse).value == (3 + 2 * 0.5) / 6  # three beat 0, two are equal to 3
    assert probability_of_improvement(worse, better).value == pytest.approx(2 / 6)
    assert probability_of_improvement(worse + 9, better) == (1, 1, 1)


def test_the_p_value_is_that_of_all_orders() -> None:
    """Three of six are the highest three in 1 of 20 orders, on either side; of equal ones, too."""
    assert mann_whitney_p(np.array([4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.1)
    assert mann_whitney_p(np.array([4.0, 4.0, 4.0]), np.array([1.0, 1.0, 1.0])) == pytest.approx(0.1)
    assert np.isnan(mann_whitney_p(np.array([4.0]), np.array([1.0, 2.0])))
    assert mann_whitney_p(np.zeros(2), np.zeros(2)) == 1


def test_the_interval_of_one_seed_is_students_or_wilsons() -> None:
    mean, low, high = mean_estimate([np.array([6.0, 8.0])])
    half = 12.7062  # Student's for one degree of freedom; the standard error is 1
    assert mean == 7
    np.testing.assert_allclose([low, high], [7 - half, 7 + half], rtol=1e-4)
    assert mean_estimate([np.array([6.0, 8.0])], bounds=(1, 10))[1:3] == (1, 10)
    half_won = mean_estimate([np.array([1.0, 0.0])], is_share=True)
    np.testing.assert_allclose(half_won[:3], [0.5, 0.0945, 0.9055], atol=1e-4)
    assert np.isnan(mean_estimate([np.array([3.0])])[1:3]).all()


def test_the_deviation_is_over_the_episodes_of_one_seed_or_the_means_of_several() -> None:
    assert standard_deviation([np.array([6.0, 8.0])]) == 1
    assert standard_deviation([np.array([6.0, 8.0]), np.array([11.0])]) == 2


def test_battles_that_are_all_won_are_no_less_sure_than_with_one_loss() -> None:
    """Three seeds of a hundred battles: Wilson's interval of 300 battles, and nearly the same with one loss."""
    won = [np.ones(100)] * 3
    np.testing.assert_allclose(mean_estimate(won, is_share=True)[:3], [1, 0.98736, 1], atol=1e-5)
    one_lost = mean_estimate([*won[1:], np.array([0.0] + [1.0] * 99)], is_share=True)
    assert one_lost.value == pytest.approx(299 / 300)
    assert 0.96 < one_lost.low < 0.98736
    assert one_lost.high < 1


def test_seeds_that_win_all_or_none_count_once_each() -> None:
    """Wilson's interval of two successes in three."""
    found = mean_estimate([np.ones(50), np.ones(50), np.zeros(50)], is_share=True)
    np.testing.assert_allclose(found[:3], [2 / 3, 0.2077, 0.9385], atol=1e-4)


def test_no_interval_leaves_what_is_possible() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = [rng.integers(1, 201, 4).astype(float) for _ in range(2)]
        mean, low, high = mean_estimate(lengths, bounds=(1, 200))
        assert 1 <= low <= mean <= high <= 200
        wins = [rng.binomial(1, rng.random(), 5).astype(float) for _ in range(2)]
        mean, low, high = mean_estimate(wins, is_share=True)
        assert 0 <= low <= mean <= high <= 1
        shares = [rng.random(3) for _ in range(2)]  # a win rate that isn't won or lost
        mean, low, high = mean_estimate(shares, bounds=(0, 1), is_share=True)
        assert 0 <= low <= mean <= high <= 1


@pytest.mark.parametrize(("num_seeds", "num_episodes"), [(1, 30), (2, 50), (3, 100), (8, 30)])
@pytest.mark.parametrize(("rate", "most"), [(0.5, 0.995), (0.9, 0.995), (1.0, 1.0)])
def test_intervals_hold_the_rate_of_like_seeds(num_seeds: int, num_episodes: int, rate: float, most: float) -> None:
    draws = np.random.default_rng(1).binomial(1, rate, size=(1000, num_seeds, num_episodes)).astype(float)
    found = [mean_estimate(list(each), is_share=True) for each in draws]
    assert 0.93 < np.mean([each.low <= rate <= each.high for each in found]) <= most


@pytest.mark.parametrize(("num_seeds", "least"), [(2, 0.8), (3, 0.86), (8, 0.9)])
def test_intervals_hold_the_mean_over_seeds_that_differ(num_seeds: int, least: float) -> None:
    """A seed's win rate is drawn from Beta(2, 2), whose mean is a half, its return around 0 with deviation 0.5."""
    rng = np.random.default_rng(2)
    rates = rng.beta(2, 2, size=(1000, num_seeds, 1))
    wins = (rng.random((1000, num_seeds, 50)) < rates).astype(float)
    found = [mean_estimate(list(each), is_share=True) for each in wins]
    assert least < np.mean([each.low <= 0.5 <= each.high for each in found]) < 0.98
    returns = rng.normal(0, 0.5, size=(1000, num_seeds, 1)) + rng.normal(size=(1000, num_seeds, 30))
    found = [mean_estimate(list(each)) for each in returns]
    assert least < np.mean([each.low <= 0 <= each.high for each in found]) < 0.98


def test_the_interval_of_skewed_returns_holds_their_mean() -> None:
    draws = np.random.default_rng(0).exponential(size=(1000, 30))
    found = [mean_estimate([each]) for each in draws]
    assert 0.9 < np.mean([each.low <= 1 <= each.high for each in found]) < 0.96  # a little less than 0.95
