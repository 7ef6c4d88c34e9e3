"""Tools: from a Python function to a JSON schema, validated arguments and a result that the model can read."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import itertools
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_type_hints

import jsonschema
import referencing
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from envs.errors import ToolError, UserError
from envs.types import Task, ToolCall, ToolErrorKind, ToolResult

# asyncio's own pool has six threads on two cores: slow tools of a few episodes would fill it. These start on demand.
_THREADS = ThreadPoolExecutor(max_workers=256, thread_name_prefix="tool")
_MAX_ECHO = 60
_MAX_FAULTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A callable offered to the model."""

    name: str
    description: str
    function: Callable[..., Any]
    """Sync or async; returns text, or anything that `json.dumps` takes. Called with the arguments by name."""
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object's."""
    read_arguments: Callable[[Any], dict[str, Any]]
    """From a call's decoded arguments to the function's. Raises `ValueError` with what is wrong, for the model."""
    is_remote: bool = False
    """The function takes the `ToolCall` itself, as the model wrote it, and keeps its own time: it raises `ToolError`
    for what the model should see and `WorldError` where the tool's server failed for good."""

    def schema(self) -> dict[str, Any]:
        """The tool as Chat Completions JSON: `{"type": "function", "function": {...}}`."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": dict(self.parameters)},
        }


def tool(function: Callable[..., Any]) -> Tool:
    """Make a `Tool` of a function: types from its signature, texts from its docstring.

    The docstring's first paragraph describes the tool; entries `name: text` after a line `Args:` describe its
    parameters, and may run over several lines that are indented deeper. Raises `TypeError` for a missing docstring, for
    a parameter without an annotation or description (the model reads both), and for `*args`, `**kwargs` and
    positional-only parameters (a call names its arguments).
    """
    name = getattr(function, "__name__", repr(function))
    description, texts = _split_docstring(inspect.getdoc(function) or "")
    if not description:
        raise TypeError(f"tool {name!r} has no docstring; the model needs one to know what the tool does")
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"tool {name!r}: parameter {parameter.name!r} can't be passed by name")
        if parameter.name not in hints or parameter.name not in texts:
            raise TypeError(
                f"tool {name!r}: parameter {parameter.name!r} needs a type annotation and a line under `Args:`"
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        # The alias is what the model sees; the field's own name can't clash with pydantic's (`copy`, `json`, `_x`).
        info = Field(default, alias=parameter.name, description=texts[parameter.name])
        fields[f"arg_{parameter.name}"] = (hints[parameter.name], info)
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    return Tool(
        name=name,
        description=description,
        function=function,
        parameters=_parameters(arguments),
        read_arguments=functools.partial(_read_arguments, arguments),
    )


def _parameters(arguments: type[BaseModel]) -> dict[str, Any]:
    parameters = arguments.model_json_schema()
    parameters.pop("title", None)
    for prop in parameters.get("properties", {}).values():
        prop.pop("title", None)
    parameters.setdefault("required", [])
    return parameters


def _read_arguments(arguments: type[BaseModel], value: Any) -> dict[str, Any]:
    try:
        read = arguments.model_validate(value)
    except ValidationError as e:
        raise ValueError(_details(e)) from None
    return {info.alias or name: getattr(read, name) for name, info in arguments.model_fields.items()}


def schema_tool(definition: Mapping[str, Any], function: Callable[..., Any], *, is_remote: bool) -> Tool:
    """Make a `Tool` of a Chat Completions definition: `{"type": "function", "function": {...}}`.

    Raises `UserError` where its `parameters` are no JSON schema of an object.
    """
    about = definition["function"]
    name, parameters = about["name"], about.get("parameters") or {"type": "object", "properties": {}}
    validator = jsonschema.validators.validator_for(parameters, jsonschema.Draft202012Validator)
    try:
        validator.check_schema(parameters)
    except jsonschema.SchemaError as e:
        raise UserError(f"tool {name!r}: parameters: not a JSON schema: {e.message}") from None
    # An empty registry: references stay inside the schema, nothing is fetched.
    checker = validator(parameters, registry=referencing.Registry())

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("arguments: Input should be an object")
        faults = list(itertools.islice(checker.iter_errors(value), _MAX_FAULTS))
        if faults:
            raise ValueError("; ".join(f"{_place(tuple(f.absolute_path))}: {_cut(f.message)}" for f in faults))
        return value

    return Tool(
        name=name,
        description=about.get("description", ""),
        function=function,
        parameters=parameters,
        read_arguments=read,
        is_remote=is_remote,
    )


def offered_tools(task: Task, tools: Mapping[str, Tool]) -> dict[str, Tool]:
    """What the model is offered on this task: the tools that the row names, or all, in the row's order.

    Where the row brings a definition of a remote tool, the model sees that, and arguments are checked against it; the
    schema of a tool in process is its own, whatever the row says.
    """
    offered = {name: tools[name] for name in (tools if task.tools is None else task.tools)}
    for name, definition in task.definitions.items():
        if offered[name].is_remote:
            offered[name] = schema_tool(definition, offered[name].function, is_remote=True)
    return offered


def _split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the texts under `Args:` by parameter."""
    lines = doc.splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() == "Args:"), len(lines))
    texts: dict[str, str] = {}
    name, depth = "", 0
    for line in lines[start + 1 :]:
        indent = len(line) - len(line.lstrip())
        if not line.strip() or not indent:
            break
        if name and indent > depth:
            texts[name] = f"{texts[name]} {line.strip()}".strip()
            continue
        name, _, text = line.strip().partition(":")
        texts[name], depth = text.strip(), indent
    head = "\n".join(lines[:start]).split("\n\n")[0]
    return " ".join(head.split()), texts


