"""A table, for the terminal, as Markdown, and (by the macro `grid` of the templates) on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

_COLOURS = {"better": "green", "worse": "red", "": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Its first cell is its name."""

    cells: Sequence[str]
    verdicts: Sequence[str] = ()
    """By cell: `better`, `worse` or nothing; empty where the row has none."""
    links: Sequence[tuple[str, str]] = ()
    """(text, address) behind its name, on a page."""
    key: str = ""
    """The measure's name in metrics.jsonl, for those who read the page by a program."""

    @property
    def judged(self) -> list[tuple[str, str]]:
        """Each cell with its verdict."""
        return list(zip(self.cells, self.verdicts or [""] * len(self.cells), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Names on the left, figures on the right."""

    id: str
    rows: Sequence[Row]
    title: str = ""
    headers: Sequence[str] = ()
    """Empty for a list of facts that needs none."""
    has_remarks: bool = False
    """The last column holds words."""


def facts(id: str, rows: Sequence[Sequence[str]], *, headers: Sequence[str] = (), has_remarks: bool = False) -> Grid:
    """A table of plain cells."""
    return Grid(id=id, headers=headers, rows=[Row(cells=cells) for cells in rows], has_remarks=has_remarks)


def to_terminal(grid: Grid) -> Table:
    """For rich to print."""
    table = Table(
        title=grid.title or None,
        title_justify="left",
        box=None,
        show_header=bool(grid.headers),
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    num_columns = len(grid.headers) or max((len(row.cells) for row in grid.rows), default=0)
    for i in range(num_columns):
        is_words = i == 0 or (grid.has_remarks and i == num_columns - 1)
        table.add_column(
            Text(grid.headers[i]) if grid.headers else "",
            justify="left" if is_words else "right",
            style="dim" if i and is_words else "",
            overflow="fold",
        )
    for row in grid.rows:
        table.add_row(*(Text(cell, style=_COLOURS[verdict]) for cell, verdict in row.judged))
    return table


def to_markdown(grid: Grid) -> str:
    """For README and RESULTS: the title, if there is one, in bold above."""
    lines = [f"**{escaped(grid.title)}**", ""] if grid.title else []
    lines += [_line(grid.headers), "|---|" + "---:|" * (len(grid.headers) - 1)]
    return "\n".join([*lines, *(_line(row.cells) for row in grid.rows)]) + "\n"


def escaped(text: str) -> str:
    """A cell's or a line's text, in which nothing is Markdown's."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;").replace("  ", "&nbsp;&nbsp;")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"
