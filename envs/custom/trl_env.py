"""TRL-style environments: classes with `reset`, as trl's GRPOTrainer uses what its `environment_factory` gives.

- `reset(**row)` gets the row's data and its messages as `prompt` (those that it takes, where it has no `**kwargs`); the
  text it returns is appended to the last user message, or is the prompt where the environment owns its data.
- Every public method but `reset` and `get_reward` is a tool, shown to the model as trl shows it; an exception in one is
  shown as an error, `WorldError` aside. What it returns is shown as `str` gives it.
- `get_reward()` is the reward when the grader is `{"type": "custom", "target": "graders.custom:EnvReward"}`.

What trl does not know, and what is no tool (see docs/episodes.md):

- `respond(message)` is a simulated user: it gets the text of each turn without calls and gives the user's next words,
  or None where the turn is the final answer. By its parameter's name it is told from a tool that is called respond.
- A public attribute or property `is_over` or `done`, or a method `is_over()`, that is true ends the episode.
- `final_state()` gives what graders read as `sample.state`, a mapping of JSON values.

Where ours differs from trl: each rollout has an instance of its own, made when it opens; arguments are checked against
the signature before the call; the error text begins with "Error: "; methods may be called `close` or `aclose` and take
no argument, then they are no tools but are called at the end, or else `__exit__` or `__aexit__` is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from envs.custom.trl_schema import trl_schema
from envs.errors import ToolError, UserError, WorldError, nearest
from envs.tools import Tool, tool
from envs.types import Episode, Message, Task
from envs.user_code import accepted, call_user, is_async, required, required_by_name

_live: dict[str, Any] = {}
"""TRL-style environments by rollout id, from open to close: graders read the reward of their own."""


def live_environment(rollout_id: str) -> Any | None:
    """The TRL-style environment of a rollout that is open in this process."""
    return _live.get(rollout_id)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrlKind:
    """One class of environments."""

    make: Callable[[], Any]
    tools: Mapping[str, Tool]
    needs: tuple[str, ...]
    """What `reset` must be given of a row."""
    has_user: bool


def trl_kind(make: Callable[[], Any], made: Any, where: str) -> TrlKind:
    """What the first instance shows of its class; it is closed. Raises `UserError` where its tools can't be read."""
    tools, needs = _tools_of(made, where), tuple(required_by_name(made.reset, f"{where}: reset"))
    kind = TrlKind(make=make, tools=tools, needs=needs, has_user=_has_user(type(made)))
    _close_probe(made)
    return kind


def kind_and_row(kinds: Mapping[str | None, TrlKind], task: Task) -> tuple[TrlKind, dict[str, Any]]:
    """Whose environment the task is, and what its `reset` may be given.

    Raises `UserError` for a task of no known environment, or without a key that `reset` needs.
    """
    row = {**task.item, "prompt": [message.to_openai() for message in task.messages]}
    if "messages" not in task.item:
        # A row in trl's form: its own prompt, text or messages, as trl hands it on.
        row |= task.item
    kind = kinds.get(None)
    if kind is None:
        name = row.pop("environment", None)
        known = ", ".join(map(repr, kinds))
        if name is None:
            raise UserError(f"task {task.task_id!r}: environment: required, one of {known}; the row does not name it")
        if not isinstance(name, str) or name not in kinds:
            hint = nearest(name, kinds)
            raise UserError(f"task {task.task_id!r}: environment: expected one of {known}, got {name!r}{hint}")
        kind = kinds[name]
    if missing := [name for name in kind.needs if name not in row]:
        raise UserError(
            f"task {task.task_id!r} has no key {missing[0]!r}, which the reset() of the environment needs; its keys "
            f"are {', '.join(row)}{nearest(missing[0], row)}"
        )
    return kind, row


