"""Semantic search: an exact index over embeddings, which are computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from envs.cache import cache_dir
from envs.terminal import say

HEAD_CHARS = 1000
"""So much of a document is embedded, its path before it: the title, the contents and the opening. The model reads about
as much; the page and the line within a document are then found by words (`Documents.best_line`)."""
_MAX_BATCH = 64
_EMBED_AT_ONCE = 256

# Shapes: N documents, Q queries, D dimensions of the embedding.


class TextEmbedder(Protocol):
    """Turns texts into vectors of length 1."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


def embed_once(texts: Sequence[str], embedder: TextEmbedder, *, model: str, folder: Path) -> NDArray[np.float32]:
    """The vectors [N, D] of the texts, from the cache where it has them.

    *Covered*: a file is written under another name and moved, so that no reader sees half of one and two writers don't
    harm each other; a damaged file is computed anew. *Not covered*: old files are never deleted.
    """
    digest = hashlib.sha256(json.dumps([model, *texts]).encode()).hexdigest()[:24]
    path = folder / f"{digest}.npy"
    if (kept := _load(path, len(texts))) is not None:
        return kept
    if os.environ.get("RANK", "0") == "0":
        say(f"embedding {len(texts):,} documents, once: they are kept in {folder}", file=sys.stderr)
    parts = [embedder.embed(texts[i : i + _EMBED_AT_ONCE]) for i in range(0, len(texts), _EMBED_AT_ONCE)]
    vectors_ND = np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        np.save(file, vectors_ND)
    Path(file.name).replace(path)
    return vectors_ND


def _load(path: Path, num_texts: int) -> NDArray[np.float32] | None:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == num_texts and vectors.dtype == np.float32 else None


class SemanticIndex:
    """The documents whose vectors lie nearest to the query's: one matrix product, no approximation."""

    def __init__(
        self, texts: Mapping[str, str], embedder: TextEmbedder, *, model: str, folder: Path | None = None
    ) -> None:
        self._paths = sorted(texts)
        heads = [f"{path}\n{texts[path][:HEAD_CHARS]}" for path in self._paths]
        self._vectors_ND = embed_once(heads, embedder, model=model, folder=folder or cache_dir() / "embeddings")
        self._embedder = embedder
        self._rank = Batched(self._rank_all)

    def search(self, query: str, num_hits: int) -> Sequence[str]:
        return self._rank(query)[:num_hits] if query.strip() else []

    def rank_vectors(self, queries_QD: NDArray[np.float32], num_hits: int) -> list[list[str]]:
        """The nearest documents of each query vector, best first; ties in alphabetical order."""
        scores_QN = queries_QD @ self._vectors_ND.T
        num_hits = min(num_hits, len(self._paths))
        best_QH = np.argpartition(scores_QN, -num_hits, axis=1)[:, -num_hits:]
        ranked = []
        for scores_N, best_H in zip(scores_QN, best_QH, strict=True):
            order = sorted(best_H.tolist(), key=lambda i: (-float(scores_N[i]), i))
            ranked.append([self._paths[i] for i in order])
        return ranked

    def _rank_all(self, queries: list[str]) -> list[list[str]]:
        distinct = list(dict.fromkeys(queries))
        ranked = self.rank_vectors(self._embedder.embed(distinct), _MAX_RANKED)
        by_query = dict(zip(distinct, ranked, strict=True))
        return [by_query[query] for query in queries]


_MAX_RANKED = 50
"""Hits that are ranked for every query, however many are asked for; as many as the hybrid index fuses."""


@dataclass(slots=True)
class _Job:
    query: str
    done: bool = False
    hits: list[str] = field(default_factory=list)
    error: Exception | None = None


class Batched:
    """Answers queries of many threads together: while one batch is worked on, the next one gathers.

    A query that comes alone is answered at once. An error reaches every caller of its batch.
    """

    def __init__(self, work: Callable[[list[str]], list[list[str]]], *, max_batch: int = _MAX_BATCH) -> None:
        self._work = work
        self._max_batch = max_batch
        self._waiting: list[_Job] = []
        self._guard = threading.Lock()
        self._turn = threading.Lock()

    def __call__(self, query: str) -> list[str]:
        job = _Job(query)
        with self._guard:
            self._waiting.append(job)
        while not job.done:
            # Whoever has the turn works for all that wait; the others find their job done when their turn comes.
            with self._turn:
                if not job.done:
                    self._work_off()
        if job.error is not None:
            raise job.error
        return job.hits

    def _work_off(self) -> None:
        with self._guard:
            batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
        try:
            for job, hits in zip(batch, self._work([job.query for job in batch]), strict=True):
                job.hits = hits
        except Exception as e:
            for job in batch:
                job.error = e
        for job in batch:
            job.done = True
