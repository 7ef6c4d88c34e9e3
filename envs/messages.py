"""Chat messages and tool definitions as JSON: what users write is read here, what others read is written here.

Rows, demonstrations and samples are read alike; null says the same as a missing key, as the dumps of SDKs write it.
Chat Completions JSON is `Message.to_openai`; the forms that templates and trl have of it stand below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from envs.errors import UserError
from envs.reading.json_text import read_json, read_strict_json
from envs.types import Message, Role, ToolCall

_MAX_NUMBER = 1e15
ROLES: dict[str, Role] = {
    "system": "system",
    # The newer name, which many open models' templates pass over without a word.
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Ours for each role that a message may have."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""One thing under the names that servers and data sets have for it."""
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "weight", *_REASONING)
_BOOKKEEPING = (
    *("id", "type", "status", "index", "annotations", "metadata"),
    *("timestamp", "created", "created_at", "parsed", "parsed_arguments"),
)
"""Keys of messages and calls that no server shows to a model, and no training needs."""
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Reader:
    """Typed access to JSON that a user wrote; None, like a missing key, gives the default.

    Raises `UserError` that says where the value stands and what was expected.
    """

    value: Any
    where: str
    """Its path; a row's own is what names the row, with a colon behind it."""

    def at(self, key: str) -> str:
        return f"{self.where} {key}" if self.where.endswith(":") else f"{self.where}.{key}"

    def refuse(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.at(key)}: {expected}")

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if not isinstance(self.value, Mapping):
            raise UserError(f"{self.where.removesuffix(':')}: expected an object, got {kind_of(self.value)}")
        found = self.value.get(key)
        if found is not None and (not isinstance(found, kind) or isinstance(found, bool)):
            raise self.refuse(key, f"expected {expected}, got {kind_of(found)}")
        return found

    def text(self, key: str) -> str | None:
        found: str | None = self.get(key, str, "text")
        return found

    def required(self, key: str) -> str:
        text = self.text(key)
        if text is None:
            raise self.refuse(key, "expected text, but it is missing")
        return text

    def number(self, key: str) -> float:
        found: float = self.get(key, (int, float), "a number") or 0.0
        if not 0 <= found <= _MAX_NUMBER:
            raise self.refuse(key, f"expected a number from 0 to {_MAX_NUMBER:g}")
        return found

    def items(self, key: str) -> list[Reader] | None:
        found: list[Any] | None = self.get(key, list, "a list")
        return None if found is None else [Reader(x, f"{self.at(key)}[{i}]") for i, x in enumerate(found)]

    def inner(self, key: str) -> Reader:
        return Reader(self.get(key, Mapping, "an object") or {}, self.at(key))

    def allow(self, known: Sequence[str]) -> None:
        """Refuse any other key that says something."""
        for key, value in self.value.items():
            if key not in known and key not in _BOOKKEEPING and value not in (None, "", [], {}):
                raise self.refuse(key, f"not understood, and not to be dropped unseen; known are {', '.join(known)}")


def kind_of(value: object) -> str:
    """What kind of JSON value it is."""
    return _KINDS.get(type(value), type(value).__name__)


def read_messages(read: Reader, key: str) -> tuple[Message, ...]:
    """The chat messages under `key`, which must be there.

    Covered: content as text or as text parts (joined by line breaks, as vLLM joins them); reasoning under each of its
    names; arguments as JSON text or as an object; calls and results without ids, which are then given some in their
    order. Refused: pictures, sound and files, a result whose id is that of no call before it, and any key that is not
    understood and not empty. Not covered: calls that are never answered, or answered twice.
    """
    found = read.items(key)
    if not found:
        raise read.refuse(key, "expected a list of chat messages" + ("" if found is None else ", got an empty list"))
    messages = _with_ids([read_message(message) for message in found])
    known: list[str] = []
    for message, each in zip(messages, found, strict=True):
        each.allow(_MESSAGE_KEYS)
        if each.value.get("content") is None and not message.tool_calls:
            raise each.refuse("content", "expected text, but it is missing")
        if message.role != "assistant" and (message.reasoning or message.tool_calls):
            raise UserError(f"{each.where}: only the assistant reasons and calls tools; the role is {message.role!r}")
        if message.call_id and message.role != "tool":
            raise each.refuse("tool_call_id", f"only a tool's message answers a call; the role is {message.role!r}")
        if message.call_id and message.call_id not in known:
            raise each.refuse(
                "tool_call_id",
                f"{message.call_id!r} answers no call; the calls before it are {', '.join(map(repr, known)) or 'none'}",
            )
        known += [call.call_id for call in message.tool_calls]
        read_weight(each)
        for call in each.items("tool_calls") or ():
            call.allow(("id", "type", "function"))
            call.inner("function").allow(("name", "arguments"))
    return tuple(messages)