class TrlEnv:
    """One rollout's TRL-style environment.

    Covered: sync methods of one instance run one at a time, in the order called, as trl runs them; async ones together.
    Not covered: a sync method that exceeds its time is abandoned, not stopped, and the next one may run beside it.
    """

    def __init__(self, kinds: Mapping[str | None, TrlKind]) -> None:
        """`kinds` by the value of the row's key `environment`; None stands for the only one."""
        self._kinds = kinds
        self._kind: TrlKind | None = None
        self._instance: Any = None
        self._rollout_id = ""
        self._turn = asyncio.Lock()
        self._tools = {
            name: dataclasses.replace(t, function=self._bound(name))
            for k in kinds.values()
            for name, t in k.tools.items()
        }
        self.observation: str | None = None
        if any(kind.has_user for kind in kinds.values()):
            # An environment that has the attribute is one with a user: `envs.base.Responds`.
            self.respond = self._respond

    @property
    def tools(self) -> Mapping[str, Tool]:
        """Before `open`, those of all kinds."""
        return self._tools if self._kind is None else {name: self._tools[name] for name in self._kind.tools}

    async def open(self, task: Task, rollout_id: str) -> None:
        self._kind, row = kind_and_row(self._kinds, task)
        # Kinds may have tools of one name.
        self._tools |= {n: dataclasses.replace(t, function=self._bound(n)) for n, t in self._kind.tools.items()}
        self._instance = await call_user(self._kind.make)
        self._rollout_id = rollout_id
        _live[rollout_id] = self._instance
        reset = self._instance.reset
        observation = await call_user(reset, **accepted(reset, row))
        self.observation = None if observation is None else _content_text(observation)
        if not self.observation and not task.messages[-1].content:
            raise UserError(f"{task.task_id}: reset() gives no prompt, and there is none in a data section")

    @property
    def is_over(self) -> bool:
        told = getattr(self._instance, "is_over", None)
        if callable(told):
            told = told()
        done = getattr(self._instance, "done", False)
        return bool(told) or (not callable(done) and bool(done))

    async def final_state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = {}
        if _is_hook(self._instance, "final_state"):
            state = await call_user(self._instance.final_state)
        return state

    async def _respond(self, message: Message) -> str | None:
        if not _has_user(type(self._instance)):
            return None
        async with self._turn:
            said = await call_user(self._instance.respond, message=message.content)
        return None if said is None else _content_text(said)

    async def close(self, episode: Episode | None) -> None:
        instance, self._instance = self._instance, None
        _live.pop(self._rollout_id, None)
        if instance is not None and (hook := _close_hook(instance)):
            await call_user(hook)

    def _bound(self, name: str) -> Callable[..., Any]:
        async def method(**arguments: Any) -> str:
            function = getattr(self._instance, name)
            try:
                if is_async(function):
                    value = await function(**arguments)
                else:
                    async with self._turn:
                        value = await call_user(function, **arguments)
            except (WorldError, ToolError):
                raise
            except Exception as e:
                raise ToolError(str(e) or type(e).__name__) from e
            return _content_text(value)

        return method


def _tools_of(instance: Any, where: str) -> dict[str, Tool]:
    """The public methods of the instance's class, as trl lists them."""
    hooks = [name for name in ("close", "aclose", "is_over", "final_state") if _is_hook(instance, name)]
    if _has_user(type(instance)):
        hooks.append("respond")
    tools: dict[str, Tool] = {}
    for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction):
        if name.startswith("_") or name in ("reset", "get_reward", *hooks):
            continue
        try:
            method = getattr(instance, name)
            tools[name] = dataclasses.replace(tool(method), definition=trl_schema(method))
        except TypeError as e:
            raise UserError(f"{where}: every public method is a tool: {e}") from None
    return tools


def _has_user(cls: type) -> bool:
    respond = getattr(cls, "respond", None)
    return callable(respond) and [name for name in required(respond) if name != "self"] == ["message"]


def _is_hook(instance: Any, name: str) -> bool:
    function = getattr(instance, name, None)
    return callable(function) and not required(function)


def _close_hook(instance: Any) -> Callable[[], Any] | None:
    for name in ("aclose", "close"):
        if _is_hook(instance, name):
            hook: Callable[[], Any] = getattr(instance, name)
            return hook
    for name in ("__aexit__", "__exit__"):
        if leave := getattr(instance, name, None):
            return functools.partial(leave, None, None, None)
    return None


def _close_probe(instance: Any) -> None:
    """The instance that was made to read the tools off. An async hook would need an event loop, and is not called."""
    hook = _close_hook(instance)
    if hook is not None and not is_async(hook):
        hook()


def _content_text(value: Any) -> str:
    """As trl shows it: `str` of the value; of content blocks the texts, others by their type."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        return "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in value)
    return str(value)
