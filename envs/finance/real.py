"""Real reports: TAT-QA and FinQA, their JSON files or data sets of the same rows, as documents and tasks.

The data sets give each question together with its report. Here the question stands alone and the report must be found,
so that only some of them can be kept. A question is a task when

1. its answer is one number, other than 0, and no bare year (two years lie within the numeric grader's 0.1 %), or yes
   or no by a FinQA program;
2. its derivation or program, where it has one, gives that answer; what it gives, not rounded further, is the gold;
3. it names enough to find its report: of all documents, a lexical search for the question ranks its own first, with a
   score at least a quarter above the second's;
4. no other question of the file that is left has the same words.

FinQA's file names tell company and year, and its questions are rewritten to begin with them; yes and no become 1 and 0,
and the question says so. TAT-QA names no company at all: its documents go by the uid of their table, its questions stay
as they are, and the tasks are split by document. FinQA's rows are also read as the hub has them: flat, the program
nested or in steps.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from envs.errors import ToolError, UserError
from envs.finance.asking import YES_NO_RULE
from envs.finance.calculate import calculate, format_number
from envs.finance.config import FinanceConfig
from envs.finance.program import ProgramError, execute, expression, parse, read_number, unnested
from envs.finance.search import BM25Index
from envs.rows import DatasetSource, FileOrDataset, read_dataset
from envs.types import Message, Task

PROMPT = (
    "Answer from the company reports with your tools. "
    "When you know the answer, reply with only the number and its unit."
)
MIN_LEAD = 1.25
_YEAR = re.compile(r"(?:19|20)[0-9]{2}")
_SCALES = ("", "thousand", "million", "billion", "percent")


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _TatTable(_Row):
    uid: str = Field(min_length=1)
    table: list[list[str]]


class _TatParagraph(_Row):
    order: int
    text: str


class _TatQuestion(_Row):
    uid: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: list[str] | str | int | float
    derivation: str = ""
    answer_type: str
    scale: str = ""


class _TatContext(_Row):
    table: _TatTable
    paragraphs: list[_TatParagraph]
    questions: list[_TatQuestion]


class _FinQA(_Row):
    question: str = Field(min_length=1)
    program: str = Field(min_length=1)
    exe_ans: float | str | None
    """What the program gives, to five places. None in a flat row, which has only what was written as the answer."""
    answer: str = ""


class _FinContext(_Row):
    id: str = Field(min_length=1)
    filename: str = Field(pattern=r"^[^/]+/[0-9]{4}/[^/]+$")
    pre_text: list[str]
    post_text: list[str]
    table: list[list[str]]
    qa: _FinQA

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_file(cls, row: Any) -> Any:
        """A flat row as the file has it."""
        if not isinstance(row, dict) or "program_re" not in row:
            return row
        qa = {
            "question": row.get("question"),
            "program": unnested(str(row["program_re"])),
            "exe_ans": None,
            "answer": row.get("answer") or row.get("final_result"),
        }
        return {**row, "filename": str(row.get("id")).rpartition("-")[0], "qa": qa}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """An answer that the numeric grader can compare."""

    text: str
    program: str = ""
    expression: str = ""
    """The program as the calculate tool takes it; empty where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A question whose answer is a number."""

    uid: str
    question: str
    kind: str
    path: str
    group: str
    """Tasks of one group are in the same split: a company, or a document where no company is known."""
    gold: Gold


def load_real(config: FinanceConfig) -> tuple[dict[str, str], dict[str, tuple[Task, ...]]]:
    """Documents by path, and tasks by split. Raises `UserError` naming file and key."""
    assert config.path is not None, "the config refuses a real source without its file"
    texts, candidates = _read_tatqa(config.path) if config.source == "tatqa" else _read_finqa(config.path)
    kept = _answerable(texts, candidates)
    groups = sorted({c.group for c in kept})
    random.Random(f"{config.seed}/split").shuffle(groups)
    held_out = set(groups[: min(max(1, round(config.eval_share * len(groups))), len(groups) - 1)])
    tasks = {}
    for split, most in (("train", config.num_train_tasks), ("eval", config.num_eval_tasks)):
        mine = [c for c in kept if (c.group in held_out) == (split == "eval")]
        if not mine:
            raise UserError(f"{config.path}: too few questions name their report: none is left for the {split} split")
        random.Random(f"{config.seed}/tasks/{split}").shuffle(mine)
        tasks[split] = tuple(_task(c, config.source) for c in mine[:most])
    return texts, tasks


def _answerable(texts: Mapping[str, str], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Rules 3 and 4."""
    index = BM25Index(texts)
    found = []
    for c in candidates:
        hits = index.scored(c.question, 2)
        if hits and hits[0][0] == c.path and (len(hits) == 1 or hits[0][1] >= MIN_LEAD * hits[1][1]):
            found.append(c)
    times = Counter(c.question.casefold() for c in found)
    return [c for c in found if times[c.question.casefold()] == 1]


