"""Paired bootstrap intervals over tasks. Pure.

Shape suffixes: P policies, T tasks, R resamples.

Efron 1979; for the paired form in language processing: Koehn 2004. A resample draws T of the T tasks with replacement,
the same ones for every policy, and takes each policy's mean; an interval runs between the percentiles of these means,
or of their differences. Because both policies are measured on the same draws, what makes a task hard or easy for both
cancels in the difference.

Covered: which tasks were asked, and, through the tasks' own means, the chance in the rollouts of each task. *Not
covered:* the seed of the training, which only further runs show; multiple comparisons: of twenty intervals of 95 % one
misses by chance. With fewer than about twenty tasks percentile intervals are somewhat too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def intervals(values_PT: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> list[Interval]:
    """Each policy's mean."""
    means_PR = resampled_means(values_PT, seed=seed, num_resamples=num_resamples)
    return [_interval(values_T, means_R) for values_T, means_R in zip(values_PT, means_PR, strict=True)]


def paired_differences(values_PT: Floats, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> list[Interval]:
    """Each later policy's mean minus the first one's, task by task."""
    means_PR = resampled_means(values_PT, seed=seed, num_resamples=num_resamples)
    return [
        _interval(values_T - values_PT[0], means_R - means_PR[0])
        for values_T, means_R in zip(values_PT[1:], means_PR[1:], strict=True)
    ]


def _interval(values_T: Floats, means_R: Floats) -> Interval:
    low, high = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean=float(values_T.mean()), low=float(low), high=float(high), num_tasks=len(values_T))
