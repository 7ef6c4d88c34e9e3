"""Facts of full reports: numbers and where they stand, and the questions that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from envs.finance.full.reports import FullReport
from envs.finance.full.tables import TableRow, rows_of
from envs.finance.program import read_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A number and where it stands."""

    path: str
    line: str
    """The line of the document that shows it, whole."""
    cell: str
    """The number as it is written there."""
    unit: str

    @property
    def number(self) -> Decimal:
        """The number that is meant; per cent as it is written."""
        value = read_number(self.cell)
        assert value is not None, self.cell
        return value

    @property
    def plain(self) -> str:
        """As a program writes it."""
        return f"{self.number:f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question, not yet answered."""

    text: str
    program: str
    unit: str
    """The answer's: `million`, `thousand`, `percent` (the program's result times 100), `dollars` or `` for none."""
    facts: Sequence[Fact]
    about: Sequence[str]
    """Labels of the lines that it asks about."""
    reports: Sequence[FullReport]
    rows: Mapping[str, Sequence[Decimal]] = field(default_factory=dict)
    """What the program's table operations read."""


class OpenReport:
    """A report with its rows at hand."""

    def __init__(self, report: FullReport) -> None:
        self.report = report
        self.sections = report.sections()
        self._rows: dict[str, TableRow] = {}
        for _, _, row in rows_of(self.sections):
            self._rows.setdefault(row.label, row)

    def has(self, label: str) -> bool:
        return label in self._rows

    def fact(self, label: str, column: int = 0) -> Fact:
        """A cell of a row; columns of a statement are this year (0) and the year before (1)."""
        return self.cell(self._rows[label], column)

    def cell(self, row: TableRow, column: int) -> Fact:
        return Fact(path=self.report.path, line=row.text, cell=row.cells[column], unit=row.unit)

    def pair(self, label: str) -> tuple[Fact, Fact]:
        return self.fact(label, 0), self.fact(label, 1)

    def told(self, label: str, cell: str) -> Fact:
        """A number that stands in the text."""
        lines = [p for s in self.sections for p in s.paragraphs if cell in p and label.lower() in p.lower()]
        return Fact(path=self.report.path, line=lines[0], cell=cell, unit="count")

    def labels(self, title: str, table: int = 0) -> list[str]:
        """Labels of a table's lines whose numbers are all above 0; none where the report has no such section."""
        found = [s for s in self.sections if s.title == title]
        rows = found[0].tables[table].rows if found else ()
        return [row.label for row in rows if all((read_number(c) or 0) > 0 for c in row.cells)]
