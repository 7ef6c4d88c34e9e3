"""FinQA: documents by the company and year of their file's name; a question's gold is what its program gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from pydantic import Field, TypeAdapter, model_validator

from envs.arithmetic import format_number
from envs.finance.full.questions import YES_NO_RULE
from envs.finance.program import ProgramError, execute, expression, parse, read_number, unnested
from envs.finance.real.rows import YEAR, Candidate, Gold, SourceEntry, document, parse_rows, rounds_to
from envs.reading.rows import FileOrDataset


class _FinQA(SourceEntry):
    question: str = Field(min_length=1)
    program: str = Field(min_length=1)
    exe_ans: float | str | None
    """What the program gives, to five places. None in a flat row, which has only what was written as the answer."""
    answer: str = ""


class _FinContext(SourceEntry):
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


_FILE = TypeAdapter(list[_FinContext])


def read_finqa(source: FileOrDataset) -> tuple[dict[str, str], list[Candidate]]:
    """Documents by path, and the questions that rules 1 and 2 of `kept` leave. Raises `UserError` naming the place."""
    texts: dict[str, str] = {}
    candidates = []
    for context in parse_rows(source, _FILE):
        company, year, page = context.filename.split("/")
        path = f"{company}/{year}/{page.removesuffix('.pdf')}.txt"
        body = document(context.pre_text, context.table, context.post_text)
        texts[path] = f"{company} {year} annual report\n\n{body}"
        gold = _finqa_gold(context)
        if gold is not None:
            question = f"In the {year} annual report of {company}, {' '.join(context.qa.question.split())}"
            # The kind is the last operation, the one that gives the answer.
            kind = parse(context.qa.program)[-1].op
            question += f" {YES_NO_RULE}" if kind == "greater" else ""
            candidates.append(
                Candidate(uid=context.id, question=question, kind=kind, path=path, group=company, gold=gold)
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
    if number == "0" or YEAR.fullmatch(number):
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
    return number is not None and any(rounds_to(reading, number) for reading in readings)


def _numbers(cells: Sequence[str]) -> list[Decimal]:
    """The numbers of a table's row; FinQA writes a negative as `-12.5 ( 12.5 )` and `$ 9.4`."""
    found = (
        read_number(re.sub(r"\s*\(\s*[0-9.,]+\s*%?\s*\)$", "", c) if c.strip().startswith("-") else c) for c in cells
    )
    return [number for number in found if number is not None]
