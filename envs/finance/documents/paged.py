"""The documents as the tools show them: folders, pages, and the line of a document that fits a query best."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from envs.finance.documents.search import words_of

_MAX_OCCURRENCES = 60
"""So many of one word in one document are looked at; a word that stands more often tells lines apart no better."""


def paginate(text: str, page_chars: int) -> tuple[str, ...]:
    """The text cut into pages of at most `page_chars`: between blocks where it can be, else between lines.

    A line that is longer than a page by itself is cut where the page ends. The pages joined by newlines are the text,
    but for blank lines and cuts inside a line.
    """
    pages: list[str] = []
    page = ""
    for block in _pieces(text, page_chars):
        joined = f"{page}\n\n{block}" if page else block
        if len(joined) <= page_chars:
            page = joined
        else:
            pages.append(page)
            page = block
    return (*pages, page)


def _pieces(text: str, page_chars: int) -> list[str]:
    """Blocks (paragraphs, tables) that fit a page; those that do not are cut at lines."""
    pieces: list[str] = []
    for block in text.split("\n\n"):
        if len(block) <= page_chars:
            pieces.append(block)
            continue
        piece = ""
        for line in block.split("\n"):
            for start in range(0, max(1, len(line)), page_chars):
                part = line[start : start + page_chars]
                joined = f"{piece}\n{part}" if piece else part
                if len(joined) > page_chars:
                    pieces.append(piece)
                    joined = part
                piece = joined
        pieces.append(piece)
    return pieces


class Documents:
    """All documents by path. Keeps no state of any episode."""

    def __init__(self, texts: Mapping[str, str], page_chars: int) -> None:
        self.texts = texts
        self._page_chars = page_chars
        names: dict[str, set[str]] = defaultdict(set)
        self._by_top: dict[str, list[str]] = defaultdict(list)
        for path in texts:
            parts = path.split("/")
            self._by_top[parts[0]].append(path)
            for depth, name in enumerate(parts):
                names["/".join(parts[:depth])].add(name)
        self._names = {folder: sorted(inside) for folder, inside in names.items()}
        # Built on first use: most documents of a large corpus are never opened.
        self.pages = lru_cache(maxsize=20_000)(self._paginated)
        self._lines = lru_cache(maxsize=20_000)(self._split)

    def names(self, folder: str) -> Sequence[str] | None:
        """What stands in a folder, sorted; None where there is no such folder. The top folder's name is empty."""
        return self._names.get(folder)

    def beside(self, path: str) -> Sequence[str]:
        """Every document of the same top folder."""
        return self._by_top[path.partition("/")[0]]

    def _paginated(self, path: str) -> tuple[str, ...]:
        return paginate(self.texts[path], self._page_chars)

    def page_with(self, path: str, line: str) -> int:
        """The number, from 1, of the first page that shows this line. Raises ValueError where none does."""
        for number, page in enumerate(self.pages(path), start=1):
            if f"\n{line}\n" in f"\n{page}\n":
                return number
        raise ValueError(f"{path} has no line {line!r}")

    def best_line(self, path: str, query: str) -> tuple[int, str]:
        """The page and the line that fit the query best, the words of the path aside.

        A word counts the less the more often the document has it, and short lines, such as rows of tables, are
        preferred to paragraphs. The first line of the first page where no word occurs.
        """
        text, starts = self._lines(path)
        scores: dict[int, float] = defaultdict(float)
        own = set(words_of(path))
        for word in dict.fromkeys(w for w in words_of(query) if w not in own):
            at = _occurrences(text, word)
            for line in {bisect.bisect_right(starts, position) - 1 for position in at}:
                scores[line] += 1 / (1 + len(at))
        if not scores:
            return 1, self.pages(path)[0].partition("\n")[0]
        ends = [*starts[1:], len(text) + 1]
        best = max(scores, key=lambda i: (scores[i] / math.sqrt(20 + ends[i] - starts[i]), -i))
        # Each page but the first begins with a form feed.
        page = text.count("\f", 0, starts[best] + 1) + 1
        return page, self._raw(path)[starts[best] : ends[best] - 1].lstrip("\f")

    def _raw(self, path: str) -> str:
        return "\n\f".join(self.pages(path))

    def _split(self, path: str) -> tuple[str, list[int]]:
        raw = self._raw(path)
        lower = raw.lower()
        # A few letters change their length in lower case; positions must be those of the raw text.
        text = lower if len(lower) == len(raw) else raw
        return text, [0, *accumulate(len(line) + 1 for line in text.split("\n"))][:-1]


def _occurrences(text: str, word: str) -> list[int]:
    found: list[int] = []
    position = text.find(word)
    while position >= 0 and len(found) < _MAX_OCCURRENCES:
        found.append(position)
        position = text.find(word, position + len(word))
    return found