async def call_tool(tools: Mapping[str, Tool], call: ToolCall, *, timeout_s: float) -> ToolResult:
    """Validate and run one call. The model's faults come back as results with `error` set.

    Sync functions run in a worker thread, so that they hold up no other episode. A tool that raises anything but
    `ToolError` (a `TimeoutError` of its own included) is the world's or our fault: the exception passes through to the
    caller. Not covered: a sync function that exceeds its time is abandoned, not stopped; its thread goes on.
    """
    start = time.perf_counter()

    def result(output: str, error: ToolErrorKind | None = None) -> ToolResult:
        return ToolResult(
            call_id=call.call_id, name=call.name, output=output, error=error, latency_s=time.perf_counter() - start
        )

    offered = tools.get(call.name)
    if offered is None:
        return result(
            f"Error: no tool named {_echo(call.name)}; use one of {', '.join(tools)}", ToolErrorKind.UNKNOWN_TOOL
        )
    try:
        arguments = json.loads(call.arguments)
    except json.JSONDecodeError as e:
        return result(f"Error: arguments are not JSON: {e.msg}", ToolErrorKind.BAD_ARGUMENTS)
    except (ValueError, RecursionError):
        # JSON that Python can't hold: integers of thousands of digits, lists nested a thousand deep.
        return result("Error: arguments are not usable JSON", ToolErrorKind.BAD_ARGUMENTS)
    try:
        kwargs = offered.read_arguments(arguments)
    except ValueError as e:
        return result(f"Error: {e}", ToolErrorKind.BAD_ARGUMENTS)
    except RecursionError:
        return result("Error: arguments are nested too deep", ToolErrorKind.BAD_ARGUMENTS)
    try:
        async with asyncio.timeout(None if offered.is_remote else timeout_s) as limit:
            value = await (offered.function(call) if offered.is_remote else _run(offered.function, kwargs))
    except ToolError as e:
        return result(f"Error: {e}", ToolErrorKind.REFUSED)
    except TimeoutError:
        if not limit.expired():
            raise
        return result(f"Error: {call.name} did not answer within {timeout_s:g} s", ToolErrorKind.TIMEOUT)
    return result(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


async def _run(function: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(**kwargs)
    in_context = functools.partial(contextvars.copy_context().run, function, **kwargs)
    value = await asyncio.get_running_loop().run_in_executor(_THREADS, in_context)
    # Callable objects and lambdas may hide a coroutine function; what they return is awaited here, on the event loop.
    return await value if inspect.isawaitable(value) else value


def _details(error: ValidationError) -> str:
    """Each fault with its place. Names that the model made up are echoed escaped and short."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:_MAX_FAULTS])


def _place(loc: tuple[int | str, ...]) -> str:
    path = ".".join(map(str, loc)) or "arguments"
    return path if path.replace(".", "").isidentifier() and len(path) <= _MAX_ECHO else _echo(path)


def _echo(text: str) -> str:
    """The model's own text, quoted, cut, and safe to encode (`repr` escapes lone surrogates)."""
    return repr(text if len(text) <= _MAX_ECHO else text[:_MAX_ECHO] + "…")


def _cut(text: str) -> str:
    """A message that holds the model's own text somewhere."""
    return (text if len(text) <= 4 * _MAX_ECHO else text[: 4 * _MAX_ECHO] + "…").encode("utf-8", "replace").decode()