def _task(c: Candidate, source: str) -> Task:
    item: dict[str, Any] = {
        "answer": c.gold.text,
        "kind": c.kind,
        "companies": [c.group] if source == "finqa" else [],
        "paths": [c.path],
        "program": c.gold.program,
        "expression": c.gold.expression,
        "queries": [c.question],
        "evidence": [],
    }
    messages = (Message(role="system", content=PROMPT), Message(role="user", content=c.question))
    return Task(task_id=f"{source}/{c.uid}", messages=messages, item=item)


def _read_tatqa(source: FileOrDataset) -> tuple[dict[str, str], list[Candidate]]:
    texts, candidates = {}, []
    for context in _parse(source, _TAT_FILE):
        document = f"tatqa/{context.table.uid}.txt"
        paragraphs = [p.text for p in sorted(context.paragraphs, key=lambda p: p.order)]
        texts[document] = _document(paragraphs, context.table.table, [])
        for q in context.questions:
            gold = _tatqa_gold(q)
            if gold is not None:
                question = " ".join(q.question.split())
                candidates.append(
                    Candidate(
                        uid=q.uid,
                        question=question,
                        kind=q.answer_type,
                        path=document,
                        group=context.table.uid,
                        gold=gold,
                    )
                )
    return texts, candidates


def _tatqa_gold(q: _TatQuestion) -> Gold | None:
    """Rules 1 and 2. The derivation is arithmetic, of a percentage mostly without the factor of 100."""
    answer = q.answer[0] if isinstance(q.answer, list) and len(q.answer) == 1 else q.answer
    if isinstance(answer, list) or q.scale not in _SCALES:
        return None
    shown = " ".join(str(answer).split())
    value = read_number(shown)
    if value is None or value == 0 or (_YEAR.fullmatch(shown) and not q.scale):
        return None
    value = value * 100 if "%" in shown else value
    unit = "%" if "%" in shown or q.scale == "percent" else f" {q.scale}" if q.scale else ""
    if q.answer_type != "arithmetic":
        return Gold(text=f"{value:f}{unit}")
    for arithmetic in (q.derivation, f"({q.derivation}) * 100"):
        try:
            computed = calculate(_plain(arithmetic))
        except ToolError:
            continue
        if _rounds_to(Decimal(computed), value):
            return Gold(text=f"{computed}{unit}", program=q.derivation, expression=_plain(arithmetic))
    return None


def _plain(derivation: str) -> str:
    """Arithmetic as the calculate tool reads it: brackets and signs of one kind, no currency."""
    text = derivation.translate(str.maketrans("[]{}\u2013\u2212\u00d7", "()()--*"))
    return re.sub(r"[$£€]", "", text)


def _rounds_to(exact: Decimal, shown: Decimal) -> bool:
    decimals = -int(shown.as_tuple().exponent)
    return abs(exact - shown) <= Decimal("0.51").scaleb(-max(0, decimals))


