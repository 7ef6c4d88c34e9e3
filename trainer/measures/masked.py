"""Rollouts without a grade: why, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

from envs.types import StopReason
from trainer.types import Rollout


class Masked(StrEnum):
    """Why a rollout has no grade and is not trained on. Never the model's doing."""

    WORLD = "world"
    """A tool server, the engine or a simulated user failed, or said what the template can't render."""
    GRADER = "grader"
    """The episode ended and its grading failed: a judge, an endpoint or a sandbox."""
    NO_REWARD = "no_reward"
    """Every reward function gave None."""
    DEADLINE = "deadline"
    """The step had waited for it as long as `overlap.deadline_s` says."""


WHY_MASKED: Mapping[str, str] = {
    Masked.WORLD: "lost to faults of the world",
    Masked.GRADER: "not graded, for the grader failed",
    Masked.NO_REWARD: "given None by every reward function",
    Masked.DEADLINE: "cut off at the step's deadline",
}
"""In words that go on from "N rollouts (were)"."""


def masked_by(rollout: Rollout) -> Masked | None:
    """Why it has no grade; None where it has one."""
    if rollout.grade is not None:
        return None
    if rollout.episode.stop_reason is StopReason.WORLD_FAULT:
        return Masked.WORLD
    if rollout.episode.stop_reason is StopReason.DEADLINE:
        return Masked.DEADLINE
    return Masked.NO_REWARD if rollout.is_unscored else Masked.GRADER


def masked_causes(rollouts: Iterable[Rollout]) -> dict[Masked, Counter[str]]:
    """By kind, in their order above: the causes, as the rollouts' errors tell them, and how many rollouts each."""
    causes: dict[Masked, Counter[str]] = {kind: Counter() for kind in Masked}
    for rollout in rollouts:
        if kind := masked_by(rollout):
            causes[kind][rollout.episode.error or "no cause given"] += 1
    return {kind: counter for kind, counter in causes.items() if counter}