def read_task_id(read: Reader, default: str) -> str:
    """The row's `task_id`, text or a whole number; `default` where it has none."""
    found = read.value.get("task_id")
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise read.refuse("task_id", f"expected text or a whole number, got {kind_of(found)}")
    if not str(found).strip():
        raise read.refuse("task_id", "expected text or a whole number, got empty text")
    return str(found)


def read_weight(read: Reader) -> bool:
    """Whether a demonstration's message may be trained on: `weight` is 0 or 1, and 1 where it is missing."""
    weight = read.value.get("weight")
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise read.refuse("weight", f"expected 0 or 1, got {weight!r}")
    if weight and read.value.get("role") != "assistant":
        raise read.refuse("weight", "only the assistant's messages are trained on; expected 0, or no weight")
    return bool(weight != 0)


def read_message(read: Reader) -> Message:
    """One message, whatever further keys it has."""
    role = read.required("role")
    if role not in ROLES:
        raise read.refuse("role", f"expected {', '.join(ROLES)}, got {role!r}")
    return Message(
        role=ROLES[role],
        content=_content(read),
        reasoning=_reasoning(read),
        tool_calls=tuple(read_call(c) for c in read.items("tool_calls") or ()),
        call_id=read.text("tool_call_id") or "",
        name=read.text("name") or "",
    )


def _content(read: Reader) -> str:
    content = read.get("content", (str, list), "text or a list of text parts") or ""
    return content if isinstance(content, str) else "\n".join(_part(part) for part in read.items("content") or ())


def _part(read: Reader) -> str:
    if isinstance(read.value, str):
        return read.value
    kind = read.get("type", object, "text")
    if kind is not None and kind not in _TEXT_PARTS:
        raise UserError(f"{read.where}: a part of type {kind!r}; expected text parts: models see text alone here")
    return read.required("text")


def _reasoning(read: Reader) -> str:
    told = {key: text for key in _REASONING if (text := read.text(key))}
    if len(set(told.values())) > 1:
        raise UserError(f"{read.where}: {' and '.join(told)} differ; expected the reasoning once")
    return next(iter(told.values()), "")


def read_call(read: Reader) -> ToolCall:
    """A tool call of Chat Completions; its arguments may be an object too, as templates take them."""
    function = read.inner("function")
    if (kind := read.text("type")) not in (None, "function"):
        raise read.refuse("type", f"expected 'function', got {kind!r}")
    name = function.required("name")
    arguments = function.get("arguments", (str, Mapping), "JSON text or an object")
    if arguments is None:
        raise function.refuse("arguments", "expected JSON text or an object, but it is missing")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call_id=read.text("id") or "", name=name, arguments=text)


def served_form(message: Message, *, as_list: bool) -> dict[str, Any]:
    """The message as `vllm serve` hands it to the template: arguments as objects, reasoning under both its names.

    `as_list`: the content as a list of parts, where the template wants one.
    """
    content: Any = message.content
    if as_list and message.role != "tool":
        content = [{"type": "text", "text": message.content}]
    out: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        out["tool_calls"] = [{"id": call.call_id, **_call_form(call, as_object)} for call in message.tool_calls]
    if message.reasoning:
        out |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    if message.role == "tool":
        out |= {"tool_call_id": message.call_id, "name": message.name}
    elif message.name:
        out["name"] = message.name
    return out


def trl_form(message: Message) -> dict[str, Any]:
    """The message as trl hands a completion's to reward functions: calls without ids, their arguments decoded."""
    if message.role == "tool":
        return {"role": "tool", "name": message.name, "content": message.content}
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [_call_form(call, _as_any) for call in message.tool_calls]
    return out


