"""Whether a grader scores answers right whose score is known, and whether a judge agrees with the numeric grader.

    python scripts/bench/grader_agreement.py [--base-url http://localhost:8000/v1 --model NAME] [--errors 10]

The answers are made of the finance world's gold ones by stated rules (`labelled_answers.py`), with the label 1, 0.5 or
0 that each rule implies. The numeric grader scores all of them. With `--base-url` so does a `score_model` judge on that
server (any that speaks OpenAI's protocol), by `--grader`. A judge's number counts as the nearest of 1, 0.5 and 0.

kappa        Cohen's, over the three classes: 1 is full agreement, 0 what chance alone gives.
commonest    what a grader would reach that always gave the commonest label.

An answer of the judge that can't be read counts 0, as in training; `where read` leaves those out. One that never came
is left out everywhere.
*Not covered*: answers as a model writes them, with reasoning and mistakes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import ROOT, environment, run_main
from labelled_answers import RULES, LabelledAnswer, labelled_answers
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from envs.errors import UserError, WorldError
from envs.finance.config import FinanceConfig
from envs.finance.contents import load_contents
from envs.types import Episode, Message, StopReason, Turn
from envs.validation import validation_problems
from graders.build import build_grader
from graders.judges.base import JudgeConfig
from graders.judges.cache import CachedJudge
from graders.judges.model_graders import ScoreModelConfig
from graders.judges.openai_judge import build_judge
from graders.penalties import PenaltiesConfig
from graders.rules.numeric import NumericConfig
from graders.types import Grade, Grader, GraderErrorKind

CLASSES = (1.0, 0.5, 0.0)
_TASKS_PER_ANSWER = 40
"""Questions drawn for each answer of a rule: one in ten has a negative gold, which a rule needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A labelled answer with what the graders give it."""

    row: LabelledAnswer
    numeric: Grade
    judge: Grade | None
    """None where no judge was asked, or none answered."""

    def score(self, who: str) -> float | None:
        """What `label`, `numeric` or `judge` says."""
        if who == "label":
            return self.row.label
        grade = self.numeric if who == "numeric" else self.judge
        return None if grade is None else grade.reward


def class_of(score: float) -> float:
    """The nearest class; the lower one of two."""
    return min(CLASSES, key=lambda c: (abs(c - score), c))


def classes_of(scored: Sequence[Scored], first: str, second: str) -> list[tuple[float, float]]:
    """Both classes of each answer that both have scored."""
    pairs = ((s.score(first), s.score(second)) for s in scored)
    return [(class_of(a), class_of(b)) for a, b in pairs if a is not None and b is not None]


def agreement(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Share of equal classes and Cohen's kappa, (observed - chance) / (1 - chance); None where that has no value."""
    if not pairs:
        return {"n": 0, "share": None, "kappa": None}
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(first[c] * second[c] for c in CLASSES) / n**2
    return {"n": n, "share": observed, "kappa": (observed - chance) / (1 - chance) if chance < 1 else None}


def confusion(pairs: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Rows: classes of the first; columns: classes of the second; both 1, 0.5, 0."""
    counts = Counter(pairs)
    return [[counts[a, b] for b in CLASSES] for a in CLASSES]


def rule_figures(scored: Sequence[Scored], rule: str, who: str) -> dict[str, float | None]:
    """Mean score of one rule's answers, and the share whose class is the label."""
    mine = [s for s in scored if s.row.rule == rule]
    scores = [score for s in mine if (score := s.score(who)) is not None]
    return {"mean": fmean(scores) if scores else None, "right": agreement(classes_of(mine, "label", who))["share"]}


# ---- grading


def episode_of(answer: str) -> Episode:
    last = Message(role="assistant", content=answer)
    return Episode(
        rollout_id="labelled",
        task_id="labelled",
        messages=(last,),
        turns=(Turn(message=last),),
        stop_reason=StopReason.ANSWERED,
    )


async def grade_all(grader: Grader, rows: Sequence[LabelledAnswer]) -> tuple[list[Grade | None], list[str]]:
    """A grade for each row, None where the judge could not be reached, and what was said then."""
    faults: list[str] = []

    async def one(row: LabelledAnswer) -> Grade | None:
        try:
            return await grader.grade(row.task, episode_of(row.answer))
        except WorldError as e:
            faults.append(str(e))
            return None

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(row)) for row in rows]
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    return [task.result() for task in running], faults


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRun:
    """What asking the judge gave and cost."""

    grades: Sequence[Grade | None]
    faults: Sequence[str]
    seconds: float
    tokens: int

    @property
    def errors(self) -> dict[str, int]:
        """By kind, those that never answered included."""
        counts = Counter(kind.value for grade in self.grades if grade for kind in grade.errors)
        if self.faults:
            counts[GraderErrorKind.MODEL_GRADER_SERVER.value] += len(self.faults)
        return dict(counts)


