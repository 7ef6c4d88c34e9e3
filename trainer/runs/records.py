"""A rollout as a line of JSON, and read back."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

from pydantic import TypeAdapter

from envs.types import Episode, Task
from graders.hosted.view import own_data
from graders.types import Grade
from trainer.runs.files import is_intact, object_in
from trainer.types import Ledger, Rollout, completion_ids

_EPISODE, _TASK, _GRADE = TypeAdapter(Episode), TypeAdapter(Task), TypeAdapter(Grade)


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a JSON object; `rollout_from_json` reads it back.

    What stands there twice is left out: of the task's item its messages and definitions (`item_of` adds them again), of
    the episode its token ids.
    """
    return {
        "episode": _EPISODE.dump_python(replace(rollout.episode, completion_ids=None), mode="json"),
        "task": _TASK.dump_python(replace(rollout.task, item=own_data(rollout.task)), mode="json"),
        "grade": None if rollout.grade is None else asdict(rollout.grade),
        "watch": None if rollout.watch is None else asdict(rollout.watch),
        "ledgers": [ledger.to_json() for ledger in rollout.ledgers],
        "is_unscored": rollout.is_unscored,
        "num_drifted_turns": rollout.num_drifted_turns,
        "num_attempts": rollout.num_attempts,
        "unclosed": rollout.unclosed,
    }


def rollout_from_json(record: dict[str, Any]) -> Rollout:
    ledgers: tuple[Ledger, ...] = ()
    num_turns = 0
    for row in record["ledgers"]:
        ledgers += (Ledger.from_json(row, first_turn=num_turns),)
        num_turns = max(num_turns, 1 + max(ledgers[-1].turns, default=-1))
    return Rollout(
        episode=replace(_EPISODE.validate_python(record["episode"]), completion_ids=completion_ids(ledgers)),
        task=_TASK.validate_python(record["task"]),
        grade=None if record["grade"] is None else _GRADE.validate_python(record["grade"]),
        watch=None if record.get("watch") is None else _GRADE.validate_python(record["watch"]),
        ledgers=ledgers,
        is_unscored=record.get("is_unscored", False),
        num_drifted_turns=record["num_drifted_turns"],
        num_attempts=record["num_attempts"],
        unclosed=tuple(record.get("unclosed", ())),
    )


def rollout_in(line: bytes) -> Rollout | None:
    """None where the line is damaged, cut off, or holds no rollout."""
    record = object_in(line) if line.endswith(b"\n") and is_intact(line) is not False else None
    try:
        return None if record is None else rollout_from_json(record)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, RecursionError):
        return None


def asked_as(rollout: Rollout) -> str:
    """The rollout id of its request, which is that of its first attempt."""
    return re.sub(r"-retry\d+$", "", rollout.episode.rollout_id)
