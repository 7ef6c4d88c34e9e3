"""TAT-QA: documents by the uid of their table; a question's gold is what its derivation gives."""

from __future__ import annotations

import re
from decimal import Decimal

from pydantic import Field, TypeAdapter

from envs.arithmetic import calculate
from envs.errors import ToolError
from envs.finance.program import read_number
from envs.finance.real.rows import YEAR, Candidate, Gold, SourceEntry, document, parse_rows, rounds_to
from envs.reading.rows import FileOrDataset

_SCALES = ("", "thousand", "million", "billion", "percent")


class _TatTable(SourceEntry):
    uid: str = Field(min_length=1)
    table: list[list[str]]


class _TatParagraph(SourceEntry):
    order: int
    text: str


class _TatQuestion(SourceEntry):
    uid: str = Field(min_length=1)
    question: str = Field(min_length=1)
    answer: list[str] | str | int | float
    derivation: str = ""
    answer_type: str
    scale: str = ""


class _TatContext(SourceEntry):
    table: _TatTable
    paragraphs: list[_TatParagraph]
    questions: list[_TatQuestion]


_FILE = TypeAdapter(list[_TatContext])


def read_tatqa(source: FileOrDataset) -> tuple[dict[str, str], list[Candidate]]:
    """Documents by path, and the questions that rules 1 and 2 of `kept` leave. Raises `UserError` naming the place."""
    texts, candidates = {}, []
    for context in parse_rows(source, _FILE):
        path = f"tatqa/{context.table.uid}.txt"
        paragraphs = [p.text for p in sorted(context.paragraphs, key=lambda p: p.order)]
        texts[path] = document(paragraphs, context.table.table, [])
        for q in context.questions:
            gold = _tatqa_gold(q)
            if gold is not None:
                question = " ".join(q.question.split())
                candidates.append(
                    Candidate(
                        uid=q.uid,
                        question=question,
                        kind=q.answer_type,
                        path=path,
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
    if value is None or value == 0 or (YEAR.fullmatch(shown) and not q.scale):
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
        if rounds_to(Decimal(computed), value):
            return Gold(text=f"{computed}{unit}", program=q.derivation, expression=_plain(arithmetic))
    return None


def _plain(derivation: str) -> str:
    """Arithmetic as the calculate tool reads it: brackets and signs of one kind, no currency."""
    text = derivation.translate(str.maketrans("[]{}\u2013\u2212\u00d7", "()()--*"))
    return re.sub(r"[$£€]", "", text)
