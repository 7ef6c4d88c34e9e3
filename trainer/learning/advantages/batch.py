"""Advantages whitened over all tokens of the step: REINFORCE++, with and without a group's baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.config.advantages import AdvantageSettings
from trainer.learning.advantages.base import Advantages, Groups, returns_to_go, rewards_in_time
from trainer.learning.advantages.group import group_advantages
from trainer.tasks.difficulty import stats_of

_VARIANCE_EPS = 1e-8
"""verl's and OpenRLHF's."""


def reinforce_pp(groups: Groups, config: AdvantageSettings) -> Advantages:
    """A_k = (G_k - mean) / sqrt(var + 1e-8), with G_k the reward still to come at turn k (all of it without rewards by
    turn), mean and variance (divisor n - 1) over the sampled tokens of the step.

    REINFORCE++, Hu et al. 2025, arXiv:2501.03262, with gamma 1. (P, G) attempts in, (P, G, T) out. A group whose
    rewards are all equal is still told apart from other groups. Left out on purpose: the KL penalty token by token,
    which `loss.kl.place: reward` takes off by turn.
    """
    returns: Advantages = [
        [None if a.reward is None else tuple(returns_to_go(rewards_in_time(a), 1.0)) for a in group] for group in groups
    ]
    return _whitened(returns, groups)


def reinforce_pp_baseline(groups: Groups, config: AdvantageSettings) -> Advantages:
    """A = (r - mean of the group), whitened over the sampled tokens of the step as in `reinforce_pp`.

    REINFORCE++-baseline, Hu et al. 2025, arXiv:2501.03262: GRPO with the step's spread instead of the
    group's, so that no nearly tied group is blown up.
    """
    centred: Advantages = []
    for group in groups:
        advantages = group_advantages([a.reward for a in group], "dr_grpo").advantages
        centred.append([None if x is None else a.everywhere(x) for a, x in zip(group, advantages, strict=True)])
    return _whitened(centred, groups)


def _whitened(values: Advantages, groups: Groups) -> Advantages:
    """Each value counted once for every token of its turn; exactly 0 where all are equal but for rounding."""
    counted = [
        (x, n)
        for group, attempts in zip(values, groups, strict=True)
        for of, attempt in zip(group, attempts, strict=True)
        if of is not None
        for x, n in zip(of, attempt.num_tokens_T, strict=True)
        if n
    ]
    mean, scale = _moments(counted)

    def white(of: Sequence[float]) -> tuple[float, ...]:
        return tuple((x - mean) * scale for x in of)

    return [[None if of is None else white(of) for of in group] for group in values]


def _moments(counted: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The mean, and 1 / sqrt(var + 1e-8), or 0 where all are equal: their noise is nothing to learn."""
    stats = stats_of([x for x, _ in counted])
    if stats.tied:
        return stats.mean, 0.0
    num_tokens = sum(n for _, n in counted)
    mean = math.fsum(x * n for x, n in counted) / num_tokens
    variance = math.fsum(n * (x - mean) ** 2 for x, n in counted) / max(num_tokens - 1, 1)
    return mean, 1.0 / math.sqrt(variance + _VARIANCE_EPS)
