"""Advantages against the other rollouts of the group, the same for every turn: GRPO, Dr. GRPO, RLOO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graders.types import MOST_REWARD
from trainer.config.advantages import AdvantageSettings
from trainer.learning.advantages.base import STD_EPS, Advantages, Attempt, Groups
from trainer.tasks.difficulty import stats_of


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAdvantages:
    """Advantages of one group, and what they were made of."""

    advantages: tuple[float | None, ...]
    """One per reward, in its order; None where the reward was None."""
    mean: float
    """Of the rewards that are there; nan when none is."""
    std: float
    """With Bessel's correction; 0.0 for fewer than two rewards."""
    tied: bool
    """All rewards are equal but for rounding, or at most one is there: every advantage is 0, and nothing is taught."""


def group_advantages(rewards_G: Sequence[float | None], mode: Literal["grpo", "dr_grpo", "rloo"]) -> GroupAdvantages:
    """Group-relative advantages of the G rollouts of one task.

        grpo      A_i = (r_i - mean(r)) / (std(r) + 1e-4)        DeepSeekMath, Shao et al. 2024, arXiv:2402.03300
        dr_grpo   A_i =  r_i - mean(r)                           Dr. GRPO, Liu et al. 2025, arXiv:2503.20783
        rloo      A_i =  r_i - mean(r_j, j ≠ i)                  RLOO, Ahmadian et al. 2024, arXiv:2402.14740

    std is the sample standard deviation (divisor n - 1), as in trl. A None reward is a masked rollout: it counts
    neither in mean nor in std, and has no advantage. A tied group's advantages are exactly 0, free of the residue that
    subtracting a rounded mean would leave and dividing by a tiny std would blow up. rloo is computed as dr_grpo times
    n / (n - 1), which it equals.
    """
    present = [r for r in rewards_G if r is not None]
    assert all(abs(r) <= MOST_REWARD for r in present), f"rewards must be finite and no larger: {present}"
    stats = stats_of(rewards_G)
    scale = (
        0.0
        if stats.tied
        else {
            "grpo": 1.0 / (stats.std + STD_EPS),
            "dr_grpo": 1.0,
            "rloo": stats.n / max(stats.n - 1, 1),
        }[mode]
    )
    return GroupAdvantages(
        advantages=tuple(None if r is None else (r - stats.mean) * scale for r in rewards_G),
        mean=stats.mean if stats.n else math.nan,
        std=stats.std,
        tied=stats.tied,
    )


def grpo(groups: Groups, config: AdvantageSettings) -> Advantages:
    """See `group_advantages`."""
    return [_of_group(group, "grpo") for group in groups]


def dr_grpo(groups: Groups, config: AdvantageSettings) -> Advantages:
    """See `group_advantages`."""
    return [_of_group(group, "dr_grpo") for group in groups]


def rloo(groups: Groups, config: AdvantageSettings) -> Advantages:
    """See `group_advantages`."""
    return [_of_group(group, "rloo") for group in groups]


def _of_group(group: Sequence[Attempt], mode: Literal["grpo", "dr_grpo", "rloo"]) -> list[tuple[float, ...] | None]:
    advantages = group_advantages([attempt.reward for attempt in group], mode).advantages
    return [None if a is None else attempt.everywhere(a) for attempt, a in zip(group, advantages, strict=True)]
