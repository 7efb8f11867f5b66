"""Statistics over seeds: medians and quartiles as in the paper, interquartile means with bootstrap intervals.

The interquartile mean (IQM) is the mean of the middle half of the seeds: a quarter, rounded down, is left out at either
end, so with fewer than `FEWEST_TRIMMED` seeds it is the plain mean. Intervals contain the share `CONFIDENCE` of
`RESAMPLES` bootstrap samples over seeds; two groups are resampled independently (Agarwal et al. 2021, "Deep
Reinforcement Learning at the Edge of the Statistical Precipice"). A single seed has no interval: its ends are nan.
Equal seeds have an interval without width, which says nothing about other seeds. `mean_estimate` is for episodes, and
for few seeds whose episodes are known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from wqmix_jax.training.members import labels_of, member_name

FEWEST_TRIMMED = 4
"""With fewer seeds, none is left out."""

RESAMPLES = 2000
PERMUTATIONS = 20000
CONFIDENCE = 0.95
"""The confidence level of every interval that this project prints or draws."""


class SeedCurves(NamedTuple):
    """One metric of every seed over training.

    Attributes:
        env_steps: ``[P]``, environment steps common to all seeds.
        values: ``[P, S]``, the metric of each seed there.
    """

    env_steps: np.ndarray
    values: np.ndarray


class Estimate(NamedTuple):
    """A statistic with its interval; scalars, or ``[P]`` each.

    Attributes:
        value: the statistic.
        low: the lower end of the interval (confidence `CONFIDENCE`), or the lower quartile; nan where there is none.
        high: the upper end, or the upper quartile.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def standard_deviation(samples: Sequence[np.ndarray]) -> float:
    """Returns the deviation of the episodes of one seed, or that of the means of several seeds; ``samples`` ``[E]``."""
    return float(samples[0].std() if len(samples) == 1 else np.std([values.mean() for values in samples]))


def mean_estimate(
    samples: Sequence[np.ndarray], *, bounds: tuple[float, float] = (-math.inf, math.inf), is_share: bool = False
) -> Estimate:
    """Estimates the mean over seeds of the means over their episodes, with an interval that takes both into account.

    The variance of the mean is the larger of two estimates: ``between``, from how much the seeds' means differ, and
    ``within``, from how much the episodes of a seed do, which is all there is for a single seed. (With equal numbers of
    episodes the ratio of the two is Kish's design effect.) The degrees of freedom are Satterthwaite's (1946) for the
    two. The interval is Student's, cut to ``bounds``. Where every value is 0 or 1 and ``is_share`` says that this is a
    share, it is Wilson's (1927) for the effective number of episodes, ``p (1 - p) / variance``, corrected by the
    squared ratio of the normal and Student's quantile, but at least the number of seeds and at most that of episodes
    (Dean and Pagano 2015, "Evaluating Confidence Interval Methods for Binomial Proportions in Clustered Surveys").
    If all episodes of all seeds are equal, nothing shows a difference between seeds, and episodes count as independent.

    In simulations, the 95% interval contains the true mean in 95% or more of the cases if seeds are alike, in about 90%
    if they differ and there are three to eight, and in 70% to 90% if there are only two.

    Args:
        samples: one array ``[E]`` of at least one episode for each seed.
        bounds: the least and the largest possible value.
        is_share: whether a value of 0 or 1 is a loss or a win.

    Returns:
        The mean and its interval, scalars; the interval of a single episode is nan.
    """
    means, counts = np.array([values.mean() for values in samples]), np.array([len(values) for values in samples])
    mean, num_seeds, num_episodes = float(means.mean()), len(samples), int(counts.sum())
    if num_episodes < 2:
        return _scalars(mean, math.nan, math.nan)
    wins = is_share and all(np.isin(values, (0, 1)).all() for values in samples)
    if wins:
        within, freedom_within = mean * (1 - mean) / num_episodes, math.inf  # known as soon as the mean is
    else:
        within = sum(values.var(ddof=1) / len(values) for values in samples if len(values) > 1) / num_seeds**2
        freedom_within = num_episodes - num_seeds
    between = means.var(ddof=1) / num_seeds if num_seeds > 1 else 0.0
    variance = float(max(between, within))
    quantile = _student_quantile((between, num_seeds - 1), (within, freedom_within))
    if wins:
        low, high = _wilson(mean, variance, quantile, num_seeds, num_episodes)
    else:
        half = quantile * math.sqrt(variance)
        low, high = max(bounds[0], mean - half), min(bounds[1], mean + half)
    return _scalars(mean, low, high)


def _scalars(value: float, low: float, high: float) -> Estimate:
    return Estimate(np.asarray(value), np.asarray(low), np.asarray(high))


def _student_quantile(*terms: tuple[float, float]) -> float:
    """Returns the two-sided `CONFIDENCE` quantile for a sum of variances, given with their degrees of freedom."""
    total = sum(variance for variance, _ in terms)
    inverse = sum((variance / total) ** 2 / freedom for variance, freedom in terms if variance > 0)
    return float(
        stats.t.ppf((1 + CONFIDENCE) / 2, 1 / inverse) if inverse > 0 else stats.norm.ppf((1 + CONFIDENCE) / 2)
    )


