"""Tasks: from the world or from rows in the hosted format, and the order in which a run visits them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from envs.base import World
from envs.errors import UserError
from envs.rows import read_rows
from envs.tools import Tool, offered_tools
from envs.types import Message, Task, ToolCall
from trainer.config import RunConfig
from trainer.rollout import RolloutRequest, derive_seed
from trainer.warmstart import Demonstration


class _Row(BaseModel):
    """The reserved keys of a row; every other key is the item's."""

    model_config = ConfigDict(extra="allow")

    messages: list[_RowMessage] = Field(min_length=1)
    tools: list[_RowTool] | None = None


class _RowText(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _RowMessage(BaseModel):
    """A Chat Completions message. `developer` is the newer name of `system`, which open models' templates know."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_RowText] | None = None
    tool_calls: list[_RowCall] = []
    tool_call_id: str = ""
    name: str = ""

    @model_validator(mode="after")
    def _has_content(self) -> _RowMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: Field required")
        return self

    def to_message(self) -> Message:
        parts = self.content if isinstance(self.content, list) else []
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=self.content if isinstance(self.content, str) else "".join(part.text for part in parts),
            tool_calls=tuple(
                ToolCall(call_id=c.id, name=c.function.name, arguments=c.function.arguments) for c in self.tool_calls
            ),
            call_id=self.tool_call_id,
            name=self.name,
        )


class _RowCall(BaseModel):
    id: str
    function: _CalledFunction


class _CalledFunction(BaseModel):
    name: str
    arguments: str


class _RowTool(BaseModel):
    type: Literal["function"]
    function: _RowFunction


class _RowFunction(BaseModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


def load_tasks(config: RunConfig, world: World, split: str) -> list[Task]:
    """The tasks of `train` or `eval`. Raises `UserError` that names file and line."""
    if config.data is None:
        return list(world.tasks(split))
    source = config.data.train if split == "train" else config.data.eval
    offered = world.make_env().tools
    tasks: dict[str, Task] = {}
    for number, where, data in read_rows(source, key=f"data.{split}"):
        task = _task(_read_row(data, where=where), data, where=where, number=number, offered=offered)
        if task.task_id in tasks:
            raise UserError(
                f"{where}: task_id: {task.task_id!r} also stands in an earlier line; expected one of its own"
            )
        tasks[task.task_id] = task
    return list(tasks.values())


def load_demonstrations(config: RunConfig) -> list[Demonstration]:
    """The conversations of `warmstart.data`; none without it. Raises `UserError` that names file and line."""
    if config.warmstart is None or config.warmstart.data is None:
        return []
    demonstrations = []
    for _, where, data in read_rows(config.warmstart.data, key="warmstart.data"):
        row = _read_row(data, where=where)
        if row.messages[-1].role != "assistant":
            raise UserError(
                f"{where}: messages: the last message must be the assistant's, it is of role {row.messages[-1].role!r}"
            )
        demonstrations.append(
            Demonstration(
                messages=tuple(m.to_message() for m in row.messages),
                tools=tuple(t.model_dump(exclude_none=True) for t in row.tools or ()),
            )
        )
    return demonstrations


def _read_row(data: Any, *, where: str) -> _Row:
    try:
        return _Row.model_validate(data)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, error["loc"])) or "row"
        expected = (
            "required (a list of chat messages)" if key == "messages" and error["type"] == "missing" else error["msg"]
        )
        raise UserError(f"{where}: {key}: {expected}") from None


def _task(row: _Row, data: dict[str, Any], *, where: str, number: int, offered: Mapping[str, Tool]) -> Task:
    if row.messages[-1].role != "user":
        raise UserError(
            f"{where}: messages: the last message must be the user's, it is of role {row.messages[-1].role!r}"
        )
    task = Task(
        task_id=str(data.get("task_id", f"row-{number}")),
        messages=tuple(m.to_message() for m in row.messages),
        tools=None if row.tools is None else tuple(t.function.name for t in row.tools),
        # As they stand in the row: serving shows the model their nulls and further keys (`strict`, say) too.
        definitions={t["function"]["name"]: t for t in data.get("tools") or ()},
        item=data,
    )
    for name in task.tools or ():
        if name not in offered:
            raise UserError(f"{where}: tools: {name!r} is not offered by the world; it offers {', '.join(offered)}")
    try:
        offered_tools(task, offered)
    except UserError as e:
        raise UserError(f"{where}: tools: {e}") from None
    return task


def tasks_of_step(
    tasks: Sequence[Task], *, seed: int, step: int, num_tasks: int, stratify_by: str | None = None
) -> list[Task]:
    """The tasks of one step: a seeded shuffle of all of them per pass, taken in turn.

    With `stratify_by`, a key of the tasks' items, the shuffle is stratified: the tasks of each value are spread evenly
    over the pass, so that every step holds the values in about the proportion in which all tasks do.

    A pure function of its arguments, so that a resumed run goes on where it was without any saved cursor.
    """
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(step * num_tasks, (step + 1) * num_tasks):
        epoch, index = divmod(position, len(tasks))
        if epoch not in orders:
            orders[epoch] = _order(tasks, random.Random(f"{seed}/{epoch}"), stratify_by)
        chosen.append(tasks[orders[epoch][index]])
    return chosen


def _order(tasks: Sequence[Task], rng: random.Random, stratify_by: str | None) -> list[int]:
    order = list(range(len(tasks)))
    rng.shuffle(order)
    if stratify_by is None:
        return order
    strata: dict[str, list[int]] = {}
    for index in order:
        strata.setdefault(str(tasks[index].item[stratify_by]), []).append(index)
    place: dict[int, float] = {}
    for stratum in strata.values():
        offset = rng.random()
        place |= {index: (i + offset) / len(stratum) for i, index in enumerate(stratum)}
    return sorted(order, key=place.__getitem__)


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
