"""Advantages of each part of the reward by itself: GDPO."""

from __future__ import annotations

import math
from collections.abc import Sequence

from envs.errors import UserError
from trainer.config.advantages import GdpoConfig
from trainer.learning.advantages.base import Advantages, Attempt, Groups, normalised


def gdpo(groups: Groups, config: GdpoConfig) -> Advantages:
    """A = normalised over the step of  Σ_part weight · (p - mean_group(p)) / (std_group(p) + 1e-4).

    GDPO, Liu et al. 2026, arXiv:2601.05242; trl 1.16's `multi_objective_aggregation="normalize_then_sum"`. Summing
    first, as GRPO does, gives rollouts with different parts and the same sum one advantage, and lets the part with the
    largest spread speak for all. Parts are those of the grade: the grader's own, then the penalties. (P, G) attempts
    in, (P, G, T) out, the same for every turn.

    Raises `UserError` where a group's rollouts have different parts, or `weights` names one that is not there.
    """
    sums = [_of_group(group, config) for group in groups]
    flat = iter(normalised([x for group in sums for x in group]))
    return [[None if (x := next(flat)) is None else attempt.everywhere(x) for attempt in group] for group in groups]


def _of_group(group: Sequence[Attempt], config: GdpoConfig) -> list[float | None]:
    present = [a for a in group if a.reward is not None]
    names = [tuple(a.parts) for a in present]
    if len({frozenset(n) for n in names}) > 1:
        told = " and of another ".join(", ".join(n) or "none" for n in dict.fromkeys(names))
        raise UserError(
            f"loss.advantage gdpo: the parts of one rollout's reward are {told}; expected the same in a group"
        )
    if present and (unknown := set(config.weights) - set(names[0])):
        raise UserError(
            f"loss.advantage.weights: {min(unknown)!r} is no part of the reward; it has {', '.join(names[0]) or 'none'}"
        )
    columns = (
        [normalised([None if a.reward is None else a.parts[name] for a in group]) for name in names[0]] if names else []
    )
    weights = [config.weights.get(name, 1.0) for name in names[0]] if names else []
    return [
        None if a.reward is None else math.fsum(w * (c[i] or 0.0) for w, c in zip(weights, columns, strict=True))
        for i, a in enumerate(group)
    ]
