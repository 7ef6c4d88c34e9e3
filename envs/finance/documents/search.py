"""Search over the documents: lexical (BM25), semantic (nearest embedding), and both together."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_PATH_WEIGHT = 3
_K1, _B = 1.2, 0.75
_DIGITS_COMPARED = 9
"""Scores that agree so far are ties: sums of the same weights in another order differ in the last digits."""
_FUSED_HITS = 50
_FUSION_K = 60


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
        self._paths = list(texts)
        ids: dict[str, array[int]] = defaultdict(lambda: array("i"))
        counts: dict[str, array[int]] = defaultdict(lambda: array("i"))
        lengths: list[int] = []
        for i, (path, text) in enumerate(texts.items()):
            count = _weighted_counts(path, text)
            lengths.append(sum(count.values()))
            for word, frequency in count.items():
                ids[word].append(i)
                counts[word].append(frequency)
        mean_length = sum(lengths) / max(1, len(lengths))
        norms = _K1 * (1 - _B + _B * np.array(lengths, dtype=np.float64) / mean_length) if lengths else np.zeros(0)
        self._postings: dict[str, tuple[NDArray[np.int32], NDArray[np.float64]]] = {}
        for word, found in ids.items():
            where = np.array(found, dtype=np.int32)
            frequency_D = np.array(counts[word], dtype=np.float64)
            idf = math.log(1 + (len(lengths) - len(where) + 0.5) / (len(where) + 0.5))
            self._postings[word] = (where, idf * (frequency_D * (_K1 + 1) / (frequency_D + norms[where])))

    def search(self, query: str, num_hits: int) -> Sequence[str]:
        return [path for path, _ in self.scored(query, num_hits)]

    def scored(self, query: str, num_hits: int) -> list[tuple[str, float]]:
        """The best paths with their scores."""
        scores = np.zeros(len(self._paths))
        for word in dict.fromkeys(words_of(query)):
            if word in self._postings:
                where, weights = self._postings[word]
                scores[where] += weights
        fitting = np.flatnonzero(scores)
        if len(fitting) > num_hits:
            # All that may tie with the last hit stay in: the order among them is decided below.
            least = np.partition(scores[fitting], -num_hits)[-num_hits] - 10.0**-_DIGITS_COMPARED
            fitting = fitting[scores[fitting] >= least]
        keys = sorted((-round(float(scores[i]), _DIGITS_COMPARED), self._paths[i]) for i in fitting)
        return [(path, -score) for score, path in keys[:num_hits]]


class HybridIndex:
    """Two indices by reciprocal-rank fusion (Cormack, Clarke & Büttcher 2009; k = 60) of the 50 best hits of each."""

    def __init__(self, first: SearchIndex, second: SearchIndex) -> None:
        self._indices = (first, second)

    def search(self, query: str, num_hits: int) -> Sequence[str]:
        scores: dict[str, float] = defaultdict(float)
        for index in self._indices:
            for rank, path in enumerate(index.search(query, _FUSED_HITS), start=1):
                scores[path] += 1 / (_FUSION_K + rank)
        return sorted(scores, key=lambda path: (-round(scores[path], 9), path))[:num_hits]


def _weighted_counts(path: str, text: str) -> Counter[str]:
    counts = Counter(words_of(text))
    for word, count in Counter(words_of(path)).items():
        counts[word] += _PATH_WEIGHT * count
    return counts


def words_of(text: str) -> list[str]:
    """The words and numbers of a text in lower case."""
    return re.findall(r"[a-z]+|[0-9]+(?:\.[0-9]+)?", text.lower())
