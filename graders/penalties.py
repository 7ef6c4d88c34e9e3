"""Penalties: what an episode costs, taken off its score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from envs.base import Closes
from envs.types import Episode, Task
from graders.config import PenaltiesConfig, PenaltyConfig
from graders.types import Grade, Grader, taken_metrics

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
    """Adds the penalties to another grader's grade, each as a part under its own name, and says whether it passed.

    With discrete scores (`floor` is None) `check_penalties` has proved that they can't lift a wrong answer over a right
    one, and nothing is clamped. With continuous scores `floor` is the threshold: the penalties of a right answer
    together take it no lower, all of them scaled by the same factor, and a wrong one lies below it to begin with.
    """

    def __init__(
        self, grader: Grader, config: PenaltiesConfig, *, threshold: float | None, floor: float | None
    ) -> None:
        self._grader = grader
        self._penalties = {name: setting for name in _MEASURES if (setting := getattr(config, name)) is not None}
        self._threshold = threshold
        self._floor = floor

    async def grade(self, task: Task, episode: Episode) -> Grade:
        grade = await self._grader.grade(task, episode)
        passed = None if self._threshold is None else grade.reward >= self._threshold
        taken: dict[str, float] = {}
        reasons = [grade.explanation]
        for name, setting in self._penalties.items():
            amount = _MEASURES[name](episode)
            taken[name] = penalty(amount, setting) if passes_or_all(passed, setting) else 0.0
            if taken[name]:
                words = name.replace("_", " ")
                reasons.append(f"{amount} {words}, {setting.free} free: {taken[name]:.3g}")
        total = sum(taken.values())
        if passed and self._floor is not None and grade.reward + total < self._floor:
            scale = (grade.reward - self._floor) / -total
            taken = {name: value * scale for name, value in taken.items()}
            reasons.append(f"held at the threshold {self._floor:g}")
        parts = {**grade.parts, **taken}
        return replace(grade, reward=sum(parts.values()), parts=parts, explanation="; ".join(reasons), passed=passed)

    def take_metrics(self) -> dict[str, float]:
        """What the other grader counted since the last call."""
        return taken_metrics(self._grader)

    async def aclose(self) -> None:
        if isinstance(self._grader, Closes):
            await self._grader.aclose()


def passes_or_all(passed: bool | None, setting: PenaltyConfig) -> bool:
    return bool(passed) or not setting.only_passing
