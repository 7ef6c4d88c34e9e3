"""What a grader gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from envs.types import Episode, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The judgement of one episode."""

    reward: float
    """The sum of `parts`; what training maximises."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The grader's own score under its name, then each penalty (negative or zero) under its name."""
    explanation: str = ""
    """Why, in words for the person who reads the transcript."""


class Grader(Protocol):
    """Scores an episode. Raises `WorldError` when a judge cannot be reached: the rollout is then masked."""

    async def grade(self, task: Task, episode: Episode) -> Grade: ...
