"""Penalties: what an episode costs, taken off its score."""

from __future__ import annotations

from collections.abc import Callable

from envs.types import Episode, Task
from graders.config import PenaltiesConfig, PenaltyConfig
from graders.types import Grade, Grader

FULL_SCORE = 1.0

_MEASURES: dict[str, Callable[[Episode], int]] = {
    "reasoning_tokens": lambda episode: episode.num_reasoning_tokens,
    "tool_calls": lambda episode: episode.num_tool_calls,
    "invalid_calls": lambda episode: episode.num_invalid_calls,
}


def penalty(amount: int, config: PenaltyConfig) -> float:
    """max(floor, -slope · max(0, amount - free)): in [floor, 0]."""
    excess = amount - config.free
    return max(config.floor, -config.slope * excess) if excess > 0 else 0.0


class PenalisedGrader:
    """Adds the penalties to another grader's grade, each as a part under its own name.

    `check_penalties` has proved that they can't lift a wrong answer over a right one; nothing is clamped here.
    """

    def __init__(self, grader: Grader, config: PenaltiesConfig) -> None:
        self._grader = grader
        self._penalties = {name: setting for name in _MEASURES if (setting := getattr(config, name)) is not None}

    async def grade(self, task: Task, episode: Episode) -> Grade:
        grade = await self._grader.grade(task, episode)
        parts, reasons = dict(grade.parts), [grade.explanation]
        for name, setting in self._penalties.items():
            passes = grade.reward >= FULL_SCORE
            amount = _MEASURES[name](episode)
            parts[name] = penalty(amount, setting) if passes or not setting.only_passing else 0.0
            if parts[name]:
                words = name.replace("_", " ")
                reasons.append(f"{amount} {words}, {setting.free} free: {parts[name]:.3g}")
        return Grade(reward=sum(parts.values()), parts=parts, explanation="; ".join(reasons))
