"""Search over documents: lexical, semantic, hybrid; embeddings on disk; pages and lines."""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from envs.finance.config import FinanceConfig
from envs.finance.documents.paged import Documents, paginate
from envs.finance.documents.search import BM25Index, HybridIndex, words_of
from envs.finance.documents.semantic import Batched, SemanticIndex, embed_once
from envs.finance.world import FinanceWorld
from tests.support.finance_play import use

TEXTS = {
    "a/2001.txt": "debt and leases",
    "a/2002.txt": "cash",
    "b/2001.txt": "debt debt debt",
    "b/2002.txt": "pensions and cash",
}


class BagOfWords:
    """An embedder that can be followed by hand: one dimension for each word of a list, length 1."""

    WORDS = ("debt", "leases", "cash", "pensions")

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls.append(list(texts))
        counts = np.array([[words_of(t).count(w) for w in self.WORDS] for t in texts], dtype=np.float32)
        vectors: NDArray[np.float32] = counts / np.maximum(1, np.linalg.norm(counts, axis=1, keepdims=True))
        return vectors


def naive_bm25(texts: dict[str, str], query: str) -> list[str]:
    """The formula, document by document."""
    counts = {p: Counter(words_of(t)) for p, t in texts.items()}
    for path, count in counts.items():
        for word in words_of(path):
            count[word] += 3
    mean = sum(sum(c.values()) for c in counts.values()) / len(counts)
    scores: dict[str, float] = {}
    for path, count in counts.items():
        for word in dict.fromkeys(words_of(query)):
            holders = sum(word in c for c in counts.values())
            if count[word]:
                idf = math.log(1 + (len(counts) - holders + 0.5) / (holders + 0.5))
                norm = 1.2 * (0.25 + 0.75 * sum(count.values()) / mean)
                scores[path] = scores.get(path, 0.0) + idf * count[word] * 2.2 / (count[word] + norm)
    return sorted(scores, key=lambda p: (-round(scores[p], 9), p))


@given(seed=st.integers(0, 10_000), num_hits=st.integers(1, 12))
def test_bm25_ranks_as_the_formula_does(seed: int, num_hits: int) -> None:
    rng = random.Random(seed)
    words = ["debt", "cash", "tax", "lease", "2001", "2002", "maple"]
    texts = {f"{rng.choice(words)}/{i}.txt": " ".join(rng.choices(words, k=rng.randint(0, 12))) for i in range(10)}
    query = " ".join(rng.choices([*words, "unknown", "txt"], k=rng.randint(0, 5)))
    assert BM25Index(texts).search(query, num_hits) == naive_bm25(texts, query)[:num_hits]


def test_semantic_search_ranks_by_the_cosine_and_ties_by_path(tmp_path: Path) -> None:
    index = SemanticIndex(TEXTS, BagOfWords(), model="bag", folder=tmp_path)
    assert index.search("debt", 4) == ["b/2001.txt", "a/2001.txt", "a/2002.txt", "b/2002.txt"]
    assert index.search("cash and pensions", 2) == ["b/2002.txt", "a/2002.txt"]
    assert index.search(" ", 3) == []


def test_what_takes_long_once_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for is_first in (True, False):
        SemanticIndex(TEXTS, BagOfWords(), model="bag", folder=tmp_path)
        said = capsys.readouterr().err
        assert said == f"embedding {len(TEXTS)} documents, once: they are kept in {tmp_path}\n" * is_first


def test_semantic_search_agrees_with_sorting_all_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    by_text = {f"d{i:03}\n": v / np.linalg.norm(v) for i, v in enumerate(vectors)}

    class Table:
        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.stack([by_text[t] for t in texts])

    index = SemanticIndex({f"d{i:03}": "" for i in range(300)}, Table(), model="t", folder=tmp_path)
    queries = rng.normal(size=(5, 16)).astype(np.float32)
    matrix = np.stack(list(by_text.values()))
    for query, ranked in zip(queries, index.rank_vectors(queries, 20), strict=True):
        assert ranked == [f"d{i:03}" for i in np.argsort(-(matrix @ query))[:20]]


def test_hybrid_search_adds_reciprocal_ranks() -> None:
    class Fixed:
        def __init__(self, *paths: str) -> None:
            self.paths = paths

        def search(self, query: str, num_hits: int) -> Sequence[str]:
            return self.paths[:num_hits]

    # b: 1/62 + 1/61, a: 1/61 + 1/63, c: 1/62 alone.
    assert HybridIndex(Fixed("a", "b"), Fixed("b", "c", "a")).search("q", 3) == ["b", "a", "c"]
    assert HybridIndex(Fixed(), Fixed()).search("q", 3) == []


