"""The scripted expert: turns that solve a task, with detours that leave a policy something to unlearn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from envs.base import Act, ExpertTurn, Thinks
from envs.finance.thoughts import thought_before
from envs.types import Task

MAX_CALLS = 8
"""Detours are dropped beyond this many calls, so that every expert episode stays short."""
_MAX_DETOURS = 6
_PATH_DETOURS = ("vague_search", "search_again", "list_folder", "wrong_report", "read_again")

Call = tuple[str, dict[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How one document is found and read."""

    path: str
    query: str
    """Finds it."""
    vague_query: str
    wrong_paths: Sequence[str]
    """Documents that may be taken for it; the detour is left out where there are none."""
    pages: Sequence[int] = ()
    """The pages that hold the facts; empty for a document that is read whole."""

    @property
    def calls(self) -> list[Call]:
        return [("cat", {"path": self.path, **({"page": p} if p > 1 else {})}) for p in self.pages or (1,)]


def expert_turns(
    task: Task,
    seed: int,
    readings: Sequence[Reading],
    *,
    expression: str,
    detour_calls: float,
    detour_thoughts: float | None = None,
) -> Sequence[ExpertTurn]:
    """Search, read and (where there is an `expression`) compute, then answer; one call a turn.

    Deterministic in (task, seed). The number of needless calls is binomial with mean `detour_calls` out of at most six,
    cut to eight calls in all and to the detours there are: a vague search, the same search again, a directory listing,
    a distractor's report, a report or a sum twice. The right reports are read all the same, so the answer is right.
    With `detour_thoughts` each turn reasons first, see `thought_before`.
    """
    rng = random.Random(f"{seed}/{task.task_id}")
    options = [
        (kind, i)
        for i, reading in enumerate(readings)
        for kind in _PATH_DETOURS
        if reading.wrong_paths or kind != "wrong_report"
    ]
    options += [("compute_again", 0)] if expression else []
    num_detours = sum(rng.random() < detour_calls / _MAX_DETOURS for _ in range(_MAX_DETOURS))
    room = max(0, MAX_CALLS - sum(1 + len(reading.calls) for reading in readings) - bool(expression))
    detours = set(rng.sample(options, min(num_detours, room, len(options))))

    calls: list[Call] = []
    for i, reading in enumerate(readings):
        calls += _read(reading, {kind for kind, j in detours if j == i}, rng)
    if expression:
        calls += [("calculate", {"expression": expression})] * (1 + (("compute_again", 0) in detours))
    acts: list[Act] = [*((call,) for call in calls), str(task.item["answer"])]
    if detour_thoughts is None:
        return acts
    return [Thinks(thought_before(task, act, rng, detour_thoughts=detour_thoughts), act) for act in acts]


def _read(reading: Reading, detours: set[str], rng: random.Random) -> list[Call]:
    """Find and read one report."""
    search: Call = ("search", {"query": reading.query})
    calls: list[Call] = []
    if "vague_search" in detours:
        calls.append(("search", {"query": reading.vague_query}))
    calls.append(search)
    if "search_again" in detours:
        calls.append(search)
    if "list_folder" in detours:
        calls.append(("list", {"path": reading.path.rpartition("/")[0]}))
    if "wrong_report" in detours:
        calls.append(("cat", {"path": rng.choice(reading.wrong_paths)}))
    calls += reading.calls
    if "read_again" in detours:
        calls.append(reading.calls[-1])
    return calls
