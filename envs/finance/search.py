"""Lexical search over the reports: BM25 in pure Python, behind the interface that a semantic index can take over."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

_PATH_WEIGHT = 3
_K1, _B = 1.2, 0.75


class SearchIndex(Protocol):
    """Finds paths by a query in words."""

    def search(self, query: str, num_hits: int) -> Sequence[str]:
        """Paths, best first; ties in alphabetical order; empty where nothing fits."""
        ...


class BM25Index:
    """BM25 (Robertson & Zaragoza 2009; k1 = 1.2, b = 0.75), the words of a path counted three times.

    The path names the company and year; without the weight, the next year's report, which shows the year as its second
    column, ranks beside the right one.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._postings: dict[str, list[tuple[str, float]]] = {}
        counts = {path: _weighted_counts(path, text) for path, text in texts.items()}
        mean_length = sum(sum(c.values()) for c in counts.values()) / max(1, len(counts))
        frequencies: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for path, count in counts.items():
            norm = _K1 * (1 - _B + _B * sum(count.values()) / mean_length)
            for word, frequency in count.items():
                frequencies[word].append((path, frequency * (_K1 + 1) / (frequency + norm)))
        for word, postings in frequencies.items():
            idf = math.log(1 + (len(counts) - len(postings) + 0.5) / (len(postings) + 0.5))
            self._postings[word] = [(path, idf * weight) for path, weight in postings]

    def search(self, query: str, num_hits: int) -> Sequence[str]:
        scores: dict[str, float] = defaultdict(float)
        for word in dict.fromkeys(_words(query)):
            for path, weight in self._postings.get(word, ()):
                scores[path] += weight
        return sorted(scores, key=lambda path: (-round(scores[path], 9), path))[:num_hits]


def _weighted_counts(path: str, text: str) -> Counter[str]:
    counts = Counter(_words(text))
    for word, count in Counter(_words(path)).items():
        counts[word] += _PATH_WEIGHT * count
    return counts


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+(?:\.[0-9]+)?", text.lower())
