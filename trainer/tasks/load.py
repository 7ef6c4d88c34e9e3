"""Tasks: from the world or from rows in the hosted format, and the order in which a run visits them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from envs.base import World
from envs.errors import UserError
from envs.messages import Reader, read_messages, read_task_id, read_tools, read_weight
from envs.reading.rows import read_rows
from envs.schemas.checks import without_nulls
from envs.schemas.words import schema_fault
from envs.tools import Tool
from envs.types import Message, Role, Task
from trainer.config import RolloutConfig, RunConfig
from trainer.seeds import derive_seed, hash_of
from trainer.tasks.offer import tools_offered
from trainer.types import Demonstration, Kind, RolloutRequest, ids_begin_with


def load_tasks(config: RunConfig, world: World, split: str) -> list[Task]:
    """The tasks of `train` or `eval`. Raises `UserError` that names file and line."""
    if config.data is None:
        return list(world.tasks(split))
    source = config.data.train if split == "train" else config.data.eval
    offered = world.make_env().tools
    tasks: dict[str, Task] = {}
    for number, where, data in read_rows(source, key=f"data.{split}"):
        row = Reader(data, f"{where}:")
        task = _task(row, where=where, number=number, offered=offered, rollout=config.rollout)
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
    rows = read_rows(config.warmstart.data, key="warmstart.data")
    return [_demonstration(Reader(data, f"{where}:"), where) for _, where, data in rows]


def _demonstration(row: Reader, where: str) -> Demonstration:
    """Whole conversations in `messages`, or TRL's `prompt` and `completion`, of which the completion is learned."""
    if row.get("weight", object, "") not in (None, 1):
        raise row.refuse("weight", "rows have no weights here, messages have; leave the row out")
    if _has(row, "completion"):
        if _has(row, "messages"):
            raise row.refuse("completion", "expected messages, or prompt and completion, but not both")
        prompt, completion = _conversation(row, "prompt", "user"), _conversation(row, "completion", "assistant")
    else:
        if _has(row, "prompt") and not _has(row, "messages"):
            raise row.refuse("completion", "expected it beside prompt: text, or a list of chat messages")
        prompt, completion = (), _conversation(row, "messages", "user")
    messages = (*prompt, *completion)
    if messages[-1].role != "assistant":
        raise row.refuse("messages", f"the last message must be the assistant's, it is of role {messages[-1].role!r}")
    given = row.value.get("completion" if prompt else "messages")
    weights = [read_weight(Reader(message, where)) for message in given] if isinstance(given, list) else [True]
    untrained = {i for i, trained in enumerate([*(False for _ in prompt), *weights]) if not trained}
    if all(i in untrained for i, message in enumerate(messages) if message.role == "assistant"):
        raise row.refuse("messages", "every assistant message has weight 0, so there is nothing to learn")
    return Demonstration(messages=messages, tools=read_tools(row) or (), untrained=frozenset(untrained), where=where)


def _conversation(row: Reader, key: str, role: Role) -> tuple[Message, ...]:
    """A list of messages, or in TRL's form text, which is one message of `role`."""
    if key != "messages" and isinstance(text := row.value.get(key), str):
        return (Message(role=role, content=text),)
    return read_messages(row, key)


def _has(row: Reader, key: str) -> bool:
    return row.get(key, object, "") is not None


def _prompt(row: Reader) -> tuple[Message, ...]:
    """The row's `messages`, or TRL's `prompt`. Beside `messages`, a `prompt` of text is data like any other key."""
    if not _has(row, "messages"):
        if not _has(row, "prompt"):
            raise row.refuse("messages", "required (a list of chat messages), or prompt as TRL's data sets have it")
        return _conversation(row, "prompt", "user")
    if isinstance(row.value.get("prompt"), list) and row.value["prompt"] != row.value["messages"]:
        raise row.refuse("prompt", "differs from messages; expected one of the two: which is the model's prompt?")
    return read_messages(row, "messages")


def _task(row: Reader, *, where: str, number: int, offered: Mapping[str, Tool], rollout: RolloutConfig) -> Task:
    messages, tools = _prompt(row), read_tools(row)
    if messages[-1].role != "user":
        raise row.refuse("messages", f"the last message must be the user's, it is of role {messages[-1].role!r}")
    # As they stand in the row: serving shows the model their nulls and further keys (`strict`, say) too.
    definitions = {tool["function"]["name"]: tool for tool in tools or ()}
    task = Task(
        task_id=read_task_id(row, f"row-{number}"),
        messages=messages,
        tools=None if tools is None else tuple(definitions),
        definitions=definitions,
        where=where,
        item=row.value,
    )
    for name, definition in definitions.items():
        # A tool in process shows its own schema, whatever the row says.
        is_shown = name not in offered or offered[name].is_remote
        fault = schema_fault(without_nulls(definition["function"].get("parameters") or {})) if is_shown else ""
        if fault:
            raise UserError(f"{where}: tools: tool {name!r}: parameters: not a JSON schema: {fault}")
    for name in task.tools or ():
        if name not in offered and rollout.answer == "text":
            raise UserError(
                f"{where}: tools: {name!r} is not offered by the world; it offers {', '.join(offered) or 'no tools'}. "
                "Name its server under world.tools; where calls are the answer, to be graded and never run, set "
                "rollout.answer to tool_calls"
            )
    try:
        tools_offered(task, offered, rollout)
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


def fresh_tasks(tasks: Sequence[Task], chosen: Sequence[Task], *, seed: int, step: int, count: int) -> list[Task]:
    """The first `count` that take the place of tied ones in a step whose own tasks are `chosen`: each of the others
    once, by a hash of seed, step and task, before any comes again. A longer list begins as a shorter one does."""
    taken = {task.task_id for task in chosen}
    others = [task for task in tasks if task.task_id not in taken] or list(tasks)
    order = sorted(others, key=lambda task: hash_of(seed, step, "fresh", task.task_id))
    return [order[i % len(order)] for i in range(count)]


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


def train_requests(
    config: RunConfig, tasks: Sequence[Task], *, run_id: str, step: int, first_group: int = 0
) -> list[RolloutRequest]:
    """The requests of a step's groups, group after group; `tasks` are theirs, the first of which is `first_group`."""
    begins = ids_begin_with(run_id, Kind.TRAIN, step)
    return [
        RolloutRequest(
            task=task,
            rollout_id=f"{begins}{group}-{task.task_id}-{k}",
            seed=derive_seed(config.seed, "train", step, group, k),
        )
        for group, task in enumerate(tasks, first_group)
        for k in range(config.rollout.group_size)
    ]
