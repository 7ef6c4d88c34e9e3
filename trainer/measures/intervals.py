"""Intervals around means over tasks, and around differences of policies: a paired bootstrap, seeded. Pure.

Shape suffixes: P policies, T tasks, R resamples.

A resample draws T of the T tasks with replacement, the same ones for every policy, and takes each policy's mean
(Efron 1979; paired, for language processing: Koehn 2004). Because both policies are measured on the same draws, what
makes a task hard or easy for both cancels in the difference. An interval runs between two quantiles of these means, or
of their differences, which are moved for bias and skew (BCa, Efron 1987): instead of the quantile at α that at

    Φ(z₀ + (z₀ + z_α) / (1 - a (z₀ + z_α)))    z₀ = Φ⁻¹(share of resampled means below the mean, ties by half)
                                               a  = Σ (x - x̄)³ / (6 (Σ (x - x̄)²)^1.5), the jackknife's for a mean

Covered: which tasks were asked, and, through the tasks' own means, the chance in the rollouts of each task. *Not
covered:* the seed of the training, which only further runs show; multiple comparisons: of twenty intervals of 95 % one
misses by chance. With fewer than about ten tasks no bootstrap knows much.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 2**21
"""Indices drawn at once: bounds the memory, whatever the number of tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over tasks with the interval around it."""

    mean: float
    low: float
    high: float
    num_tasks: int

    @property
    def is_known(self) -> bool:
        """Whether the tasks differ. Where all have one value every resample has it too: an interval without width would
        claim a certainty that no bootstrap gives, however few tasks there are."""
        return self.high > self.low

    @property
    def is_clear(self) -> bool:
        """Zero lies outside of it."""
        return self.is_known and (self.low > 0 or self.high < 0)


def resampled_means(values_PT: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Floats:
    """(P, R) means over the tasks of each resample; every policy's row r is over the same tasks."""
    num_policies, num_tasks = values_PT.shape
    assert num_tasks >= 1 and np.isfinite(values_PT).all()
    generator = np.random.default_rng(seed)
    means_PR = np.empty((num_policies, num_resamples))
    chunk = max(1, _CHUNK // num_tasks)
    for start in range(0, num_resamples, chunk):
        tasks_RT = generator.integers(num_tasks, size=(min(chunk, num_resamples - start), num_tasks))
        for p in range(num_policies):
            means_PR[p, start : start + len(tasks_RT)] = values_PT[p][tasks_RT].mean(axis=1)
    return means_PR


def intervals(
    values_PT: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[list[Interval], list[Interval]]:
    """Each policy's mean; and each later policy's mean minus the first one's, task by task."""
    means_PR = resampled_means(values_PT, seed=seed, num_resamples=num_resamples)
    means = [_interval(values_T, means_R) for values_T, means_R in zip(values_PT, means_PR, strict=True)]
    differences = [
        _interval(values_T - values_PT[0], means_R - means_PR[0])
        for values_T, means_R in zip(values_PT[1:], means_PR[1:], strict=True)
    ]
    return means, differences


def _interval(values_T: Floats, means_R: Floats) -> Interval:
    mean = float(values_T.mean())
    if np.ptp(values_T) <= 1e-12 * max(1.0, abs(mean)):
        # Every resample has this mean: there is no quantile to move, and no interval.
        return Interval(mean=mean, low=mean, high=mean, num_tasks=len(values_T))
    low, high = np.quantile(means_R, _moved_levels(values_T, means_R))
    return Interval(mean=mean, low=float(low), high=float(high), num_tasks=len(values_T))


def _moved_levels(values_T: Floats, means_R: Floats) -> list[float]:
    """The two quantiles of the resampled means between which the interval runs."""
    mean, normal = values_T.mean(), NormalDist()
    # Sums in another order differ in the last place.
    near = 1e-9 * np.ptp(values_T)
    share_below = (np.mean(means_R < mean - near) + np.mean(means_R <= mean + near)) / 2
    # A few hundred resamples may all lie on one side.
    least = 0.5 / len(means_R)
    z0 = normal.inv_cdf(float(np.clip(share_below, least, 1 - least)))
    off_T = values_T - mean
    skew = float((off_T**3).sum() / (6 * (off_T**2).sum() ** 1.5))
    ends = [z0 + normal.inv_cdf(level) for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    return [normal.cdf(z0 + end / (1 - skew * end)) for end in ends]
