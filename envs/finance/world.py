"""The finance world: corpus, search index, tasks and expert, built once a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from envs.base import ExpertTurn
from envs.finance.config import FinanceConfig
from envs.finance.corpus import generate_corpus
from envs.finance.env import FinanceEnv, make_tools
from envs.finance.expert import expert_turns
from envs.finance.questions import make_tasks
from envs.finance.search import BM25Index
from envs.tools import Tool
from envs.types import Task


class FinanceWorld:
    """Implements `envs.base.World`. Everything in it is a pure function of the config.

    Raises `UserError` when the corpus is too small for the tasks asked for.
    """

    def __init__(self, config: FinanceConfig) -> None:
        self.config = config
        self.corpus = generate_corpus(config)
        self.texts: Mapping[str, str] = {path: report.text() for path, report in self.corpus.reports.items()}
        self.tools: Mapping[str, Tool] = make_tools(
            self.texts, BM25Index(self.texts), search_hits=config.search_hits, with_calculate=config.calculate
        )
        self._tasks = {split: make_tasks(config, self.corpus, split) for split in ("train", "eval")}

    def make_env(self) -> FinanceEnv:
        return FinanceEnv(self.tools)

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of `train` or `eval`; KeyError for another name."""
        return self._tasks[split]

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        """Empty for a task that is not this world's own, such as a row of a user's file."""
        if not task.item.get("paths") or not set(task.item["paths"]) <= self.corpus.reports.keys():
            return ()
        return expert_turns(
            task, seed, self.corpus, calculate=self.config.calculate, detour_calls=self.config.detour_calls
        )


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
