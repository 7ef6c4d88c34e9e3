"""Graders tried on a file of samples, and what comes of it in the hosted service's words."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from envs.base import Closes
from envs.errors import Unscored, UserError, WorldError
from envs.reading.documents import from_file
from envs.settings import Settings
from envs.types import StopReason, Task
from graders.build import build_grader
from graders.config import GraderConfig, singles
from graders.hosted.sample_file import SampleRow
from graders.judges.base import JudgeConfig, NobodyAsked
from graders.judges.cache import CachedJudge
from graders.judges.openai_judge import build_judge
from graders.penalties import PenaltiesConfig
from graders.registry import GRADERS
from graders.types import Grade, Grader, GraderErrorKind, check_numbers


class TrialSettings(Settings, extra="ignore"):
    """What of a run config concerns grading; its other keys are passed over."""

    grader: Annotated[GraderConfig, BeforeValidator(from_file("grader"))]
    penalties: PenaltiesConfig = PenaltiesConfig()
    judge: JudgeConfig = JudgeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One line with its grade."""

    row: SampleRow
    grade: Grade | None
    """None where there is nothing to train on: in training the rollout is masked."""
    lost: str = ""
    """What kind of reason there is for that: one for each kind of fault."""
    fault: str = ""
    """Why there is none, in full."""
    errors: tuple[GraderErrorKind, ...] = ()
    latency_s: float


def _types(config: GraderConfig) -> set[str]:
    return {single.type for single in singles(config).values()}


def build_trial(
    settings: TrialSettings, rows: Sequence[SampleRow], source: Path | None, *, asks: bool = True
) -> tuple[Grader, CachedJudge | None]:
    """The grader and, where it asks one, its judge; without `asks` nobody can be asked, and no key is needed.

    Raises `UserError` as `build_grader` does, with the line of the first row that can't be graded.
    """
    judge = None if asks else CachedJudge(NobodyAsked(), 0)
    if asks and any(GRADERS[name].judge for name in _types(settings.grader)):
        if settings.judge.base_url == "engine":
            raise UserError("judge.base_url: the run's own engine does not run here; name a server with --judge-url")
        judge = CachedJudge(build_judge(settings.judge), settings.judge.cache_size)
    checked: list[int] = []

    def tasks() -> Iterator[Task]:
        for row in rows:
            checked.append(row.line)
            yield row.task

    try:
        return build_grader(settings.grader, settings.penalties, judge=judge, tasks=tasks()), judge
    except UserError as e:
        raise UserError(f"{source}, line {checked[-1]}: {e}" if checked else str(e)) from e


async def grade_all(settings: TrialSettings, rows: Sequence[SampleRow], source: Path, concurrency: int) -> list[Graded]:
    """Each row with its grade, in their order. Raises `UserError` that names the row."""
    grader, judge = build_trial(settings, rows, source)
    slots = asyncio.Semaphore(concurrency)
    types = _types(settings.grader)

    async def one(row: SampleRow) -> Graded:
        async with slots:
            return await _grade(grader, row, types, where=f"{source}, line {row.line}")

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(row)) for row in rows]
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    finally:
        for part in (grader, judge):
            if isinstance(part, Closes):
                await part.aclose()
    return [task.result() for task in running]


async def _grade(grader: Grader, row: SampleRow, types: set[str], *, where: str) -> Graded:
    if row.episode.stop_reason.is_masked:
        is_cut = row.episode.stop_reason is StopReason.DEADLINE
        lost = "it was cut off at the step's deadline" if is_cut else "the world broke it off"
        return Graded(row=row, grade=None, lost=lost, fault=f"{lost}: {row.episode.error}", latency_s=0.0)
    start = time.perf_counter()
    try:
        grade = await grader.grade(row.task, row.episode)
        check_numbers(grade, row.task)
    except Unscored as e:
        took_s = time.perf_counter() - start
        return Graded(row=row, grade=None, lost="every reward function gave None", fault=str(e), latency_s=took_s)
    except WorldError as e:
        took_s = time.perf_counter() - start
        kinds = {GRADERS[name].fault for name in types} - {GraderErrorKind.OTHER}
        kind = kinds.pop() if len(kinds) == 1 else GraderErrorKind.OTHER
        return Graded(row=row, grade=None, lost="its grading failed", fault=str(e), errors=(kind,), latency_s=took_s)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    except Exception as e:
        if "custom" not in types:
            raise
        # The user's own code: what it raised, and where.
        frame = traceback.extract_tb(e.__traceback__)[-1]
        place = f"{frame.filename}, line {frame.lineno}"
        raise UserError(f"{where}: the grader raised {type(e).__name__}: {e} ({place})") from e
    return Graded(row=row, grade=grade, errors=grade.errors, latency_s=time.perf_counter() - start)


def as_hosted(graded: Graded, config: GraderConfig) -> dict[str, Any]:
    """The grade under the keys of the hosted graders/run, and which row it is; without a grade the reward is null."""
    grade = graded.grade
    tokens = dict(grade.judge_tokens) if grade else {}
    scores = dict(grade.scores or grade.parts) if grade else {}
    errors: dict[str, Any] = {f"{kind.value}_error": kind in graded.errors for kind in GraderErrorKind}
    told = graded.fault or (grade.explanation if grade else "")
    details = {
        "model_grader_server_error_details": (GraderErrorKind.MODEL_GRADER_SERVER, graded.fault),
        "python_grader_runtime_error_details": (GraderErrorKind.PYTHON_GRADER_RUNTIME, told),
        "python_grader_server_error_type": (GraderErrorKind.PYTHON_GRADER_SERVER, graded.fault),
    }
    errors |= {key: text if kind in graded.errors and text else None for key, (kind, text) in details.items()}
    return {
        "line": graded.row.line,
        "task_id": graded.row.task.task_id,
        "reward": grade.reward if grade else None,
        "passed": grade.passed if grade else None,
        "explanation": told,
        "sub_rewards": dict(grade.scores) if grade else {},
        "metadata": {
            "name": getattr(config, "name", config.type),
            "type": config.type,
            "errors": errors,
            "execution_time": graded.latency_s,
            "scores": scores,
            "token_usage": sum(tokens.values()) if tokens else None,
            "sampled_model_name": next(iter(tokens), None),
        },
        "model_grader_token_usage_per_model": tokens,
    }
