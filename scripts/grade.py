"""Run or validate a grader: `python scripts/grade.py run --grader grader.json --samples samples.jsonl`.

The grader is the hosted service's JSON, or the `grader`, `penalties` and `judge` sections of a run config in YAML. A
line of the samples is `{"item", "sample"}` (exported ones too), `{"item", "model_sample"}` as the hosted graders/run
takes them, or a rollout as a run writes it. `validate` checks the grader alone, and with `--samples` that it can grade
these rows; it asks no judge, and needs no key.
Exit codes: 0 done, 2 something in the input is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from envs.base import Closes
from envs.errors import Unscored, UserError, WorldError
from envs.reading.documents import check_writable, from_file, read_document
from envs.settings import Settings
from envs.terminal import console, run, say, without_control
from envs.types import StopReason, Task
from envs.validation import on_one_screen
from graders.build import build_grader
from graders.config import GraderConfig, MultiConfig
from graders.hosted.sample_file import Row, read_samples
from graders.judges.base import JudgeConfig, NobodyAsked
from graders.judges.cache import CachedJudge
from graders.judges.openai_judge import build_judge
from graders.penalties import PenaltiesConfig
from graders.types import Grade, Grader, GraderErrorKind

_SERVER_KINDS = {
    "endpoint": GraderErrorKind.UNRESPONSIVE_REWARD,
    "python": GraderErrorKind.PYTHON_GRADER_SERVER,
    "score_model": GraderErrorKind.MODEL_GRADER_SERVER,
    "label_model": GraderErrorKind.MODEL_GRADER_SERVER,
}


class _Settings(Settings, extra="ignore"):
    """What of a run config concerns grading."""

    grader: Annotated[GraderConfig, BeforeValidator(from_file("grader"))]
    penalties: PenaltiesConfig = PenaltiesConfig()
    judge: JudgeConfig = JudgeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """One line with its grade."""

    row: Row
    grade: Grade | None
    """None where there is nothing to train on: in training the rollout is masked."""
    lost: str = ""
    """What kind of reason there is for that: one for each kind of fault."""
    fault: str = ""
    """Why there is none, in full."""
    errors: tuple[GraderErrorKind, ...] = ()
    latency_s: float


def main() -> int:
    arguments = _parse_arguments()
    try:
        settings = _read_settings(arguments)
        rows = list(itertools.islice(read_samples(arguments.samples), arguments.limit)) if arguments.samples else []
        if arguments.command == "validate":
            _build(settings, rows, arguments.samples, asks=False)
            # As the hosted graders/validate answers.
            shown = {"grader": settings.grader.model_dump(mode="json")}
            text = json.dumps(shown, ensure_ascii=False, indent=2)
            print(text if without_control(text) == text else json.dumps(shown, indent=2))
            return 0
        if arguments.json:
            check_writable(arguments.json, "--json")
        graded = asyncio.run(_grade_all(settings, rows, arguments.samples, arguments.concurrency))
        if arguments.json:
            lines = (json.dumps(as_hosted(g, settings.grader), ensure_ascii=False) for g in graded)
            arguments.json.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return 2
    print_tables(console(), graded, num_worst=arguments.worst)
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=("run", "validate"))
    parser.add_argument("--grader", type=Path, required=True, help="JSON of a grader, or YAML of a run config")
    parser.add_argument("--samples", type=Path, help="JSONL")
    parser.add_argument("--penalties", type=Path, help="JSON or YAML of the penalties section; default: the config's")
    parser.add_argument("--judge-url", help="OpenAI-compatible server with /v1; default: the config's judge.base_url")
    parser.add_argument("--judge-model", help="asked in place of the model that the grader names")
    parser.add_argument("--judge-key-env", help="environment variable that holds the judge's key")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--concurrency", type=int, default=16, help="rows graded at once")
    parser.add_argument("--worst", type=int, default=5, help="rows of least reward that are shown")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write each row's grade there, as JSONL")
    arguments = parser.parse_args()
    if arguments.command == "run" and arguments.samples is None:
        parser.error("run needs --samples")
    for name in ("limit", "concurrency"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"--{name} {number}: expected at least 1")
    return arguments


# ---- what the user gives


def _read_settings(arguments: argparse.Namespace) -> _Settings:
    path: Path = arguments.grader
    data = read_document(path, str(path))
    if isinstance(data, dict) and "type" in data:
        data = {"grader": data}
    if arguments.penalties:
        penalties = read_document(arguments.penalties, str(arguments.penalties))
        data = {
            **data,
            "penalties": penalties.get("penalties", penalties) if isinstance(penalties, dict) else penalties,
        }
    given = {"base_url": arguments.judge_url, "model": arguments.judge_model, "api_key_env": arguments.judge_key_env}
    judge = {key: value for key, value in given.items() if value is not None}
    if judge and isinstance(data, dict):
        data = {**data, "judge": {**(data.get("judge") or {}), **judge}}
    try:
        return _Settings.model_validate(data)
    except ValidationError as e:
        raise UserError(on_one_screen(f"grader {path}", e, _Settings, data)) from None


# ---- grading


def _types(config: GraderConfig) -> set[str]:
    return {"multi", *(g.type for g in config.graders.values())} if isinstance(config, MultiConfig) else {config.type}


def _build(
    settings: _Settings, rows: Sequence[Row], source: Path | None, *, asks: bool = True
) -> tuple[Grader, CachedJudge | None]:
    judge = None if asks else CachedJudge(NobodyAsked(), 0)
    if asks and _types(settings.grader) & {"score_model", "label_model"}:
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


async def _grade_all(settings: _Settings, rows: Sequence[Row], source: Path, concurrency: int) -> list[Graded]:
    grader, judge = _build(settings, rows, source)
    slots = asyncio.Semaphore(concurrency)
    types = _types(settings.grader)

    async def one(row: Row) -> Graded:
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


async def _grade(grader: Grader, row: Row, types: set[str], *, where: str) -> Graded:
    if row.episode.stop_reason is StopReason.WORLD_FAULT:
        lost = "the world broke it off"
        return Graded(row=row, grade=None, lost=lost, fault=f"{lost}: {row.episode.error}", latency_s=0.0)
    start = time.perf_counter()
    try:
        grade = await grader.grade(row.task, row.episode)
    except Unscored as e:
        took_s = time.perf_counter() - start
        return Graded(row=row, grade=None, lost="every reward function gave None", fault=str(e), latency_s=took_s)
    except WorldError as e:
        took_s = time.perf_counter() - start
        kinds = {_SERVER_KINDS[name] for name in types if name in _SERVER_KINDS}
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


# ---- what is told


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


def print_tables(console: Console, graded: Sequence[Graded], *, num_worst: int) -> None:
    grades = [g.grade for g in graded if g.grade is not None]
    parts: dict[str, list[float]] = {}
    for grade in grades:
        for name, score in {**grade.parts, **grade.scores}.items():
            parts.setdefault(name, []).append(score)
    rewards = _table("score", "rows", "mean", "std", "min", "25 %", "median", "75 %", "max")
    for name, values in {"reward": [g.reward for g in grades], **parts}.items():
        if values and (name == "reward" or len(parts) > 1):
            rewards.add_row(name, str(len(values)), *(f"{x:.3f}" for x in _spread(values)))
    console.print(rewards)
    judged = [grade.passed for grade in grades if grade.passed is not None]
    if judged:
        console.print(f"passed {sum(judged)} of {len(judged)} ({sum(judged) / len(judged):.1%})", highlight=False)
    if lost := len(graded) - len(grades):
        console.print(f"not graded {lost} of {len(graded)}: in training these rollouts are masked", highlight=False)
        _print_counts(console, "not graded", Counter(g.lost for g in graded if g.lost), len(graded))
    _print_counts(
        console, "error", Counter(kind.value for g in graded for kind in dict.fromkeys(g.errors)), len(graded)
    )
    if graded:
        latencies = sorted(g.latency_s for g in graded)
        p95 = latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))]
        console.print(f"latency: median {statistics.median(latencies):.3f} s, p95 {p95:.3f} s", highlight=False)
    tokens: Counter[str] = Counter()
    for grade in grades:
        tokens.update(grade.judge_tokens)
    _print_counts(console, "judge tokens", tokens, None)
    _print_worst(console, graded, num_worst)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _spread(values: Sequence[float]) -> tuple[float, ...]:
    """Mean, standard deviation, least, quartiles, most."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return (statistics.fmean(values), statistics.pstdev(values), min(values), *quartiles, max(values))


def _print_counts(console: Console, what: str, counts: Mapping[str, int], num_rows: int | None) -> None:
    if counts:
        table = _table(what, "count", *(["share"] if num_rows else []))
        for name, count in sorted(counts.items(), key=lambda entry: -entry[1]):
            table.add_row(name, f"{count:,}", *([f"{count / num_rows:.1%}"] if num_rows else []))
        console.print(table)


def _print_worst(console: Console, graded: Sequence[Graded], num_worst: int) -> None:
    worst = sorted(graded, key=lambda g: g.grade.reward if g.grade else float("-inf"))[:num_worst]
    if worst:
        table = _table("line", "reward")
        table.add_column("why", max_width=90, overflow="fold")
        for g in worst:
            reward = f"{g.grade.reward:.3f}" if g.grade else "none"
            # Text, not markup: an answer may hold brackets.
            why = g.fault or (g.grade.explanation if g.grade else "")
            table.add_row(str(g.row.line), reward, Text(why[:300]))
        console.print(table)


if __name__ == "__main__":
    run(main)
