"""How long a search takes with 64 in flight on one core, in every mode, over the corpus of a config.

    python scripts/bench/search_latency.py [--config FILE] [--repeats N] [--json FILE] [KEY=VALUE ...]

Calls go through the `search` tool as a rollout makes them; each has a query of its own. `time per search` is the
wall-clock time of all searches divided by their number: what a search costs the core. `median` and `p95` are the
latencies of single calls; with 64 in flight on one core they are about 64 times as long, since all of them wait for
the same core. `semantic, vectors at hand` leaves the embedding of the query out: what the index alone costs.

Embeddings of the documents are computed before the first measurement, unless the cache has them; that takes minutes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
from common import ROOT, Figure, bench_config, parser, report, run_main
from numpy.typing import NDArray

from envs.embedding import PACKAGE, default_embedder
from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.contents import Contents, load_contents
from envs.finance.documents.paged import Documents
from envs.finance.documents.search import SearchIndex
from envs.finance.documents.semantic import SemanticIndex
from envs.finance.tools import make_tools
from envs.finance.world import make_index
from envs.tools import Tool, call_tool
from envs.types import ToolCall

IN_FLIGHT = 64
TARGET_MS = 10.0
MODES = ("lexical", "semantic, vectors at hand", "semantic", "hybrid")


class VectorsAtHand:
    """An embedder that looks its texts up."""

    def __init__(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        self._vectors = vectors

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._vectors[text] for text in texts])


def queries_of(contents: Contents, num: int) -> list[str]:
    """Distinct queries as the expert writes them, or the questions where no query is noted."""
    tasks = itertools.chain(*contents.tasks.values())
    texts = (text for t in tasks for text in t.item.get("queries", [t.messages[-1].content]))
    return list(itertools.islice(dict.fromkeys(texts), num))


def index_of(mode: str, contents: Contents, config: FinanceConfig, queries: list[str]) -> SearchIndex:
    if mode != "semantic, vectors at hand":
        return make_index(contents.texts, config.model_copy(update={"search_mode": mode}))
    embedder = default_embedder()
    # The documents' vectors come from the cache, which this fills.
    make_index(contents.texts, config.model_copy(update={"search_mode": "semantic"}))
    vectors = VectorsAtHand(dict(zip(queries, embedder.embed(queries), strict=True)))
    return SemanticIndex(contents.texts, vectors, model=PACKAGE)


async def measure(tools: Mapping[str, Tool], queries: Sequence[str]) -> tuple[float, list[float]]:
    """Seconds for all queries, and of each call."""
    waiting = iter(queries)
    latencies: list[float] = []

    async def work() -> None:
        for query in waiting:
            call = ToolCall(call_id="c", name="search", arguments=json.dumps({"query": query}))
            result = await call_tool(tools, call, timeout_s=600)
            assert result.error is None, result.output
            latencies.append(result.latency_s)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - start, latencies


def figures_of(mode: str, runs: Sequence[tuple[float, list[float]]]) -> list[Figure]:
    per_search = [1000 * total / len(latencies) for total, latencies in runs]
    median = [1000 * statistics.median(latencies) for _, latencies in runs]
    p95 = [1000 * statistics.quantiles(latencies, n=20)[-1] for _, latencies in runs]
    return [
        Figure(name=f"{mode}: time per search", unit="ms", values=per_search, target=TARGET_MS, target_is_ceiling=True),
        Figure(name=f"{mode}: median of {IN_FLIGHT} in flight", unit="ms", values=median),
        Figure(name=f"{mode}: p95 of {IN_FLIGHT} in flight", unit="ms", values=p95),
    ]


def stay_on_one_core() -> None:
    """Start anew on one core where there are more: BLAS counted them, and started its threads, when it was imported."""
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        os.sched_setaffinity(0, {max(cores)})
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--searches", type=int, default=640, help="in each repeat (default 640)")
    given = arguments.parse_args()
    stay_on_one_core()
    given.config = given.config or ROOT / "configs" / "finance.yaml"
    with bench_config(given) as config:
        if not isinstance(config.world, FinanceConfig):
            raise UserError(f"world.type: expected finance, got {config.world.type}")
        start = time.perf_counter()
        contents = load_contents(config.world)
        made_s = time.perf_counter() - start
        queries = queries_of(contents, given.searches)
        documents = Documents(contents.texts, config.world.page_chars)
        figures = [Figure(name="documents and tasks made in", unit="s", values=[made_s])]
        for mode in MODES:
            tools = make_tools(documents, index_of(mode, contents, config.world, queries), config.world)
            asyncio.run(measure(tools, queries))
            figures += figures_of(mode, [asyncio.run(measure(tools, queries)) for _ in range(given.repeats)])
        about = {"documents": len(contents.texts), "queries": len(queries), "cores used": 1}
        report("Search latency", figures, about=about, json_path=given.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
