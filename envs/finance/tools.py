"""The tools of the finance world and the environment of one episode."""

from __future__ import annotations

from collections.abc import Mapping

from envs import arithmetic
from envs.errors import ToolError
from envs.finance.config import FinanceConfig
from envs.finance.documents.paged import Documents
from envs.finance.documents.search import SearchIndex
from envs.text import quoted, shown
from envs.tools import Tool, tool
from envs.types import Episode, Task

MAX_LISTED = 20
"""Names that one listing shows; the top folder of a large corpus would fill the context."""
LISTED_A_PAGE = 50
_MOST_OF_A_LINE = 200
_MOST_OF_A_PATH = 60


def make_tools(documents: Documents, index: SearchIndex, config: FinanceConfig) -> dict[str, Tool]:
    """The tools by name. They keep no state: all episodes of a world share them."""

    @tool
    def calculate(expression: str) -> str:
        """Do arithmetic.

        Args:
            expression: numbers and + - * / ( )
        """
        return arithmetic.calculate(expression)

    tools = [
        _search(documents, index, config),
        *(_paged_reading(documents) if config.is_paged else _reading(documents)),
    ]
    return {t.name: t for t in ([*tools, calculate] if config.calculate else tools)}


def _search(documents: Documents, index: SearchIndex, config: FinanceConfig) -> Tool:
    shows, num_hits = config.search_shows, config.search_hits

    def show(path: str, query: str) -> str:
        if shows == "paths":
            return path
        number, line = documents.best_line(path, query)
        pages = documents.pages(path)
        head = f"{path} (page {number} of {len(pages)})"
        return f"{head}\n{pages[number - 1]}" if shows == "document" else f"{head}: {shown(line, _MOST_OF_A_LINE)}"

    @tool
    def search(query: str) -> str:
        """Find report paths.

        Args:
            query: company, year, topic
        """
        hits = index.search(query, 1 if shows == "document" else num_hits)
        return "\n".join(show(path, query) for path in hits) if hits else "no report found"

    return search


def _reading(documents: Documents) -> tuple[Tool, Tool]:
    """`list` and `cat` for short documents in few folders."""

    @tool
    def list(path: str) -> str:
        """List a folder.

        Args:
            path: folder, or / for all
        """
        names = _names(documents, path)
        shown = names[:MAX_LISTED]
        more = len(names) - len(shown)
        return " ".join(shown) + (f" and {more} more" if more else "")

    @tool
    def cat(path: str) -> str:
        """Read a report.

        Args:
            path: report path
        """
        return documents.texts[_known(documents, path)]

    return list, cat


def _paged_reading(documents: Documents) -> tuple[Tool, Tool]:
    """`list` and `cat` that show long folders and documents page by page."""

    @tool
    def list(path: str, page: int = 1) -> str:
        """List a folder.

        Args:
            path: folder, or / for all
            page: which page of a long list
        """
        names = _names(documents, path)
        num_pages = -(-len(names) // LISTED_A_PAGE)
        _check_page(path, page, num_pages)
        shown = " ".join(names[(page - 1) * LISTED_A_PAGE : page * LISTED_A_PAGE])
        return f"{shown}\n(page {page} of {num_pages})" if num_pages > 1 else shown

    @tool
    def cat(path: str, page: int = 1) -> str:
        """Read a report.

        Args:
            path: report path
            page: which page of a long report
        """
        pages = documents.pages(_known(documents, path))
        _check_page(path, page, len(pages))
        return f"{pages[page - 1]}\n(page {page} of {len(pages)})" if len(pages) > 1 else pages[0]

    return list, cat


def _names(documents: Documents, path: str) -> list[str]:
    folder = path.strip().strip("/")
    names = documents.names("" if folder == "." else folder)
    if names is None:
        raise ToolError(f"no folder {quoted(path, _MOST_OF_A_PATH)}")
    return [*names]


def _known(documents: Documents, path: str) -> str:
    known = path.strip().lstrip("/")
    if known not in documents.texts:
        raise ToolError(f"no report {quoted(path, _MOST_OF_A_PATH)}")
    return known


def _check_page(path: str, page: int, num_pages: int) -> None:
    if not 1 <= page <= num_pages:
        raise ToolError(f"{quoted(path, _MOST_OF_A_PATH)} has no page {page}, only 1 to {num_pages}")


class FinanceEnv:
    """One episode in the finance world. Reports are read-only, so nothing is prepared or released."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools
        self._rollout_id: str | None = None

    @property
    def tools(self) -> Mapping[str, Tool]:
        return self._tools

    async def open(self, task: Task, rollout_id: str) -> None:
        assert self._rollout_id is None, f"environment of {self._rollout_id} opened again for {rollout_id}"
        self._rollout_id = rollout_id

    async def close(self, episode: Episode | None) -> None:
        return None
