"""The scripted expert: turns that solve a task, with detours that leave a policy something to unlearn."""

from __future__ import annotations

import random
from collections.abc import Sequence

from envs.base import ExpertTurn
from envs.finance.corpus import Corpus, Report
from envs.types import Task

MAX_CALLS = 8
"""Detours are dropped beyond this many calls, so that every expert episode stays short."""
_MAX_DETOURS = 6
_PATH_DETOURS = ("vague_search", "search_again", "list_folder", "wrong_report", "read_again")

Call = tuple[str, dict[str, object]]


def expert_turns(
    task: Task, seed: int, corpus: Corpus, *, calculate: bool, detour_calls: float
) -> Sequence[ExpertTurn]:
    """Search, read and (with the `calculate` tool) compute, then answer; one call a turn.

    Deterministic in (task, seed). The number of needless calls is binomial with mean `detour_calls` out of at most six,
    cut to eight calls in all and to the detours there are: a vague search, the same search again, a directory listing,
    a distractor's report, a report or a sum twice. The right reports are read all the same, so the answer is right.
    """
    rng = random.Random(f"{seed}/{task.task_id}")
    item = task.item
    reports = [corpus.reports[path] for path in item["paths"]]
    computes = calculate and bool(item["program"])
    options = [(kind, i) for i in range(len(reports)) for kind in _PATH_DETOURS]
    options += [("compute_again", 0)] if computes else []
    num_detours = sum(rng.random() < detour_calls / _MAX_DETOURS for _ in range(_MAX_DETOURS))
    room = MAX_CALLS - 2 * len(reports) - computes
    detours = set(rng.sample(options, min(num_detours, room, len(options))))

    calls: list[Call] = []
    for i, report in enumerate(reports):
        chosen = {kind for kind, j in detours if j == i}
        calls += _read(report, item["metric"], chosen, corpus, rng)
    if computes:
        calls += [("calculate", {"expression": item["program"]})] * (1 + (("compute_again", 0) in detours))
    return [*((call,) for call in calls), item["answer"]]


def _read(report: Report, metric: str, detours: set[str], corpus: Corpus, rng: random.Random) -> list[Call]:
    """Find and read one report."""
    company = report.company
    search: Call = ("search", {"query": f"{company.name} {report.year} {metric}"})
    read: Call = ("cat", {"path": report.path})
    calls: list[Call] = []
    if "vague_search" in detours:
        calls.append(("search", {"query": company.name}))
    calls.append(search)
    if "search_again" in detours:
        calls.append(search)
    if "list_folder" in detours:
        calls.append(("list", {"path": company.folder}))
    if "wrong_report" in detours:
        calls.append(("cat", {"path": _distractor(report, corpus, rng).path}))
    calls.append(read)
    if "read_again" in detours:
        calls.append(read)
    return calls


def _distractor(report: Report, corpus: Corpus, rng: random.Random) -> Report:
    """The report of a sister company or of a neighbouring year."""
    company = report.company
    folders = [c.folder for c in corpus.companies if c.family == company.family and c != company]
    paths = [f"{folder}/{report.year}.txt" for folder in folders]
    paths += [f"{company.folder}/{year}.txt" for year in (report.year - 1, report.year + 1)]
    return corpus.reports[rng.choice([path for path in paths if path in corpus.reports])]