def _wilson(share: float, variance: float, quantile: float, least: int, most: int) -> tuple[float, float]:
    """Returns Wilson's interval of a share: its estimate has ``variance``, and ``least`` to ``most`` trials count."""
    normal = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    trials = share * (1 - share) / variance * (normal / quantile) ** 2 if variance > 0 else most
    trials = min(max(trials, least), most)
    scale = 1 + normal**2 / trials
    centre = (share + normal**2 / (2 * trials)) / scale
    half = normal / scale * math.sqrt(share * (1 - share) / trials + (normal / (2 * trials)) ** 2)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def horizon(records: Sequence[Mapping[str, Any]]) -> int:
    """Returns the environment steps of the last evaluation that every seed of eval records has reached."""
    return int(min(steps[-1] for steps, _ in _series(records, "env_steps")))


def seed_curves(
    records: Sequence[Mapping[str, Any]], name: str, env_steps: Sequence[float] | np.ndarray | None = None
) -> SeedCurves:
    """Interpolates a metric of every seed (and swept value) linearly between the seed's own evaluations.

    Args:
        records: eval records as `wqmix_jax.load_metrics` returns them, at least one of each seed.
        name: the metric, such as ``episode_return``.
        env_steps: where the curves are evaluated, ascending; at all seeds' evaluations up to the `horizon` by default.

    Raises:
        ValueError: if some seed has not reached ``env_steps``: no curve is extrapolated.
    """
    series = _series(records, name)
    last = horizon(records)
    if env_steps is None:
        grid = np.unique(np.concatenate([steps[steps <= last] for steps, _ in series]))
    else:
        grid = np.asarray(env_steps, np.float64)
    if grid[-1] > last:
        raise ValueError(f"env_steps={grid[-1]:g} is not allowed: all seeds have come as far as {last}")
    return SeedCurves(grid, np.stack([np.interp(grid, steps, values) for steps, values in series], axis=-1))


def mean_over_training(curves: SeedCurves) -> np.ndarray:
    """Returns the area under each seed's curve divided by its length, ``[S]`` in the unit of the metric."""
    length = curves.env_steps[-1] - curves.env_steps[0]
    if length == 0:
        return curves.values[-1]
    return np.trapezoid(curves.values, curves.env_steps, axis=0) / length


def quartiles(values: np.ndarray) -> Estimate:
    """Returns median, lower and upper quartile over the last axis, the seeds: ``[.., S]`` -> ``[..]`` each."""
    low, median, high = np.percentile(values, (25, 50, 75), axis=-1)
    return Estimate(median, low, high)


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the interquartile mean along an axis; with fewer than `FEWEST_TRIMMED` values the mean."""
    return stats.trim_mean(values, 0.25, axis=axis)


def iqm_name(num_seeds: int) -> str:
    """Returns the name of `iqm` for runs of which the smallest has ``num_seeds``."""
    return "IQM" if num_seeds >= FEWEST_TRIMMED else f"IQM (of fewer than {FEWEST_TRIMMED} seeds the mean)"


def iqm_estimate(values: np.ndarray) -> Estimate:
    """Returns the interquartile mean over the last axis, the seeds, with its interval."""
    return _with_interval(iqm, values)


def iqm_difference(values: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Returns the interquartile mean of ``values`` (``[S]``) minus that of ``baseline`` (``[S']``)."""
    return _with_interval(lambda one, other, axis=-1: iqm(one, axis) - iqm(other, axis), values, baseline)


def probability_of_improvement(values: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Estimates how likely a seed of ``values`` (``[S]``) exceeds one of ``baseline`` (``[S']``); ties count half.

    It is the Mann-Whitney U statistic divided by the number of pairs.
    """
    return _with_interval(_wins, values, baseline)


def mann_whitney_p(values: np.ndarray, baseline: np.ndarray) -> float:
    """Returns the two-sided p-value of the Mann-Whitney U test; nan for a single seed.

    It is computed over permutations, because seeds with equal results are common: over all permutations of up to eight
    seeds against eight, over a sample of `PERMUTATIONS` for more.
    """
    if min(len(values), len(baseline)) < 2:
        return math.nan
    method: Any = stats.PermutationMethod(n_resamples=PERMUTATIONS, rng=np.random.default_rng(0))
    return float(stats.mannwhitneyu(values, baseline, method=method).pvalue)


def _wins(values: np.ndarray, baseline: np.ndarray, axis: int = -1) -> np.ndarray:
    """Returns the share of pairs ``(S, S')`` in which the first is higher; the last axis of both holds the seeds."""
    del axis  # scipy always asks for the last
    differences = values[..., :, None] - baseline[..., None, :]
    return (np.sign(differences).mean(axis=(-2, -1)) + 1) / 2


def _with_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Estimate:
    """Returns the statistic of the samples, seeds on their last axes, with its bootstrap interval."""
    value = np.asarray(statistic(*samples))
    if min(sample.shape[-1] for sample in samples) < 2:
        return Estimate(value, np.full(value.shape, np.nan), np.full(value.shape, np.nan))
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        axis=-1,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, np.asarray(found.low), np.asarray(found.high))


def _series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns environment steps and values of each member, in the order of their first records."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        points.setdefault(member_name(labels_of(record)), []).append((record["env_steps"], record[name]))
    columns = (np.asarray(pairs, np.float64).T for pairs in points.values())
    return [(steps, values) for steps, values in columns]
