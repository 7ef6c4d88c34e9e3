"""Real reports: TAT-QA and FinQA, their JSON files or data sets of the same rows, as documents and tasks.

The data sets give each question together with its report. Here the question stands alone and the report must be found,
so that only some of them can be kept. A question is a task when

1. its answer is one number, other than 0, and no bare year (two years lie within the numeric grader's 0.1 %), or yes
   or no by a FinQA program;
2. its derivation or program, where it has one, gives that answer; what it gives, not rounded further, is the gold;
3. it names enough to find its report: of all documents, a lexical search for the question ranks its own first, with a
   score at least a quarter above the second's;
4. no other question of the file that is left has the same words.

FinQA's file names tell company and year, and its questions are rewritten to begin with them; yes and no become 1 and 0,
and the question says so. TAT-QA names no company at all: its documents go by the uid of their table, its questions stay
as they are, and the tasks are split by document. FinQA's rows are also read as the hub has them: flat, the program
nested or in steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.documents.search import BM25Index
from envs.finance.real.finqa import read_finqa
from envs.finance.real.rows import Candidate
from envs.finance.real.tatqa import read_tatqa
from envs.types import Message, Task

PROMPT = (
    "Answer from the company reports with your tools. "
    "When you know the answer, reply with only the number and its unit."
)
MIN_LEAD = 1.25


def load_real(config: FinanceConfig) -> tuple[dict[str, str], dict[str, tuple[Task, ...]]]:
    """Documents by path, and tasks by split. Raises `UserError` naming file and key."""
    assert config.path is not None, "the config refuses a real source without its file"
    texts, candidates = read_tatqa(config.path) if config.source == "tatqa" else read_finqa(config.path)
    kept = _answerable(texts, candidates)
    groups = sorted({c.group for c in kept})
    random.Random(f"{config.seed}/split").shuffle(groups)
    held_out = set(groups[: min(max(1, round(config.eval_share * len(groups))), len(groups) - 1)])
    tasks = {}
    for split, most in (("train", config.num_train_tasks), ("eval", config.num_eval_tasks)):
        mine = [c for c in kept if (c.group in held_out) == (split == "eval")]
        if not mine:
            raise UserError(f"{config.path}: too few questions name their report: none is left for the {split} split")
        random.Random(f"{config.seed}/tasks/{split}").shuffle(mine)
        tasks[split] = tuple(_task(c, config.source) for c in mine[:most])
    return texts, tasks


def _answerable(texts: Mapping[str, str], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Rules 3 and 4."""
    index = BM25Index(texts)
    found = []
    for c in candidates:
        hits = index.scored(c.question, 2)
        if hits and hits[0][0] == c.path and (len(hits) == 1 or hits[0][1] >= MIN_LEAD * hits[1][1]):
            found.append(c)
    times = Counter(c.question.casefold() for c in found)
    return [c for c in found if times[c.question.casefold()] == 1]


def _task(c: Candidate, source: str) -> Task:
    item: dict[str, Any] = {
        "answer": c.gold.text,
        "kind": c.kind,
        "companies": [c.group] if source == "finqa" else [],
        "paths": [c.path],
        "program": c.gold.program,
        "expression": c.gold.expression,
        "queries": [c.question],
        "evidence": [],
    }
    messages = (Message(role="system", content=PROMPT), Message(role="user", content=c.question))
    return Task(task_id=f"{source}/{c.uid}", messages=messages, item=item)
