"""Questions about the corpus, each with its gold answer, program and the reports that hold the facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from envs.arithmetic import calculate
from envs.errors import UserError
from envs.finance.brief.reports import TABLE_METRICS, TEXT_METRIC, Corpus, Report
from envs.finance.companies import share_out
from envs.finance.config import FinanceConfig, Kind
from envs.types import Message, Task

SYSTEM_PROMPT = (
    "Answer from the company reports. For a year, its own report counts. "
    "When you know the answer, reply with only the number and its unit."
)
_UNIT_DOLLARS = {"thousand": 1000, "million": 1_000_000}


def make_tasks(config: FinanceConfig, corpus: Corpus, split: str) -> tuple[Task, ...]:
    """The tasks of `train` or `eval`, in a fixed order, all different.

    The kinds are shared out by `question_mix`. Raises `UserError` when the corpus is too small for the number asked.
    """
    num_tasks = config.num_train_tasks if split == "train" else config.num_eval_tasks
    rng = random.Random(f"{config.seed}/tasks/{split}")
    reports = [r for r in corpus.reports.values() if corpus.split_of(r.company) == split]
    tasks: list[Task] = []
    for kind, num in share_out(config.question_mix, num_tasks).items():
        candidates = list(_CANDIDATES[kind](reports, rng)) if num else []
        if len(candidates) < num:
            raise UserError(
                f"finance: the {split} split needs {num} questions of kind {kind!r}, its {len(reports)} reports give "
                f"{len(candidates)}; raise num_companies or num_years, or lower num_{split}_tasks"
            )
        tasks += rng.sample(candidates, num)
    rng.shuffle(tasks)
    return tuple(tasks)


def _values(reports: list[Report], rng: random.Random) -> Iterator[Task]:
    for r in reports:
        for metric in TABLE_METRICS:
            now, _ = r.figures[metric]
            question = f"What was the {metric} of {r.company.name} in {r.year}?"
            yield _task("value", [r], metric, question, f"{now} {r.company.unit}", facts=[now])
        question = f"How many employees did {r.company.name} have in {r.year}?"
        yield _task("value", [r], TEXT_METRIC, question, str(r.employees), facts=[Decimal(r.employees)])


def _changes(reports: list[Report], rng: random.Random) -> Iterator[Task]:
    for r in reports:
        for metric, (now, before) in r.figures.items():
            question = (
                f"In its {r.year} report, by how much did the {metric} of {r.company.name} change from {r.year - 1}?"
            )
            program = f"{now} - {before}"
            answer = f"{calculate(program)} {r.company.unit}"
            if now != before:
                yield _task("change", [r], metric, question, answer, facts=[now, before], program=program)


def _percentages(reports: list[Report], rng: random.Random) -> Iterator[Task]:
    for r in reports:
        for metric, (now, before) in r.figures.items():
            question = (
                f"In its {r.year} report, by what percentage did the {metric} of {r.company.name} "
                f"change from {r.year - 1}?"
            )
            program = f"({now} - {before}) / {before} * 100"
            answer = f"{calculate(program)}%"
            if now != before:
                yield _task("percentage", [r], metric, question, answer, facts=[now, before], program=program)


def _comparisons(reports: list[Report], rng: random.Random) -> Iterator[Task]:
    """Each report against another company's of the same year and split, the larger one named first."""
    by_year: dict[int, list[Report]] = {}
    for r in reports:
        by_year.setdefault(r.year, []).append(r)
    seen: set[str] = set()
    for r in reports:
        for metric in TABLE_METRICS:
            other = rng.choice(by_year[r.year])
            high, low = sorted((r, other), key=lambda x: _dollars(x, metric), reverse=True)
            if _dollars(high, metric) == _dollars(low, metric):
                continue
            task = _comparison(high, low, metric)
            if task.task_id not in seen:
                seen.add(task.task_id)
                yield task


def _comparison(high: Report, low: Report, metric: str) -> Task:
    facts = [high.figures[metric][0], low.figures[metric][0]]
    question = (
        f"How much higher was the {metric} of {high.company.name} than that of {low.company.name} in {high.year}?"
    )
    program = f"{facts[0]} - {facts[1]}"
    # Amounts in millions exceed those in thousands in this corpus, so the unit of the answer is the larger one.
    program += " / 1000" if high.company.unit != low.company.unit else ""
    answer = f"{calculate(program)} {high.company.unit}"
    return _task("comparison", [high, low], metric, question, answer, facts=facts, program=program)


def _dollars(report: Report, metric: str) -> Decimal:
    return report.figures[metric][0] * _UNIT_DOLLARS[report.company.unit]


_CANDIDATES: dict[Kind, Callable[[list[Report], random.Random], Iterator[Task]]] = {
    "value": _values,
    "change": _changes,
    "percentage": _percentages,
    "comparison": _comparisons,
}


def _task(
    kind: Kind,
    reports: list[Report],
    metric: str,
    question: str,
    answer: str,
    *,
    facts: list[Decimal],
    program: str = "",
) -> Task:
    item: dict[str, Any] = {
        "answer": answer,
        "kind": kind,
        "metric": metric,
        "companies": [r.company.name for r in reports],
        "year": reports[0].year,
        "paths": [r.path for r in reports],
        "facts": [str(f) for f in facts],
        "program": program,
    }
    return Task(
        task_id="/".join([kind, *(r.company.folder for r in reports), str(reports[0].year), metric]),
        messages=(Message(role="system", content=SYSTEM_PROMPT), Message(role="user", content=question)),
        item=item,
    )