def _read_finqa(source: FileOrDataset) -> tuple[dict[str, str], list[Candidate]]:
    texts: dict[str, str] = {}
    candidates = []
    for context in _parse(source, _FIN_FILE):
        company, year, page = context.filename.split("/")
        document = f"{company}/{year}/{page.removesuffix('.pdf')}.txt"
        body = _document(context.pre_text, context.table, context.post_text)
        texts[document] = f"{company} {year} annual report\n\n{body}"
        gold = _finqa_gold(context)
        if gold is not None:
            question = f"In the {year} annual report of {company}, {' '.join(context.qa.question.split())}"
            # The kind is the last operation, the one that gives the answer.
            kind = parse(context.qa.program)[-1].op
            question += f" {YES_NO_RULE}" if kind == "greater" else ""
            candidates.append(
                Candidate(uid=context.id, question=question, kind=kind, path=document, group=company, gold=gold)
            )
    return texts, candidates


def _finqa_gold(context: _FinContext) -> Gold | None:
    """Rules 1 and 2. A ratio that the data set shows as a percentage is one."""
    qa = context.qa
    rows = {row[0]: numbers for row in context.table if row and (numbers := _numbers(row[1:]))}
    try:
        result = execute(qa.program, rows)
        computed = expression(qa.program, rows)
    except ProgramError:
        return None
    stated = qa.answer if qa.exe_ans is None else str(qa.exe_ans)
    if isinstance(result, bool):
        said = {"yes": True, "no": False}.get(stated.strip().lower())
        return Gold(text=str(int(result)), program=qa.program) if said is result else None
    if not (_is_shown_as if qa.exe_ans is None else _is_to_five_places)(result, stated):
        return None
    shown = read_number(qa.answer)
    is_percentage = qa.answer.strip().endswith("%") and shown is not None
    # Most programs give the ratio, some multiply by 100 themselves.
    is_ratio = shown is not None and is_percentage and abs(shown - result) <= abs(shown * 100 - result)
    number = format_number(result * 100 if is_ratio else result)
    if number == "0" or _YEAR.fullmatch(number):
        return None
    if computed is not None and is_ratio:
        computed = f"({computed}) * 100"
    return Gold(text=f"{number}%" if is_percentage else number, program=qa.program, expression=computed or "")


def _is_to_five_places(result: Decimal, text: str) -> bool:
    number = read_number(text)
    return number is not None and abs(result - number) <= Decimal("0.00002") + abs(number) * Decimal("0.00001")


def _is_shown_as(result: Decimal, text: str) -> bool:
    """Rounded as the text is; a percentage may be meant by the ratio."""
    text = text.strip()
    number = read_number(text.removesuffix("%"))
    readings = (result, result * 100) if text.endswith("%") else (result,)
    return number is not None and any(_rounds_to(reading, number) for reading in readings)


def _numbers(cells: Sequence[str]) -> list[Decimal]:
    """The numbers of a table's row; FinQA writes a negative as `-12.5 ( 12.5 )` and `$ 9.4`."""
    found = (
        read_number(re.sub(r"\s*\(\s*[0-9.,]+\s*%?\s*\)$", "", c) if c.strip().startswith("-") else c) for c in cells
    )
    return [number for number in found if number is not None]


def _document(before: Sequence[str], table: Sequence[Sequence[str]], behind: Sequence[str]) -> str:
    """Paragraphs and the table between them; one blank line between blocks, one line for each paragraph and row."""
    rows = "\n".join(" | ".join(" ".join(cell.split()) for cell in row) for row in table)
    blocks = [*(" ".join(p.split()) for p in before), rows, *(" ".join(p.split()) for p in behind)]
    return "\n\n".join(block for block in blocks if block)


_TAT_FILE = TypeAdapter(list[_TatContext])
_FIN_FILE = TypeAdapter(list[_FinContext])


def _parse(source: FileOrDataset, kind: TypeAdapter[list[Any]]) -> list[Any]:
    """The entries of the file or data set. Raises `UserError` naming it and the key."""
    try:
        if isinstance(source, DatasetSource):
            return kind.validate_python(read_dataset(source, key="world.path"))
        return kind.validate_json(source.read_bytes())
    except OSError as e:
        raise UserError(f"world.path: {source}: {e.strerror or e}") from None
    except ValidationError as e:
        fault = e.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
        raise UserError(f"{source}: {place or 'the file'}: {fault['msg']}") from None
