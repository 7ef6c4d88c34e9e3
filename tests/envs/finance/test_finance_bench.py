"""The search benchmark's own parts: what is asked, how it is timed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from envs.finance.config import FinanceConfig
from envs.finance.contents import load_contents
from envs.finance.documents.paged import Documents
from envs.finance.documents.search import BM25Index
from envs.finance.tools import make_tools
from tests.support import ROOT

BENCH = ROOT / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("search_latency")


async def test_every_query_is_searched_once_and_timed(bench: Any) -> None:
    config = FinanceConfig(num_companies=12, num_train_tasks=80, num_eval_tasks=20)
    contents = load_contents(config)
    queries = bench.queries_of(contents, 90)
    assert len(set(queries)) == len(queries) == 90
    asked: list[str] = []

    class Counting:
        def __init__(self, index: BM25Index) -> None:
            self.index = index

        def search(self, query: str, num_hits: int) -> Any:
            asked.append(query)
            return self.index.search(query, num_hits)

    tools = make_tools(Documents(contents.texts, config.page_chars), Counting(BM25Index(contents.texts)), config)
    total_s, latencies = await bench.measure(tools, queries)
    assert sorted(asked) == sorted(queries)
    assert len(latencies) == 90
    assert 0 < max(latencies) <= total_s


def test_a_searchs_time_is_the_total_over_their_number_whatever_each_waited(bench: Any) -> None:
    runs = [(0.64, [0.1] * 60 + [0.5] * 4), (1.28, [0.2] * 64)]
    per_search, median, p95 = bench.figures_of("lexical", runs)
    assert per_search.values == pytest.approx([10.0, 20.0])
    assert per_search.verdict == "< 10: missed"
    assert median.values == pytest.approx([100.0, 200.0])
    assert p95.values[0] > 400
    assert median.verdict == ""
