"""Tasks about full reports: each question with the gold answer that its program gives, and what the expert needs."""

from __future__ import annotations

import random
from decimal import Decimal

from envs.arithmetic import format_number
from envs.errors import UserError
from envs.finance.companies import share_out
from envs.finance.config import FinanceConfig
from envs.finance.full.corpus import FullCorpus
from envs.finance.full.facts import Question
from envs.finance.full.questions import ASK, Asker
from envs.finance.program import execute, expression
from envs.types import Message, Task

FULL_PROMPT = (
    "Answer from the company reports with your tools. Only annual reports count: drafts and press releases do not. "
    "When you know the answer, reply with only the number and its unit."
)
_MAX_DRAWS = 40
"""Reports drawn for each question wanted, before the corpus counts as too small."""


def make_full_tasks(config: FinanceConfig, corpus: FullCorpus, split: str) -> tuple[Task, ...]:
    """The tasks of `train` or `eval`, in a fixed order, all different.

    The kinds are shared out by `question_mix`. Raises `UserError` when the corpus is too small for the number asked.
    """
    num_tasks = config.num_train_tasks if split == "train" else config.num_eval_tasks
    rng = random.Random(f"{config.seed}/tasks/{split}")
    reports = [r for r in corpus.reports.values() if corpus.split_of(r.company) == split]
    asker = Asker(reports, rng)
    tasks: list[Task] = []
    for kind, num in share_out(config.question_mix, num_tasks).items():
        found: dict[str, Task] = {}
        for _ in range(_MAX_DRAWS * num):
            question = ASK[kind](asker, asker.open(rng.choice(reports)))
            task = full_task(kind, question) if question else None
            if task is not None:
                found.setdefault(task.task_id, task)
            if len(found) == num:
                break
        if len(found) < num:
            raise UserError(
                f"finance: the {split} split needs {num} questions of kind {kind!r}, its {len(reports)} reports gave "
                f"{len(found)}; raise num_companies or num_years, or lower num_{split}_tasks"
            )
        tasks += found.values()
    rng.shuffle(tasks)
    return tuple(tasks)


def full_task(kind: str, question: Question) -> Task | None:
    """The question as a task, its gold answer computed by its program; None where that shows as 0."""
    first = question.reports[0]
    answer = gold_text(execute(question.program, question.rows), question.unit)
    computed = expression(question.program, question.rows)
    if question.unit == "percent" and computed is not None:
        computed = f"({computed}) * 100"
    if kind != "greater" and not any(digit in answer for digit in "123456789"):
        return None
    labels = "+".join(question.about)
    companies = list(dict.fromkeys(r.company for r in question.reports))
    item = {
        "answer": answer,
        "kind": kind,
        "companies": [c.name for c in companies],
        "year": first.year,
        "paths": list(dict.fromkeys(r.path for r in question.reports)),
        "facts": [fact.cell for fact in question.facts],
        "program": question.program,
        "expression": computed or "",
        "rows": {label: [f"{n:f}" for n in numbers] for label, numbers in question.rows.items()},
        "unit": question.unit,
        "queries": [f"{r.company.name} {r.year} annual report {question.about[0]}" for r in question.reports],
        "evidence": [list(x) for x in dict.fromkeys((fact.path, fact.line) for fact in question.facts)],
    }
    return Task(
        task_id="/".join([kind, *(c.folder for c in companies), str(first.year), labels.replace("/", " ")]),
        messages=(Message(role="system", content=FULL_PROMPT), Message(role="user", content=question.text)),
        item=item,
    )


def gold_text(result: Decimal | bool, unit: str) -> str:
    """A program's result as the answer to its question; yes and no become 1 and 0."""
    if isinstance(result, bool):
        return str(int(result))
    number = format_number(result * 100 if unit == "percent" else result)
    match unit:
        case "percent":
            return f"{number}%"
        case "dollars":
            return f"-${number[1:]}" if number.startswith("-") else f"${number}"
        case _:
            return f"{number} {unit}".strip()