def _call_form(call: ToolCall, decoded: Callable[[str], Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": decoded(call.arguments)}}


def as_object(arguments: str) -> dict[str, Any]:
    """A call's arguments; as in vLLM, what is no JSON object is shown to the template as an empty one."""
    try:
        value = read_json(arguments, finite=False)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _as_any(arguments: str) -> Any:
    """Text that is no JSON stays text: the call was answered with an error, and the grader may look at it."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _with_ids(messages: Sequence[Message]) -> list[Message]:
    """Ids for calls that have none. A result answers the call of its id, or else the first that is still open among
    those before it, where it or that call has none."""
    numbered: list[Message] = []
    open_calls: list[ToolCall] = []
    given: set[str] = set()
    num_calls = 0
    for message in messages:
        calls: list[ToolCall] = []
        for call in message.tool_calls:
            # Nine characters: some templates take no other length.
            if not call.call_id:
                call = replace(call, call_id=f"call{num_calls:05d}")
                given.add(call.call_id)
            calls.append(call)
            num_calls += 1
        if message.role == "assistant":
            open_calls = calls
        if message.role == "tool":
            mine = [c for c in open_calls if (message.call_id or c.call_id) == c.call_id]
            mine = mine or [c for c in open_calls if c.call_id in given]
            named = [c for c in mine if c.name == message.name] or mine
            if named:
                open_calls.remove(named[0])
                message = replace(message, call_id=named[0].call_id)
        numbered.append(replace(message, tool_calls=tuple(calls)))
    return numbered


def read_tools(read: Reader) -> tuple[dict[str, Any], ...] | None:
    """The function tools under `tools` as Chat Completions definitions, further keys and nulls as they stand.

    The flat form of the Responses API is taken too, and JSON text, as TRL's data sets have it. Refused: tools of other
    types, two of one name, and definitions that stand under `functions` alone, the API's older form: as data, which any
    other key is, they would offer nothing.
    """
    value = read.get("tools", (list, str), "a list of function tools")
    if isinstance(value, str):
        value = _decoded(value)
        if isinstance(value, str):
            raise read.refuse("tools", "expected a list of function tools, or one as JSON text")
    if value is None:
        if _has_definitions(read.value.get("functions")):
            raise read.refuse(
                "functions", 'the older form; expected tools: [{"type": "function", "function": {...}}] in its place'
            )
        return None
    found = Reader({"tools": value}, read.where).items("tools") or []
    tools: dict[str, dict[str, Any]] = {}
    for each in found:
        tool = _tool(each)
        name = tool["function"]["name"]
        if name in tools:
            raise UserError(f"{each.where}: a second tool of the name {name!r}")
        tools[name] = tool
    return tuple(tools.values())


def _decoded(text: str) -> Any:
    """The JSON value, as strictly as a row's own; text that is none as it stands."""
    try:
        return read_strict_json(text)
    except ValueError:
        return text


def _has_definitions(functions: Any) -> bool:
    """Whether it is a list of functions for a model to call, or one of them, or JSON text of either."""
    found = _decoded(functions) if isinstance(functions, str) else functions
    each = found if isinstance(found, list) else [found]
    return any(
        isinstance(one, Mapping) and isinstance(one.get("name", one.get("function")), str | Mapping) for one in each
    )


def _tool(read: Reader) -> dict[str, Any]:
    expected = 'expected {"type": "function", "function": {"name", "description", "parameters"}}'
    if not isinstance(read.value, Mapping):
        raise UserError(f"{read.where}: {expected}, got {kind_of(read.value)}")
    if read.value.get("type") != "function":
        raise UserError(f"{read.where}: type {read.value.get('type')!r}; {expected}")
    tool = dict(read.value)
    if tool.get("function") is None and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "function")}}
    if not isinstance(tool.get("function"), Mapping):
        raise UserError(f"{read.where}: {expected}")
    function = Reader(tool["function"], read.at("function"))
    if not function.required("name"):
        raise function.refuse("name", "expected a name, got empty text")
    function.text("description")
    function.get("parameters", Mapping, "a JSON schema (an object)")
    return tool
