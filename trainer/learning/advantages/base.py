"""What every estimator of advantages is given and gives, and the statistics that they share. Pure: no tensors.

Shape suffixes: P groups of a step, G rollouts of a group, T turns of a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.tasks.difficulty import stats_of

STD_EPS = 1e-4
"""Added to the standard deviation; trl's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What an estimator sees of a rollout."""

    reward: float | None
    """The whole of it; None for a masked rollout, which counts in no baseline and has no advantage."""
    turn_rewards_T: tuple[float, ...]
    """What of the reward each turn has earned by itself; the rest is the outcome's."""
    num_tokens_T: tuple[int, ...]
    """Sampled in each turn."""
    states_T: tuple[Hashable, ...]
    """What the model was shown before each turn; equal where it was the same."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of the reward, by name: `Grade.parts`."""

    @property
    def outcome(self) -> float:
        """What of the reward no turn has earned by itself."""
        assert self.reward is not None
        return self.reward - math.fsum(self.turn_rewards_T)

    def everywhere(self, advantage: float) -> tuple[float, ...]:
        """The same for each turn."""
        return (advantage,) * len(self.turn_rewards_T)


Groups = Sequence[Sequence[Attempt]]
"""(P, G): a step's, group after group; groups may be of different sizes."""
Advantages = list[list[tuple[float, ...] | None]]
"""(P, G, T): one for each turn, None for a masked rollout."""
Estimator = Callable[[Groups], Advantages]


def normalised(values: Sequence[float | None], *, eps: float = STD_EPS) -> list[float | None]:
    """(v - mean) / (std + eps), std with Bessel's correction; None stays None and does not count.

    Exactly 0 where all are equal but for rounding, free of the residue that subtracting a rounded mean would leave and
    dividing by a tiny std would blow up.
    """
    stats = stats_of(values)
    scale = 0.0 if stats.tied else 1.0 / (stats.std + eps)
    return [None if v is None else (v - stats.mean) * scale for v in values]


def returns_to_go(rewards_T: Sequence[float], gamma: float) -> list[float]:
    """(T,) Σ_{j ≥ k} gamma^(j - k) · r_j for each turn k."""
    returns, after = [], 0.0
    for reward in reversed(rewards_T):
        after = reward + gamma * after
        returns.append(after)
    return returns[::-1]


def rewards_in_time(attempt: Attempt) -> list[float]:
    """(T,) each turn's own reward, and the outcome at the last."""
    rewards = list(attempt.turn_rewards_T)
    if rewards:
        rewards[-1] += attempt.outcome
    return rewards
