"""Tools without an environment: plain functions, and the tool objects of agent frameworks, as they are.

An agent framework's tool is any object with a name, a description, a JSON schema of its arguments and a way to be
called, each under one of the names below. What a tool raises is shown to the model, as frameworks and trl show it;
`WorldError` aside. What it returns is shown as text or JSON (see `envs.tools.output_text`), or else as `str` gives it.

*Covered*: langchain-core's and smolagents' tools (tested). *Not covered*: tools that need their framework's context (an
agent's state, injected arguments).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from envs.custom.trl_schema import trl_schema
from envs.errors import ToolError, UserError, WorldError
from envs.tools import Tool, output_text, parameters_of, schema_tool, tool
from envs.types import Episode, Task
from envs.user_code import call_user

_SCHEMAS = (
    "params_json_schema",
    "tool_call_schema",
    "args_schema",
    "parameters",
    "input_schema",
    "inputSchema",
    "inputs",
)
_BY_NAME = ("function", "fn", "func", "entrypoint", "forward")
_BY_DICT = ("ainvoke", "invoke", "run")


def is_toolbox(target: Any) -> bool:
    """Whether a config's target is tools rather than what makes an environment."""
    if isinstance(target, list | tuple):
        return bool(target)
    if isinstance(target, Tool) or _is_frameworks(target):
        return True
    return inspect.isfunction(target) and bool(_required(target)) and _as_function(target) is not None


def read_toolbox(target: Any, where: str) -> dict[str, Tool]:
    """The tools by name. Raises `UserError` for what is none, and for two of one name."""
    tools: dict[str, Tool] = {}
    for one in target if isinstance(target, list | tuple) else [target]:
        made = _tool_of(one, where)
        if made.name in tools:
            raise UserError(f"{where}: two tools are named {made.name!r}")
        tools[made.name] = made
    return tools


class ToolboxEnv:
    """Implements `envs.base.Env`. Nothing is prepared or released: all episodes share the tools."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.tools = tools

    async def open(self, task: Task, rollout_id: str) -> None: ...

    async def close(self, episode: Episode | None) -> None: ...


def _tool_of(one: Any, where: str) -> Tool:
    if isinstance(one, Tool):
        return one
    if _is_frameworks(one):
        return _frameworks_tool(one, where)
    if callable(one) and hasattr(one, "__name__"):
        try:
            made = tool(one)
        except TypeError as e:
            raise UserError(f"{where}: {e}") from None
        shown = _shown(lambda arguments: call_user(one, **arguments))
        return replace(made, function=shown, definition=trl_schema(one, only_true=True))
    raise UserError(
        f"{where}: expected functions, or objects with name, description, a JSON schema ({', '.join(_SCHEMAS)}) and a "
        f"way to be called, got {type(one).__name__}"
    )


def _as_function(function: Callable[..., Any]) -> Tool | None:
    try:
        return tool(function)
    except TypeError:
        return None


def _required(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]


def _is_frameworks(one: Any) -> bool:
    named = not isinstance(one, type) and isinstance(getattr(one, "name", None), str)
    return named and isinstance(getattr(one, "description", None), str) and _schema_of(one) is not None


def _schema_of(one: Any) -> dict[str, Any] | None:
    """The JSON schema of the arguments: a dict, a pydantic class, or smolagents' properties by name."""
    for name in _SCHEMAS:
        found = getattr(one, name, None)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return {k: v for k, v in parameters_of(found).items() if k != "description"}
        if isinstance(found, Mapping):
            return _of_inputs(found) if name == "inputs" else dict(found)
    inner = getattr(getattr(one, "function_schema", None), "json_schema", None)
    return dict(inner) if isinstance(inner, Mapping) else None


def _of_inputs(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    properties = {
        name: {key: value for key, value in about.items() if key != "nullable" and about.get("type") != "any"}
        for name, about in inputs.items()
    }
    required = [name for name, about in inputs.items() if not about.get("nullable")]
    return {"type": "object", "properties": properties, "required": required}


def _frameworks_tool(one: Any, where: str) -> Tool:
    definition = {
        "type": "function",
        "function": {"name": one.name, "description": one.description, "parameters": _schema_of(one)},
    }
    call = _way_to_call(one)
    if call is None:
        known = ", ".join((*_BY_NAME, *_BY_DICT))
        raise UserError(f"{where}: tool {one.name!r} can't be called; expected one of {known}")
    return schema_tool(definition, _shown(call), is_remote=False, is_strict=False)


def _shown(call: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    async def function(**arguments: Any) -> str:
        try:
            value = await call(arguments)
        except (WorldError, ToolError):
            raise
        except Exception as e:
            raise ToolError(str(e) or type(e).__name__) from e
        return _as_text(value)

    return function


def _way_to_call(one: Any) -> Callable[[dict[str, Any]], Any] | None:
    if callable(handler := getattr(one, "on_invoke_tool", None)):
        return lambda arguments: call_user(handler, None, json.dumps(arguments, ensure_ascii=False))
    for name in _BY_DICT[:2]:
        if callable(invoke := getattr(one, name, None)) and hasattr(one, "args_schema"):
            return lambda arguments: call_user(invoke, arguments)
    for name in _BY_NAME:
        if callable(function := getattr(one, name, None)):
            return lambda arguments: call_user(function, **arguments)
    for name in _BY_DICT:
        if callable(run := getattr(one, name, None)):
            return lambda arguments: call_user(run, **arguments)
    return None


def _as_text(value: Any) -> str:
    try:
        return output_text(value)
    except TypeError:
        return str(value)
