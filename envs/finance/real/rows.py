"""What both real sources are read into: documents, and questions whose answer is a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from envs.errors import UserError
from envs.reading.rows import DatasetSource, FileOrDataset, read_dataset

YEAR = re.compile(r"(?:19|20)[0-9]{2}")


class SourceEntry(BaseModel):
    """An entry of a source, or a part of one; keys that are not used here are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


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


def document(before: Sequence[str], table: Sequence[Sequence[str]], behind: Sequence[str]) -> str:
    """Paragraphs and the table between them; one blank line between blocks, one line for each paragraph and row."""
    rows = "\n".join(" | ".join(" ".join(cell.split()) for cell in row) for row in table)
    blocks = [*(" ".join(p.split()) for p in before), rows, *(" ".join(p.split()) for p in behind)]
    return "\n\n".join(block for block in blocks if block)


def rounds_to(exact: Decimal, shown: Decimal) -> bool:
    """Whether it is what a source shows, rounded to the places shown."""
    decimals = -int(shown.as_tuple().exponent)
    return abs(exact - shown) <= Decimal("0.51").scaleb(-max(0, decimals))


def parse_rows(source: FileOrDataset, kind: TypeAdapter[list[Any]]) -> list[Any]:
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