def test_embeddings_are_computed_once_and_anew_for_other_texts_or_another_model(tmp_path: Path) -> None:
    embedder = BagOfWords()
    first = embed_once(["debt", "cash"], embedder, model="m", folder=tmp_path)
    assert np.array_equal(embed_once(["debt", "cash"], embedder, model="m", folder=tmp_path), first)
    assert len(embedder.calls) == 1
    embed_once(["debt", "cash!"], embedder, model="m", folder=tmp_path)
    embed_once(["debt", "cash"], embedder, model="other", folder=tmp_path)
    assert len(embedder.calls) == 3
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"junk"])
def test_a_damaged_cache_file_is_computed_anew(tmp_path: Path, damage: bytes) -> None:
    embedder = BagOfWords()
    first = embed_once(["debt", "cash"], embedder, model="m", folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(damage)
    assert np.array_equal(embed_once(["debt", "cash"], embedder, model="m", folder=tmp_path), first)
    assert np.array_equal(np.load(kept), first)


def test_queries_that_come_together_are_embedded_together_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    class Slow(BagOfWords):
        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            time.sleep(0.05)
            return super().embed(texts)

    embedder = Slow()
    index = SemanticIndex(TEXTS, embedder, model="bag", folder=tmp_path)
    embedder.calls.clear()
    answers: dict[int, Sequence[str]] = {}
    words = BagOfWords.WORDS

    def ask(i: int) -> None:
        answers[i] = index.search(words[i % 4], 1)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [index.search(word, 1) for word in words]
    assert all(answers[i] == alone[i % 4] for i in range(40))
    assert len(embedder.calls) - len(alone) < 20
    assert all(len(set(batch)) == len(batch) for batch in embedder.calls)


def test_an_error_reaches_every_caller_and_the_next_query_is_answered() -> None:
    def work(queries: list[str]) -> list[list[str]]:
        if "bad" in queries:
            raise RuntimeError("no model")
        return [[q] for q in queries]

    ask = Batched(work)
    with pytest.raises(RuntimeError, match="no model"):
        ask("bad")
    assert ask("good") == ["good"]


async def test_the_packaged_model_finds_reports_in_every_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_RFT_CACHE", str(tmp_path))
    small = {"num_companies": 8, "num_years": 2, "num_train_tasks": 8, "num_eval_tasks": 4, "search_hits": 3}
    found = {}
    for mode in ("lexical", "semantic", "hybrid"):
        world = FinanceWorld(FinanceConfig.model_validate({**small, "search_mode": mode}))
        tasks = [*world.tasks("train"), *world.tasks("eval")]
        hits = [(await use(world, "search", query=t.messages[-1].content)).output.split("\n") for t in tasks]
        assert all(len(set(h)) == 3 for h in hits)
        found[mode] = sum(t.item["paths"][0] in h for t, h in zip(tasks, hits, strict=True)) / len(tasks)
    assert min(found.values()) >= 0.5, found
    assert len(list((tmp_path / "embeddings").iterdir())) == 1


@given(blocks=st.lists(st.text(alphabet="ab \n", max_size=60), max_size=20), size=st.integers(1, 50))
def test_pages_hold_the_whole_text_and_none_is_too_long(blocks: list[str], size: int) -> None:
    text = "\n\n".join(blocks)
    pages = paginate(text, size)
    assert all(len(page) <= size for page in pages)
    assert re.sub(r"\s", "", "".join(pages)) == re.sub(r"\s", "", text)


def test_pages_end_between_blocks_where_they_can_and_else_between_lines() -> None:
    assert paginate("aaa\n\nbbb\n\nccc", 8) == ("aaa\n\nbbb", "ccc")
    assert paginate("aaa\n\n1111\n2222\n3333", 9) == ("aaa", "1111\n2222", "3333")
    assert paginate("12345678", 5) == ("12345", "678")
    assert paginate("short", 100) == ("short",)
    assert paginate("", 100) == ("",)


def test_the_best_line_is_that_of_the_rarest_words_on_its_page() -> None:
    text = "Maple\n\ncash and cash, cash of many kinds and some words more\n\nCash | 5\nLeases | 7\n\nPensions | 9"
    documents = Documents({"maple/1.txt": text}, 70)
    pages = documents.pages("maple/1.txt")
    assert len(pages) == 2
    assert documents.best_line("maple/1.txt", "Maple leases") == (2, "Leases | 7")
    assert documents.best_line("maple/1.txt", "maple cash") == (2, "Cash | 5")
    assert documents.best_line("maple/1.txt", "pensions") == (2, "Pensions | 9")
    assert documents.best_line("maple/1.txt", "xyzzy") == (1, "Maple")
    assert documents.page_with("maple/1.txt", "Leases | 7") == 2
    with pytest.raises(ValueError, match="has no line"):
        documents.page_with("maple/1.txt", "Lease")


def test_a_lines_page_is_the_one_that_shows_it() -> None:
    # The capital İ is two letters long in lower case.
    lines = ["İstanbul | 0", *(f"word{i:02} | {i}" for i in range(1, 40))]
    documents = Documents({"x.txt": "\n\n".join(lines)}, 50)
    assert len(documents.pages("x.txt")) > 5
    for number, page in enumerate(documents.pages("x.txt"), start=1):
        for line in page.split("\n\n"):
            assert documents.page_with("x.txt", line) == number
            if line in lines[1:]:
                assert documents.best_line("x.txt", line.partition(" ")[0]) == (number, line)
