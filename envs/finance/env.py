"""The tools of the finance world and the environment of one episode."""

from __future__ import annotations

from collections.abc import Mapping

from envs.errors import ToolError
from envs.finance import calculate as arithmetic
from envs.finance.search import SearchIndex
from envs.tools import Tool, tool
from envs.types import Episode, Task

MAX_LISTED = 20
"""Names that one listing shows; the top folder of a large corpus would fill the context."""


def make_tools(
    texts: Mapping[str, str], index: SearchIndex, *, search_hits: int, with_calculate: bool
) -> dict[str, Tool]:
    """The tools by name, over the texts by path. They keep no state: all episodes of a world share them."""
    folders: dict[str, list[str]] = {}
    for path in texts:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)

    @tool
    def search(query: str) -> str:
        """Find report paths.

        Args:
            query: company, year, topic
        """
        hits = index.search(query, search_hits)
        return "\n".join(hits) if hits else "no report found"

    @tool
    def list(path: str) -> str:
        """List a folder.

        Args:
            path: folder, or / for all
        """
        folder = path.strip().strip("/")
        names = folders if folder in ("", ".") else folders.get(folder)
        if names is None:
            raise ToolError(f"no folder {_short(path)}")
        shown = [name for name, _ in zip(sorted(names), range(MAX_LISTED), strict=False)]
        more = len(names) - len(shown)
        return " ".join(shown) + (f" and {more} more" if more else "")

    @tool
    def cat(path: str) -> str:
        """Read a report.

        Args:
            path: report path
        """
        text = texts.get(path.strip().lstrip("/"))
        if text is None:
            raise ToolError(f"no report {_short(path)}")
        return text

    @tool
    def calculate(expression: str) -> str:
        """Do arithmetic.

        Args:
            expression: numbers and + - * / ( )
        """
        return arithmetic.calculate(expression)

    return {t.name: t for t in ((search, list, cat, calculate) if with_calculate else (search, list, cat))}


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


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
