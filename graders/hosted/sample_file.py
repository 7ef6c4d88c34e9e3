"""Samples in a file, one a line: the hosted service's `item` and `sample`, or the rollouts that a run writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from envs.errors import UserError
from envs.messages import Reader, kind_of, read_messages, read_task_id
from envs.reading.rows import read_rows
from envs.settings import Settings
from envs.types import Episode, Task
from envs.validation import validation_problems
from graders.hosted.reader import episode_from_sample


class _Ledger(Settings, extra="ignore"):
    """What is read of a training row; `sampled` begins with start and end of each stretch of sampled tokens."""

    sampled: list[Annotated[list[int], Field(min_length=2)]]
    token_ids: list[int]


class _Rollout(Settings, extra="ignore"):
    """What is read of a rollout that a run has written."""

    task: Task
    episode: Episode
    ledgers: list[_Ledger] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One line of the samples."""

    line: int
    task: Task
    episode: Episode


def read_samples(path: Path) -> Iterator[SampleRow]:
    """Raises `UserError` that names file and line."""
    for number, where, data in read_rows(path, key="samples"):
        try:
            yield _read_row(data, number)
        except ValidationError as e:
            raise UserError(validation_problems(where, e)) from None
        except UserError as e:
            raise UserError(f"{where}: {e}") from None


def _read_row(data: Any, number: int) -> SampleRow:
    if not isinstance(data, dict):
        raise UserError(f"expected an object, got {kind_of(data)}")
    if "episode" in data and "task" in data:
        rollout = _Rollout.model_validate(data)
        ids = _completion_ids(rollout.ledgers or ())
        return SampleRow(line=number, task=rollout.task, episode=replace(rollout.episode, completion_ids=ids))
    item = data.get("item", data.get("datasource_item"))
    item = {} if item is None else item
    if not isinstance(item, dict):
        raise UserError(f"item: expected an object, got {kind_of(item)}")
    sample = data.get("sample")
    if isinstance(data.get("model_sample"), str):
        sample = {"output_text": data["model_sample"]}
    if not isinstance(sample, dict):
        raise UserError("expected item and sample, item and model_sample (text), or task and episode")
    rollout_id = sample.get("rollout_id") or sample.get("trace_id") or f"line-{number}"
    task_id = read_task_id(Reader(item, "item"), f"line-{number}")
    # Reward functions are shown the prompt, as in training.
    messages = read_messages(Reader(item, "item"), "messages") if item.get("messages") else ()
    task = Task(task_id=task_id, messages=messages, item=item)
    return SampleRow(line=number, task=task, episode=episode_from_sample(sample, rollout_id=str(rollout_id)))


def _completion_ids(ledgers: Sequence[_Ledger]) -> tuple[int, ...] | None:
    """As `trainer.types.completion_ids` has them, of the rollout's rows; None without any."""
    rows = [row for row in ledgers if row.sampled]
    return tuple(i for row in rows for i in row.token_ids[row.sampled[0][0] : row.sampled[-1][1]]) or None
