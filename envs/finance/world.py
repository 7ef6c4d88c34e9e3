"""The finance world: documents, search index, tasks and expert, built once a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from envs.base import ExpertTurn
from envs.embedding import PACKAGE, default_embedder
from envs.finance.config import FinanceConfig
from envs.finance.contents import load_contents
from envs.finance.documents.paged import Documents
from envs.finance.documents.search import BM25Index, HybridIndex, SearchIndex
from envs.finance.documents.semantic import SemanticIndex
from envs.finance.expert import expert_turns
from envs.finance.tools import FinanceEnv, make_tools
from envs.tools import Tool
from envs.types import Task


class FinanceWorld:
    """Implements `envs.base.World`. Everything in it is a pure function of the config, and of the file that it names.

    Raises `UserError` when the corpus is too small for the tasks asked for, and for a file that can't be read.
    """

    def __init__(self, config: FinanceConfig) -> None:
        self.config = config
        self._contents = load_contents(config)
        self.texts: Mapping[str, str] = self._contents.texts
        self._documents = Documents(self.texts, config.page_chars)
        self.tools: Mapping[str, Tool] = make_tools(self._documents, make_index(self.texts, config), config)

    def make_env(self) -> FinanceEnv:
        return FinanceEnv(self.tools)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of `train` or `eval`; KeyError for another name."""
        return self._contents.tasks[split]

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        """Empty for a task that is not this world's own, such as a row of a user's file."""
        if not task.item.get("paths") or not set(task.item["paths"]) <= self.texts.keys():
            return ()
        # A brief report's program is arithmetic already.
        expression = task.item.get("expression", task.item["program"])
        return expert_turns(
            task,
            seed,
            self._contents.readings(task, self._documents),
            expression=expression if self.config.calculate else "",
            detour_calls=self.config.detour_calls,
            detour_thoughts=self.config.detour_thoughts,
        )


def make_index(texts: Mapping[str, str], config: FinanceConfig) -> SearchIndex:
    """The index that `search_mode` names. Embeddings that are not in the cache yet are computed, in minutes."""
    match config.search_mode:
        case "lexical":
            return BM25Index(texts)
        case "semantic":
            return SemanticIndex(texts, default_embedder(), model=PACKAGE)
        case "hybrid":
            return HybridIndex(BM25Index(texts), SemanticIndex(texts, default_embedder(), model=PACKAGE))


def task_row(task: Task, tools: Mapping[str, Tool]) -> dict[str, Any]:
    """The task as a row of the hosted JSONL format: `messages`, `tools`, and every key of the item beside them.

    `task_id` is a key of the row too. The row offers the tools that the task names, or all.
    """
    offered = tools.values() if task.tools is None else [tools[name] for name in task.tools]
    return {
        "messages": [message.to_openai() for message in task.messages],
        "tools": [t.schema() for t in offered],
        "task_id": task.task_id,
        **task.item,
    }
