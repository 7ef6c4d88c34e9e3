"""What is measured of one rollout: the columns in which policies are compared and the preflight's histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from envs.types import StopReason
from trainer.rollout import Rollout


class Masked(StrEnum):
    """Why a rollout has no grade and is not trained on. Never the model's doing."""

    WORLD = "world"
    """A tool server, the engine or a simulated user failed, or said what the template can't render."""
    GRADER = "grader"
    """The episode ended and its grading failed: a judge, an endpoint or a sandbox."""
    NO_REWARD = "no_reward"
    """Every reward function gave None."""


WHY_MASKED: Mapping[str, str] = {
    Masked.WORLD: "lost to faults of the world",
    Masked.GRADER: "not graded, for the grader failed",
    Masked.NO_REWARD: "given None by every reward function",
}
"""In words that go on from "N rollouts (were)"."""


def masked_by(rollout: Rollout) -> Masked | None:
    """Why it has no grade; None where it has one."""
    if rollout.grade is not None:
        return None
    if rollout.episode.stop_reason is StopReason.WORLD_FAULT:
        return Masked.WORLD
    return Masked.NO_REWARD if rollout.is_unscored else Masked.GRADER


def masked_causes(rollouts: Iterable[Rollout]) -> dict[Masked, Counter[str]]:
    """By kind, in their order above: the causes, as the rollouts' errors tell them, and how many rollouts each."""
    causes: dict[Masked, Counter[str]] = {kind: Counter() for kind in Masked}
    for rollout in rollouts:
        if kind := masked_by(rollout):
            causes[kind][rollout.episode.error or "no cause given"] += 1
    return {kind: counter for kind, counter in causes.items() if counter}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of a rollout."""

    key: str
    label: str
    unit: str
    format: str
    better: int
    """+1: higher is better; -1: lower is better."""
    of: Callable[[Rollout], float | None]
    """None where the rollout does not have it: masked, or a grader that does not say what passes."""


def num_tool_errors(rollout: Rollout) -> int:
    """Malformed calls and calls that were answered with an error."""
    return sum(turn.malformed + sum(r.error is not None for r in turn.results) for turn in rollout.episode.turns)


def _graded(value: Callable[[Rollout], float]) -> Callable[[Rollout], float | None]:
    return lambda rollout: None if rollout.grade is None else float(value(rollout))


def _reward(rollout: Rollout) -> float | None:
    return None if rollout.grade is None else rollout.grade.reward


def _correct(rollout: Rollout) -> float | None:
    return None if rollout.grade is None or rollout.grade.passed is None else float(rollout.grade.passed)


MEASURES = (
    Measure(key="reward", label="mean reward", unit="reward", format="{:.3f}", better=+1, of=_reward),
    Measure(key="correct", label="correct", unit="share", format="{:.1%}", better=+1, of=_correct),
    Measure(
        key="answered",
        label="ended with an answer",
        unit="share",
        format="{:.1%}",
        better=+1,
        of=_graded(lambda r: r.episode.stop_reason.is_complete),
    ),
    Measure(
        key="tool_calls",
        label="tool calls",
        unit="calls a rollout",
        format="{:.2f}",
        better=-1,
        of=_graded(lambda r: r.episode.num_tool_calls),
    ),
    Measure(
        key="tool_errors",
        label="tool errors and malformed calls",
        unit="errors a rollout",
        format="{:.2f}",
        better=-1,
        of=_graded(num_tool_errors),
    ),
    Measure(
        key="tokens",
        label="tokens",
        unit="generated tokens a rollout",
        format="{:,.1f}",
        better=-1,
        of=_graded(lambda r: r.episode.num_tokens),
    ),
    Measure(
        key="reasoning_tokens",
        label="  of which reasoning",
        unit="reasoning tokens a rollout",
        format="{:,.1f}",
        better=-1,
        of=_graded(lambda r: r.episode.num_reasoning_tokens),
    ),
    Measure(
        key="latency_s",
        label="latency, s",
        unit="seconds a rollout",
        format="{:.2f}",
        better=-1,
        of=_graded(lambda r: r.episode.latency_s),
    ),
)
"""All are per graded rollout; tokens are generated ones."""
