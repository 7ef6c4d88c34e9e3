"""Tasks: from the world or from JSONL in the hosted format, and the order in which a run visits them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from envs.base import World
from envs.errors import UserError
from envs.types import Message, Role, Task
from trainer.config import RunConfig
from trainer.rollout import RolloutRequest, derive_seed


class _Row(BaseModel):
    """The reserved keys of a row; every other key is the item's."""

    model_config = ConfigDict(extra="allow")

    messages: list[_RowMessage] = Field(min_length=1)
    tools: list[_RowTool] | None = None


class _RowMessage(BaseModel):
    role: Role
    content: str


class _RowTool(BaseModel):
    type: str
    function: _RowFunction


class _RowFunction(BaseModel):
    name: str


def load_tasks(config: RunConfig, world: World, split: str) -> list[Task]:
    """The tasks of `train` or `eval`. Raises `UserError` that names file and line."""
    if config.data is None:
        return list(world.tasks(split))
    path = config.data.train if split == "train" else config.data.eval
    offered = world.make_env().tools
    try:
        # Not splitlines: a JSON string may hold line separators of Unicode.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as e:
        raise UserError(f"data.{split} {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"data.{split} {path}: not UTF-8 text: {e.reason} at byte {e.start}") from e
    tasks: dict[str, Task] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        task = _read_row(line, where=where, number=number, offered=list(offered))
        if task.task_id in tasks:
            raise UserError(
                f"{where}: task_id: {task.task_id!r} also stands in an earlier line; expected one of its own"
            )
        tasks[task.task_id] = task
    if not tasks:
        raise UserError(f"data.{split} {path}: no rows")
    return list(tasks.values())


def _read_row(line: str, *, where: str, number: int, offered: Sequence[str]) -> Task:
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not valid JSON: {e.msg} at column {e.colno}") from e
    try:
        row = _Row.model_validate(data)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, error["loc"])) or "row"
        expected = (
            "required (a list of chat messages)" if key == "messages" and error["type"] == "missing" else error["msg"]
        )
        raise UserError(f"{where}: {key}: {expected}") from None
    if row.messages[-1].role != "user":
        raise UserError(
            f"{where}: messages: the last message must be the user's, it is of role {row.messages[-1].role!r}"
        )
    names = None if row.tools is None else tuple(t.function.name for t in row.tools)
    for name in names or ():
        if name not in offered:
            raise UserError(f"{where}: tools: {name!r} is not offered by the world; it offers {', '.join(offered)}")
    item = {key: value for key, value in data.items() if key not in ("messages", "tools", "task_id")}
    return Task(
        task_id=str(data.get("task_id", f"row-{number}")),
        messages=tuple(Message(role=m.role, content=m.content) for m in row.messages),
        tools=names,
        item=item,
    )


def tasks_of_step(tasks: Sequence[Task], *, seed: int, step: int, num_tasks: int) -> list[Task]:
    """The tasks of one step: a seeded shuffle of all of them per pass, taken in turn.

    A pure function of its arguments, so that a resumed run goes on where it was without any saved cursor.
    """
    chosen = []
    for position in range(step * num_tasks, (step + 1) * num_tasks):
        epoch, index = divmod(position, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        chosen.append(tasks[order[index]])
    return chosen


def train_requests(config: RunConfig, tasks: Sequence[Task], *, run_id: str, step: int) -> list[RolloutRequest]:
    """The requests of a step's groups, group after group; `tasks` are the step's tasks."""
    return [
        RolloutRequest(
            task=task,
            rollout_id=f"{run_id}-step{step}-{group}-{task.task_id}-{k}",
            seed=derive_seed(config.seed, "train", step, group, k),
        )
        for group, task in enumerate(tasks)
        for k in range(config.rollout.group_size)
    ]