async def ask_judge(rows: Sequence[LabelledAnswer], config: ScoreModelConfig, judge_config: JudgeConfig) -> JudgeRun:
    judge = CachedJudge(build_judge(judge_config), judge_config.cache_size)
    start = time.perf_counter()
    try:
        grader = build_grader(config, PenaltiesConfig(), judge=judge, tasks=(row.task for row in rows))
        grades, faults = await grade_all(grader, rows)
    finally:
        await judge.aclose()
    tokens = sum(sum(grade.judge_tokens.values()) for grade in grades if grade)
    return JudgeRun(grades=grades, faults=faults, seconds=time.perf_counter() - start, tokens=tokens)


async def score(rows: Sequence[LabelledAnswer], judged: JudgeRun | None) -> list[Scored]:
    grader = build_grader(NumericConfig(type="numeric"), PenaltiesConfig(), tasks=(row.task for row in rows))
    numeric, _ = await grade_all(grader, rows)
    judge = judged.grades if judged else [None] * len(rows)
    scored = []
    for row, mine, its in zip(rows, numeric, judge, strict=True):
        assert mine is not None, "the numeric grader asks nobody"
        scored.append(Scored(row=row, numeric=mine, judge=its))
    return scored


# ---- what is told


def figures_of(scored: Sequence[Scored], judged: JudgeRun | None) -> dict[str, Any]:
    """All figures, as they are written."""
    graders = ("numeric", "judge") if judged else ("numeric",)
    pairs = [("label", who) for who in graders] + ([("numeric", "judge")] if judged else [])
    labels = Counter(s.row.label for s in scored)
    found = {f"{a} / {b}": classes_of(scored, a, b) for a, b in pairs}
    if judged:
        read = [s for s in scored if s.judge and not s.judge.errors]
        found["label / judge, where read"] = classes_of(read, "label", "judge")
    figures: dict[str, Any] = {
        "answers": len(scored),
        "labels": {f"{c:g}": labels[c] for c in CLASSES},
        "commonest": max(labels.values()) / len(scored),
        "rules": [
            {"rule": rule, "label": label, "n": n, **{who: rule_figures(scored, rule, who) for who in graders}}
            for rule, (label, _) in RULES.items()
            if (n := sum(s.row.rule == rule for s in scored))
        ],
        "agreement": {name: agreement(classes) for name, classes in found.items()},
        "confusion": {f"{a} / {b}": confusion(found[f"{a} / {b}"]) for a, b in pairs},
    }
    if judged:
        figures["judge"] = {
            "errors": judged.errors,
            "faults": sorted(set(judged.faults)),
            "tokens": judged.tokens,
            "seconds": judged.seconds,
        }
    return figures


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _shown(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def print_figures(console: Console, figures: dict[str, Any]) -> None:
    graders = [who for who in ("numeric", "judge") if who in figures["rules"][0]]
    rules = _table("answer", "label", "n", *(text for who in graders for text in (who, "right")))
    for row in figures["rules"]:
        cells = [_shown(row[who][what], form) for who in graders for what, form in (("mean", ".2f"), ("right", ".0%"))]
        rules.add_row(row["rule"], f"{row['label']:g}", str(row["n"]), *cells)
    console.print(rules)
    console.print()
    pairs = _table("pair", "n", "agree", "kappa")
    for name, found in figures["agreement"].items():
        pairs.add_row(name, str(found["n"]), _shown(found["share"], ".1%"), _shown(found["kappa"], ".3f"))
    pairs.add_row("commonest label", str(figures["answers"]), _shown(figures["commonest"], ".1%"), _shown(0.0, ".3f"))
    console.print(pairs)
    for name, counts in figures["confusion"].items():
        first, second = name.split(" / ")
        console.print()
        table = _table(first, *(f"{second} {c:g}" for c in CLASSES))
        for c, row in zip(CLASSES, counts, strict=True):
            table.add_row(f"{c:g}", *map(str, row))
        console.print(table)
    if judge := figures.get("judge"):
        errors = ", ".join(f"{kind} {n}" for kind, n in judge["errors"].items()) or "none"
        console.print(f"\njudge: {judge['tokens']:,} tokens, {judge['seconds']:.1f} s, errors: {errors}")
        for fault in judge["faults"][:3]:
            console.print(f"  {fault}", markup=False)


def print_errors(console: Console, scored: Sequence[Scored], num: int) -> None:
    """The first answers that a grader scored otherwise than their label says."""
    wrong = [
        (s, who, grade)
        for s in scored
        for who, grade in (("numeric", s.numeric), ("judge", s.judge))
        if grade is not None and class_of(grade.reward) != s.row.label
    ]
    if num and wrong:
        console.print(f"\nscored otherwise than labelled: {len(wrong)}, of which the first {min(num, len(wrong))}")
    for s, who, grade in wrong[:num]:
        text = f"  {s.row.rule}: gold {s.row.task.item['answer']}, answer {s.row.answer}, label {s.row.label:g}\n"
        console.print(f"{text}    {who} {grade.reward:g}: {grade.explanation}", markup=False, soft_wrap=True)


def as_json(s: Scored) -> dict[str, Any]:
    """One answer, as it is written."""
    return {
        "rule": s.row.rule,
        "task_id": s.row.task.task_id,
        "gold": s.row.task.item["answer"],
        "answer": s.row.answer,
        "label": s.row.label,
        "numeric": s.numeric.reward,
        "judge": s.judge and {"score": s.judge.reward, "errors": s.judge.errors, "explanation": s.judge.explanation},
    }


# ---- what the user gives


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-rule", type=int, default=9, help="answers made by each rule (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="of the reports and the answers")
    parser.add_argument("--tatqa", type=Path, metavar="FILE", help="TAT-QA's JSON: its questions, not generated ones")
    parser.add_argument("--base-url", help="of the judge's server, with /v1")
    parser.add_argument("--model", help="the judge's name on its server; default: what the grader names")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable that holds the judge's key")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight (default 32)")
    parser.add_argument(
        "--grader", type=Path, default=ROOT / "configs" / "finance_judge.json", help="JSON, score_model"
    )
    parser.add_argument("--errors", type=int, default=0, metavar="N", help="show the first N wrong scores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures and answers there")
    arguments = parser.parse_args()
    for name in ("per_rule", "concurrency"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1 is needed")
    if arguments.model and not arguments.base_url:
        parser.error("--model needs --base-url")
    return arguments


def read_grader(path: Path) -> ScoreModelConfig:
    try:
        return ScoreModelConfig.model_validate_json(path.read_bytes())
    except OSError as e:
        raise UserError(f"--grader {path}: {e.strerror or e}") from e
    except ValidationError as e:
        raise UserError(validation_problems(f"--grader {path}", e, ScoreModelConfig)) from e


def world_of(arguments: argparse.Namespace) -> FinanceConfig:
    if arguments.tatqa:
        return FinanceConfig(source="tatqa", path=arguments.tatqa, seed=arguments.seed, num_train_tasks=10_000)
    num_tasks = _TASKS_PER_ANSWER * arguments.per_rule
    return FinanceConfig(style="full", num_companies=40, num_years=5, seed=arguments.seed, num_train_tasks=num_tasks)


def main() -> None:
    arguments = parse_arguments()
    rows = labelled_answers(load_contents(world_of(arguments)), per_rule=arguments.per_rule, seed=arguments.seed)
    judged = None
    if arguments.base_url:
        judge_config = JudgeConfig(
            base_url=arguments.base_url,
            model=arguments.model,
            api_key_env=arguments.key_env,
            max_concurrency=arguments.concurrency,
        )
        judged = asyncio.run(ask_judge(rows, read_grader(arguments.grader), judge_config))
    scored = asyncio.run(score(rows, judged))
    figures = figures_of(scored, judged)
    about = {"seed": arguments.seed, "questions": "TAT-QA" if arguments.tatqa else "generated"}
    setting = {**environment(), **about}
    console = Console(highlight=False)
    console.print("\nAgreement of graders")
    for key, value in {**setting, "answers": figures["answers"], "labels": figures["labels"]}.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"  {key}: {shown}", markup=False, soft_wrap=True)
    console.print()
    print_figures(console, figures)
    print_errors(console, scored, arguments.errors)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        written = {"title": "Agreement of graders", **setting, **figures, "rows": [as_json(s) for s in scored]}
        arguments.json.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_main(main))
