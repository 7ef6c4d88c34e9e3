"""Tools: from a Python function to a JSON schema, validated arguments and a result that the model can read."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from envs.errors import ToolError
from envs.types import ToolCall, ToolErrorKind, ToolResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A callable offered to the model."""

    name: str
    description: str
    function: Callable[..., Any]
    """Sync or async; returns text, or anything that `json.dumps` takes."""
    arguments: type[BaseModel]
    """Validates a call's arguments."""

    def schema(self) -> dict[str, Any]:
        """The tool as Chat Completions JSON: `{"type": "function", "function": {...}}`."""
        parameters = self.arguments.model_json_schema()
        parameters.pop("title", None)
        for prop in parameters.get("properties", {}).values():
            prop.pop("title", None)
        parameters.setdefault("required", [])
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def tool(function: Callable[..., Any]) -> Tool:
    """Make a `Tool` of a function: types from its signature, texts from its docstring.

    The docstring's first paragraph describes the tool; lines `name: text` after `Args:` describe its parameters.
    Raises `TypeError` for a parameter without an annotation or description and for a missing docstring: the model
    reads both.
    """
    name = getattr(function, "__name__", repr(function))
    description, texts = _split_docstring(inspect.getdoc(function) or "")
    if not description:
        raise TypeError(f"tool {name!r} has no docstring; the model needs one to know what the tool does")
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.name not in hints or parameter.name not in texts:
            raise TypeError(
                f"tool {name!r}: parameter {parameter.name!r} needs a type annotation and a line under `Args:`"
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], Field(default, description=texts[parameter.name]))
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    return Tool(name=name, description=description, function=function, arguments=arguments)


def _split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    head, _, tail = doc.partition("Args:")
    texts: dict[str, str] = {}
    for line in tail.splitlines():
        name, colon, text = line.strip().partition(":")
        if colon:
            texts[name] = text.strip()
    return " ".join(head.split("\n\n")[0].split()), texts


async def call_tool(tools: Mapping[str, Tool], call: ToolCall, *, timeout_s: float) -> ToolResult:
    """Validate and run one call. The model's faults come back as results with `error` set.

    Sync functions run in a worker thread, so that they hold up no other episode. A tool that raises anything but
    `ToolError` is the world's or our fault: the exception passes through to the caller.
    """
    start = time.perf_counter()

    def result(output: str, error: ToolErrorKind | None = None) -> ToolResult:
        return ToolResult(
            call_id=call.call_id, name=call.name, output=output, error=error, latency_s=time.perf_counter() - start
        )

    offered = tools.get(call.name)
    if offered is None:
        return result(f"Error: no tool named {call.name!r}; use one of {', '.join(tools)}", ToolErrorKind.UNKNOWN_TOOL)
    try:
        parsed = json.loads(call.arguments)
        # JSON mode reads `1.0` and `"1"` as strictly as a server would; extra keys are refused.
        arguments = offered.arguments.model_validate(parsed)
    except json.JSONDecodeError as e:
        return result(f"Error: arguments are not JSON: {e.msg}", ToolErrorKind.BAD_ARGUMENTS)
    except ValidationError as e:
        details = "; ".join(f"{'.'.join(map(str, x['loc'])) or 'arguments'}: {x['msg']}" for x in e.errors())
        return result(f"Error: {details}", ToolErrorKind.BAD_ARGUMENTS)
    kwargs = {name: getattr(arguments, name) for name in offered.arguments.model_fields}
    try:
        async with asyncio.timeout(timeout_s):
            if inspect.iscoroutinefunction(offered.function):
                value = await offered.function(**kwargs)
            else:
                value = await asyncio.to_thread(offered.function, **kwargs)
    except ToolError as e:
        return result(f"Error: {e}", ToolErrorKind.REFUSED)
    except TimeoutError:
        return result(f"Error: {call.name} did not answer within {timeout_s:g} s", ToolErrorKind.TIMEOUT)
    return result(value if isinstance(value, str) else json.dumps(value))
