"""What a grader gives back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Protocol

from envs.base import Counts
from envs.errors import FoundLate, WorldError
from envs.tools import EXPECTED_REWARD, told_number
from envs.tools import MOST_REWARD as MOST_REWARD
from envs.types import Episode, Task
from envs.user_code import raised_by


class GraderErrorKind(StrEnum):
    """What went wrong while an episode was graded; the hosted service counts the same kinds."""

    FORMULA_PARSE = "formula_parse"
    """A `multi` formula had no value: division by zero, the logarithm of a negative number."""
    SAMPLE_PARSE = "sample_parse"
    """The grader needs JSON and the answer is none."""
    INVALID_VARIABLE = "invalid_variable"
    """A template names something that this sample does not have."""
    TRUNCATED_OBSERVATION = "truncated_observation"
    """The sample was too large for the grader and was cut."""
    UNRESPONSIVE_REWARD = "unresponsive_reward"
    """An endpoint did not answer after its retries; the rollout is masked."""
    PYTHON_GRADER_SERVER = "python_grader_server"
    """The sandbox itself failed; the rollout is masked."""
    PYTHON_GRADER_RUNTIME = "python_grader_runtime"
    """The user's source raised, ran out of its limits, or returned no number."""
    MODEL_GRADER_SERVER = "model_grader_server"
    """The judge did not answer after its retries; the rollout is masked."""
    MODEL_GRADER_REFUSAL = "model_grader_refusal"
    """The judge refused."""
    MODEL_GRADER_PARSE = "model_grader_parse"
    """The judge's answer holds no result."""
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The judgement of one episode."""

    reward: float
    """The sum of `parts`; what training maximises."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The grader's own score under its name, then each penalty (negative or zero) under its name."""
    explanation: str = ""
    """Why, in words for the person who reads the transcript."""
    passed: bool | None = None
    """Whether the score reaches the grader's threshold; None where it has none."""
    turn_rewards: tuple[float, ...] | None = None
    """What of the reward each turn has earned by itself, one a turn; the rest is the outcome's, at the last turn. None
    where nothing is told of turns."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What the graders inside a `multi` gave, by name; not added to the reward by themselves."""
    errors: tuple[GraderErrorKind, ...] = ()
    """What went wrong: scored 0, but for TRUNCATED_OBSERVATION."""
    judge_tokens: Mapping[str, int] = field(default_factory=dict)
    """Prompt and completion tokens together that judges used, by model."""
    latency_s: float = 0.0

    @property
    def score(self) -> float:
        """The grader's own part, before the penalties."""
        return next(iter(self.parts.values()), self.reward)


def check_numbers(grade: Grade, task: Task) -> None:
    """Raise `WorldError` for a number that is none or that no gradient could hold: one odd answer loses one rollout."""
    whose = next(iter(grade.parts), "")
    for name, number in _numbers_of(grade).items():
        if not abs(number) <= MOST_REWARD:
            raise WorldError(
                f"{whose or 'the grader'}: {name} is {told_number(number)} for task {task.task_id!r}; {EXPECTED_REWARD}"
            )


def _numbers_of(grade: Grade) -> dict[str, float]:
    by_turn = {f"turn {k + 1}'s reward": x for k, x in enumerate(grade.turn_rewards or ())}
    return {"reward": grade.reward, **grade.parts, **grade.scores, **by_turn}


class Grader(Protocol):
    """Scores an episode.

    Raises `WorldError` when a judge or endpoint cannot be reached: the rollout is then masked. It may also be what
    `envs.base` describes as `Checks`, `Counts` and `Closes`.
    """

    async def grade(self, task: Task, episode: Episode) -> Grade: ...


def taken_metrics(part: object) -> dict[str, float]:
    """The figures of a world, a grader or another part that has any. Raises `FoundLate` for what is none."""
    if not isinstance(part, Counts):
        return {}
    # Of the user's own code it names the class, however it was wrapped.
    where = f"{getattr(part.take_metrics, '__qualname__', type(part).__name__)}()"
    with raised_by(where):
        taken: object = part.take_metrics()
    if inspect.iscoroutine(taken):
        taken.close()
        raise FoundLate(f"{where}: expected a plain method, not an async one")
    if not isinstance(taken, Mapping):
        raise FoundLate(f"{where}: expected figures by name, got {type(taken).__name__}")
    figures: dict[str, float] = {}
    for name, value in taken.items():
        if not isinstance(name, str) or not isinstance(value, Real):
            raise FoundLate(f"{where}: expected figures by name, got {value!r:.80} under {name!r:.80}")
        try:
            figures[name] = value if isinstance(value, int) and math.isfinite(value) else float(value)
        except OverflowError:
            raise FoundLate(f"{where}: the figure {name!r:.80} is larger than any float") from None
    return figures
