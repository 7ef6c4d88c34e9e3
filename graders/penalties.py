"""Penalties: what an episode costs, taken off its score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

from pydantic import Field

from envs.base import Closes
from envs.errors import UserError, told_of
from envs.settings import Settings
from envs.types import Episode, Task
from graders.settings import Continuous, GraderSettings
from graders.types import Grade, Grader, check_numbers, taken_metrics

# Keeps `right > wrong` strict in floating point: far above the rounding of a sum of four numbers near 1.
_MARGIN = 1e-6
_MEASURES: dict[str, Callable[[Episode], int]] = {
    "reasoning_tokens": lambda episode: episode.num_reasoning_tokens,
    "tool_calls": lambda episode: episode.num_tool_calls,
    "invalid_calls": lambda episode: episode.num_invalid_calls,
    "generated_tokens": lambda episode: episode.num_tokens,
}
TURN_REWARDS = "turn_rewards"
"""The part of the reward that tools and the environment gave."""
KL = "kl"
"""The part that a KL to the reference takes off, where the reward bears it."""


class PenaltyConfig(Settings):
    """A penalty of `slope` for each unit over the free allowance, never below `floor`."""

    free: int = Field(default=0, ge=0, description="Units that cost nothing.")
    slope: float = Field(gt=0, description="Reward lost by each unit over the free ones.")
    floor: float = Field(ge=-1, lt=0, description="The lowest value that the penalty reaches, such as -0.2.")
    only_passing: bool = Field(default=False, description="Only on right answers.")
    by_turn: bool = Field(
        default=False,
        description="Charged to the turns that caused it, for estimators of advantages by turn; the sum is the same.",
    )


class PenaltiesConfig(Settings):
    """The penalties that are taken off the score; what is left out costs nothing."""

    reasoning_tokens: PenaltyConfig | None = Field(default=None, description="On each reasoning token.")
    tool_calls: PenaltyConfig | None = Field(default=None, description="On each tool call, malformed ones included.")
    invalid_calls: PenaltyConfig | None = Field(
        default=None, description="On each malformed call, unknown tool, or call whose arguments do not fit the schema."
    )

    generated_tokens: PenaltyConfig | None = Field(
        default=None,
        description="On each generated token; with free = longest - buffer, slope = 0.5 / buffer, floor = -0.5 it is "
        "DAPO's soft punishment of overlong answers (arXiv:2503.14476) for scores of 0 and 1.",
    )

    @property
    def lowest(self) -> float:
        """The sum of the floors: no rollout loses more."""
        return float(sum(getattr(self, name).floor for name in self.names))

    @property
    def names(self) -> list[str]:
        """Of those that are set."""
        return [name for name in _MEASURES if getattr(self, name) is not None]


def penalty_in(parts: Mapping[str, float]) -> float:
    """What penalties give of a reward's parts: 0 or negative."""
    return math.fsum(parts.get(name, 0.0) for name in _MEASURES)


def check_penalties(grader: GraderSettings, penalties: PenaltiesConfig) -> None:
    """Raise `UserError` unless the law holds: a penalty never lifts a wrong answer over a right one.

    All penalties together lie in [sum of floors, 0]. Where the scores are discrete and the size of that sum is below
    the least gap between two of them (1, or with partial credit c: min(c, 1 - c)), score_better + sum of floors >
    score_worse: whatever the two episodes cost, the better score keeps the better reward; every other configuration is
    refused. Continuous scores need `pass_threshold`: the penalties of a right answer then end at the threshold (see
    `PenalisedGrader`), and no wrong answer can reach it.
    """
    if penalties.lowest == 0:
        return
    if isinstance(grader, Continuous):
        if grader.pass_threshold is None:
            raise UserError(
                f"penalties: the scores of the {grader.type!r} grader may lie anywhere, so a penalised right answer "
                "could fall below a wrong one; set grader.pass_threshold to the score from which an answer is right"
            )
        return
    gap, lowest = grader.score_gap, penalties.lowest
    if -lowest > gap - _MARGIN:
        raise UserError(
            f"penalties: the floors sum to {lowest:g}, but two scores of the {grader.type!r} grader may differ by only "
            f"{gap:g}: a penalised right answer could fall below a wrong one; raise the floors so that their sum stays "
            f"above {-gap:g}"
        )


def part_name(grader: GraderSettings) -> str:
    """What the grader's own part of the reward is called, but where the user's class says otherwise."""
    return str(getattr(grader, "name", grader.type))


def check_part_names(names: Iterable[str], penalties: PenaltiesConfig, *, whose: str) -> None:
    """Raise `UserError` for a part of a grader that is called as one of ours, which would take its place."""
    ours = [TURN_REWARDS, KL, *penalties.names]
    for name in names:
        if name in ours:
            raise UserError(
                f"{whose}: {name!r} is a part of the reward of the trainer's own ({', '.join(ours)}); expected another "
                "name"
            )


