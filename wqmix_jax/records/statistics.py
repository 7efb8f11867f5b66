"""Statistics over seeds: medians and quartiles as in the paper, interquartile means with bootstrap intervals.

The interquartile mean (IQM) is the mean of the middle half of the seeds: a quarter, rounded down, is left out at either
end, so of fewer than `FEWEST_TRIMMED` seeds it is the plain mean. Intervals hold 95% of `RESAMPLES` bootstrap samples
over seeds, those of two groups drawn apart (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice"). A single seed has no interval: its ends are nan. Equal seeds have an interval without width,
which says nothing of other seeds. `mean_estimate` is for episodes, and for few seeds whose episodes are known.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from wqmix_jax.training.members import labels_of, member_name

FEWEST_TRIMMED = 4
"""Of fewer seeds none is left out."""

RESAMPLES = 2000
PERMUTATIONS = 20000
CONFIDENCE = 0.95


class SeedCurves(NamedTuple):
    """One figure of every seed over training.

    Attributes:
        env_steps: ``[P]``, where all of them stand.
        values: ``[P, S]``.
    """

    env_steps: np.ndarray
    values: np.ndarray


class Estimate(NamedTuple):
    """A statistic over seeds, and what lies around it; scalars, or ``[P]`` each.

    Attributes:
        value: the statistic.
        low: the lower end of the interval, or the lower quartile.
        high: the upper end, or the upper quartile.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class MeanEstimate(NamedTuple):
    """A mean over episodes, or over the episodes of several seeds.

    Attributes:
        mean: the mean; with several seeds, of the seeds' means.
        low: the lower end of the interval that contains the true mean with probability `CONFIDENCE`; nan for a single
            episode.
        high: the upper end.
        std: the standard deviation of the episodes; with several seeds, of the seeds' means.
    """

    mean: float
    low: float
    high: float
    std: float


def mean_estimate(
    samples: Sequence[np.ndarray], *, bounds: tuple[float, float] = (-math.inf, math.inf), is_share: bool = False
) -> MeanEstimate:
    """The mean over seeds of the means over their episodes, with an interval that takes both into account.

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
    """
    means, counts = np.array([values.mean() for values in samples]), np.array([len(values) for values in samples])
    mean, num_seeds, num_episodes = float(means.mean()), len(samples), int(counts.sum())
    std = float(means.std()) if num_seeds > 1 else float(samples[0].std())
    if num_episodes < 2:
        return MeanEstimate(mean, math.nan, math.nan, std)
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
    return MeanEstimate(mean, low, high, std)


def _student_quantile(*terms: tuple[float, float]) -> float:
    """The two-sided `CONFIDENCE` quantile for a sum of variances, given with their degrees of freedom."""
    total = sum(variance for variance, _ in terms)
    inverse = sum((variance / total) ** 2 / freedom for variance, freedom in terms if variance > 0)
    return float(
        stats.t.ppf((1 + CONFIDENCE) / 2, 1 / inverse) if inverse > 0 else stats.norm.ppf((1 + CONFIDENCE) / 2)
    )


def _wilson(share: float, variance: float, quantile: float, least: int, most: int) -> tuple[float, float]:
    """Wilson's interval of a share whose estimate has ``variance``, with ``least`` to ``most`` effective trials."""
    normal = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    trials = share * (1 - share) / variance * (normal / quantile) ** 2 if variance > 0 else most
    trials = min(max(trials, least), most)
    scale = 1 + normal**2 / trials
    centre = (share + normal**2 / (2 * trials)) / scale
    half = normal / scale * math.sqrt(share * (1 - share) / trials + (normal / (2 * trials)) ** 2)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def horizon(records: Sequence[Mapping[str, Any]]) -> int:
    """Environment steps of the last evaluation that every seed of eval records has reached."""
    return int(min(steps[-1] for steps, _ in _series(records, "env_steps")))


def seed_curves(
    records: Sequence[Mapping[str, Any]], name: str, env_steps: Sequence[float] | np.ndarray | None = None
) -> SeedCurves:
    """The figure ``name`` of every seed (and swept value) of eval records, linear between its own evaluations.

    Args:
        records: as `wqmix_jax.load_metrics` gives them, at least one evaluation of each seed.
        name: ``episode_return``, say.
        env_steps: where they are wanted, ascending; every seed's evaluations up to the `horizon` when absent.

    Raises:
        ValueError: if some seed has not come as far as ``env_steps``: no curve is continued.
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
    """The area under each seed's curve, divided by its length: ``[S]``, in the figure's own unit."""
    length = curves.env_steps[-1] - curves.env_steps[0]
    if length == 0:
        return curves.values[-1]
    return np.trapezoid(curves.values, curves.env_steps, axis=0) / length


def quartiles(values: np.ndarray) -> Estimate:
    """Median, lower and upper quartile over the last axis, the seeds."""
    low, median, high = np.percentile(values, (25, 50, 75), axis=-1)
    return Estimate(median, low, high)


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The interquartile mean along an axis; of fewer than `FEWEST_TRIMMED` the mean."""
    return stats.trim_mean(values, 0.25, axis=axis)


def iqm_name(num_seeds: int) -> str:
    """What `iqm` is called where the run with fewest seeds has ``num_seeds``."""
    return "IQM" if num_seeds >= FEWEST_TRIMMED else f"IQM (of fewer than {FEWEST_TRIMMED} seeds the mean)"


def iqm_estimate(values: np.ndarray) -> Estimate:
    """The interquartile mean over the last axis, the seeds, with its interval."""
    return _with_interval(iqm, values)


def iqm_difference(values: np.ndarray, baseline: np.ndarray) -> Estimate:
    """By how much the interquartile mean of ``values`` (``[S]``) exceeds that of ``baseline`` (``[S']``)."""
    return _with_interval(lambda one, other, axis=-1: iqm(one, axis) - iqm(other, axis), values, baseline)


def probability_of_improvement(values: np.ndarray, baseline: np.ndarray) -> Estimate:
    """How likely a seed of ``values`` (``[S]``) exceeds one of ``baseline`` (``[S']``); equal ones count half.

    It is the Mann-Whitney U statistic divided by the number of pairs.
    """
    return _with_interval(_wins, values, baseline)


def mann_whitney_p(values: np.ndarray, baseline: np.ndarray) -> float:
    """The two-sided p-value of the Mann-Whitney U test, over permutations: seeds that end alike are common.

    All permutations of up to eight seeds against eight, a sample of `PERMUTATIONS` of more; nan for a single seed.
    """
    if min(len(values), len(baseline)) < 2:
        return math.nan
    method: Any = stats.PermutationMethod(n_resamples=PERMUTATIONS, rng=np.random.default_rng(0))
    return float(stats.mannwhitneyu(values, baseline, method=method).pvalue)


def _wins(values: np.ndarray, baseline: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share of pairs ``(S, S')`` in which the first is higher; the seeds lie on the last axis of both."""
    del axis  # scipy always asks for the last
    differences = values[..., :, None] - baseline[..., None, :]
    return (np.sign(differences).mean(axis=(-2, -1)) + 1) / 2


def _with_interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Estimate:
    """The statistic of the samples, seeds on their last axes, with its bootstrap interval."""
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
    """Environment steps and figures of each member, in the order of their first records."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        points.setdefault(member_name(labels_of(record)), []).append((record["env_steps"], record[name]))
    columns = (np.asarray(of_one, np.float64).T for of_one in points.values())
    return [(steps, values) for steps, values in columns]
