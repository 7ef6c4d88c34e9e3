"""Advantages of each part of the reward by itself: GDPO."""

from __future__ import annotations

import math
from collections.abc import Sequence

from envs.errors import UserError
from graders.penalties import TURN_REWARDS
from trainer.config.advantages import GdpoConfig
from trainer.learning.advantages.base import STD_EPS, Advantages, Attempt, Groups, normalised
from trainer.tasks.difficulty import stats_of


def gdpo(groups: Groups, config: GdpoConfig) -> Advantages:
    """A = normalised over the step of  Σ_part weight · (p - mean_group(p)) / (std_group(p) + 1e-4).

    GDPO, Liu et al. 2026, arXiv:2601.05242; trl 1.16's `multi_objective_aggregation="normalize_then_sum"`. Summing
    first, as GRPO does, gives rollouts with different parts and the same sum one advantage, and lets the part with the
    largest spread speak for all. Parts are those of the grade: the grader's own, then the penalties. (P, G) attempts
    in, (P, G, T) out, the same for every turn.

    Raises `UserError` where a group's rollouts have different parts or none, and where `weights` names one that is not
    there or leaves none with a weight.
    """
    sums = [_of_group(group, config) for group in groups]
    stats = stats_of([x for group in sums for x in group])
    # The step's mean is 0, each group's being; subtracting its rounding would take tied groups off 0.
    scale = 0.0 if stats.tied else 1.0 / (stats.std + STD_EPS)
    return [
        [None if x is None else attempt.everywhere(x * scale) for attempt, x in zip(group, of, strict=True)]
        for group, of in zip(groups, sums, strict=True)
    ]


def _of_group(group: Sequence[Attempt], config: GdpoConfig) -> list[float | None]:
    parts = [None if a.reward is None else dict(a.parts) for a in group]
    present = [of for of in parts if of is not None]
    if any(TURN_REWARDS in of for of in present):
        # Only rollouts to which a tool or the environment gave something have it.
        for of in present:
            of.setdefault(TURN_REWARDS, 0.0)
    names = list(dict.fromkeys(tuple(sorted(of)) for of in present))
    if len(names) > 1:
        told = " and of another ".join(", ".join(n) or "none" for n in names)
        raise UserError(
            f"loss.advantage gdpo: the parts of one rollout's reward are {told}; expected the same in a group"
        )
    if not names:
        return [None] * len(group)
    # Another group's rollouts may have rewards of turns.
    if wrong := config.fault(names[0] and tuple(dict.fromkeys((*names[0], TURN_REWARDS)))):
        raise UserError(wrong)
    columns = {name: normalised([None if of is None else of[name] for of in parts]) for name in names[0]}
    sums = [
        None
        if of is None
        else math.fsum(config.weights.get(name, 1.0) * (column[i] or 0.0) for name, column in columns.items())
        for i, of in enumerate(parts)
    ]
    # Parts that outweigh each other leave the rounding of 0.
    return [None if x is None else 0.0 for x in sums] if stats_of(sums).tied else sums