def check_turn_rewards(grade: Grade, episode: Episode) -> None:
    """Raise `UserError` where there is not one a turn."""
    num_turns = len(episode.turns)
    if grade.turn_rewards is not None and len(grade.turn_rewards) != num_turns:
        raise UserError(
            f"grader: gave {len(grade.turn_rewards)} turn_rewards for an episode of {num_turns} turns; expected "
            f"one a turn (task {episode.task_id!r})"
        )


def penalty(amount: int, config: PenaltyConfig) -> float:
    """max(floor, -slope · max(0, amount - free)): in [floor, 0]."""
    excess = amount - config.free
    return max(config.floor, -config.slope * excess) if excess > 0 else 0.0


def penalty_by_turn(name: str, config: PenaltyConfig, episode: Episode) -> list[float]:
    """What each turn adds to the penalty: free units are the first ones, and past the floor nothing costs more."""
    turns = episode.turns
    reached = [penalty(_MEASURES[name](replace(episode, turns=turns[:k])), config) for k in range(len(turns) + 1)]
    return [after - before for before, after in pairwise(reached)]


class PenalisedGrader:
    """Adds the penalties to another grader's grade, each as a part under its own name, and says whether it passed.

    So, too, what tools and the environment gave for turns: a part `turn_rewards`. That is the world's own word, and no
    law binds it; whether the episode passed is the other grader's alone.

    With discrete scores (`floor` is None) `check_penalties` has proved that they can't lift a wrong answer over a right
    one, and nothing is clamped. With continuous scores `floor` is the threshold: the penalties of a right answer
    together take it no lower, all of them scaled by the same factor, and a wrong one lies below it to begin with.
    """

    def __init__(
        self, grader: Grader, config: PenaltiesConfig, *, threshold: float | None, floor: float | None
    ) -> None:
        self._grader = grader
        self._config = config
        self._penalties: dict[str, PenaltyConfig] = {name: getattr(config, name) for name in config.names}
        self._threshold = threshold
        self._floor = floor

    async def grade(self, task: Task, episode: Episode) -> Grade:
        try:
            with told_of(f"task {task.task_id!r}"):
                grade = await self._grader.grade(task, episode)
                check_part_names(grade.parts, self._config, whose="grader: parts")
            # Before sums are made of them, which such numbers would leave without a value.
            check_numbers(grade, task)
        except Exception as e:
            e.add_note(f"for task {task.task_id!r}, rollout {episode.rollout_id!r}")
            raise
        passed = None if self._threshold is None else grade.reward >= self._threshold
        taken: dict[str, float] = {}
        reasons = [grade.explanation]
        for name, setting in self._penalties.items():
            amount = _MEASURES[name](episode)
            is_due = passed or not setting.only_passing
            taken[name] = penalty(amount, setting) if is_due else 0.0
            if taken[name]:
                words = name.replace("_", " ")
                reasons.append(f"{amount} {words}, {setting.free} free: {taken[name]:.3g}")
        total = sum(taken.values())
        if passed and self._floor is not None and grade.reward + total < self._floor:
            scale = (grade.reward - self._floor) / -total
            taken = {name: value * scale for name, value in taken.items()}
            reasons.append(f"held at the threshold {self._floor:g}")
        parts = {**grade.parts, **taken}
        if any(turn.reward is not None for turn in episode.turns):
            parts[TURN_REWARDS] = math.fsum(turn.reward or 0.0 for turn in episode.turns)
        return replace(
            grade,
            reward=sum(parts.values()),
            parts=parts,
            explanation="; ".join(reasons),
            passed=passed,
            turn_rewards=self._turn_rewards(grade, episode, taken),
        )

    def _turn_rewards(self, grade: Grade, episode: Episode, taken: Mapping[str, float]) -> tuple[float, ...] | None:
        """What each turn has earned of it: by the grader, by tools and environment, and penalties by turn."""
        check_turn_rewards(grade, episode)
        columns = [] if grade.turn_rewards is None else [grade.turn_rewards]
        if any(turn.reward is not None for turn in episode.turns):
            columns.append(tuple(turn.reward or 0.0 for turn in episode.turns))
        for name, setting in self._penalties.items():
            if setting.by_turn:
                by_turn = penalty_by_turn(name, setting, episode)
                # Held at the threshold, or not due, the whole is smaller, and each turn's share with it.
                whole = math.fsum(by_turn)
                columns.append(tuple(x * taken[name] / whole if whole else 0.0 for x in by_turn))
        return tuple(math.fsum(of_turn) for of_turn in zip(*columns, strict=True)) if columns else None

    def take_metrics(self) -> dict[str, float]:
        """What the other grader counted since the last call."""
        return taken_metrics(self._grader)

    async def aclose(self) -> None:
        if isinstance(self._grader, Closes):
            await self._grader.aclose()
