"""What a full report is made of: sections of paragraphs and tables, and how their numbers are written."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One row of a table, its cells as they stand there."""

    label: str
    cells: tuple[str, ...]
    unit: str
    """`million`, `thousand`, `percent`, `dollars` or `count`."""

    @property
    def text(self) -> str:
        return " | ".join((self.label, *self.cells))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with its heading."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]

    @property
    def text(self) -> str:
        return "\n".join([" | ".join((self.heading, *self.columns)), *(row.text for row in self.rows)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A statement, a note or a chapter."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()

    def text(self, running_head: str) -> str:
        blocks = (*self.paragraphs, *(table.text for table in self.tables))
        return "\n\n".join([f"{running_head}: {self.title}", *blocks])


def amount(steps: int, unit: str) -> str:
    """`1,234.5`, `1,234`, and a negative amount in parentheses."""
    size = f"{abs(steps) / 10:,.1f}" if unit == "million" else f"{abs(steps):,}"
    return f"({size})" if steps < 0 else size


def cents(value: int) -> str:
    return f"({-value / 100:,.2f})" if value < 0 else f"{value / 100:,.2f}"


def per_mille(value: int) -> str:
    return f"({-value / 10:.1f}%)" if value < 0 else f"{value / 10:.1f}%"


def split(total: int, parts: int, rng: random.Random, spread: float = 0.5) -> list[int]:
    """Whole numbers that sum to the total, each near an equal part: off by about the spread."""
    weights = [rng.uniform(1 - spread, 1 + spread) for _ in range(parts)]
    shares = [int(total * weight / sum(weights)) for weight in weights[:-1]]
    return [*shares, total - sum(shares)]


def rows_of(sections: Sequence[Section]) -> Iterator[tuple[Section, Table, TableRow]]:
    """Every row of the tables, in the order of the document."""
    for section in sections:
        for table in section.tables:
            for row in table.rows:
                yield section, table, row
