"""Statistics over seeds: medians and quartiles as in the paper, interquartile means with bootstrap intervals.

The interquartile mean (IQM) is the mean of the middle half of the seeds: a quarter, rounded down, is left out at either
end, so of fewer than `FEWEST_TRIMMED` seeds it is the plain mean. Intervals hold 95% of `RESAMPLES` bootstrap samples
over seeds, those of two groups drawn apart (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice"). A single seed has no interval: its ends are nan.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from wqmix_jax.members import labels_of, member_name

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
