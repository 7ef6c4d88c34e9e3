"""Tools: from a Python function to a JSON schema, validated arguments and a result that the model can read."""

from __future__ import annotations

import functools
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import to_jsonable_python

from envs.errors import ToolError, UserError, WorldError
from envs.limits.clocks import time_limit
from envs.reading.json_text import read_json
from envs.schemas.checks import Check, argument_check, schema_error, without_nulls
from envs.schemas.docstrings import read_docstring, split_choices
from envs.text import quoted, shown
from envs.types import Task, ToolCall, ToolErrorKind, ToolResult
from envs.user_code import call_as

_MAX_ECHO = 60
_MAX_FAULTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A callable offered to the model."""

    name: str
    description: str
    function: Callable[..., Any]
    """Sync or async, called with the arguments by name; returns text, or what `output_text` writes as JSON."""
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object's; empty where only the rows know it."""
    read_arguments: Callable[[Any], dict[str, Any]]
    """From a call's decoded arguments to the function's. Raises `ValueError` with what is wrong, for the model."""
    is_remote: bool = False
    """The function takes the `ToolCall` itself, as the model wrote it, and keeps its own time: it raises `ToolError`
    for what the model should see and `WorldError` where the tool's server failed for good."""
    definition: Mapping[str, Any] | None = None
    """Somebody else's, which the model is shown as it stands."""
    is_read_aside: bool = False
    """Somebody else's schema may take its time over what a model writes: arguments are read in a thread. Those of other
    tools are read at once, so that a turn's calls begin in their order."""

    def schema(self) -> dict[str, Any]:
        """The tool as Chat Completions JSON: `{"type": "function", "function": {...}}`."""
        if self.definition is not None:
            return dict(self.definition)
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": dict(self.parameters)},
        }


def _hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Its annotations. Raises `TypeError` for one that names what is not there (imported for type checkers alone)."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError) as e:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"tool {name!r}: an annotation can't be read: {e}") from None


def tool(function: Callable[..., Any]) -> Tool:
    """Make a `Tool` of a function: types from its signature, texts from its docstring.

    What stands before the docstring's first section describes the tool; the parameters' texts come from its section on
    arguments (Google's, NumPy's or reST's; see `envs.schemas.docstrings`), from
    `Annotated[..., Field(description=...)]` or from `Annotated[..., "text"]`. `(choices: [...])` at the end of a text
    is what the parameter may be. Raises `TypeError` for a missing docstring, for a parameter without an annotation or
    text (the model reads both), for a type that has no JSON schema, and for `*args`, `**kwargs` and positional-only
    parameters (a call names its arguments).
    """
    name = getattr(function, "__name__", repr(function))
    signature = inspect.signature(function).parameters
    hints = _hints_of(function)
    docs = read_docstring((inspect.getdoc(function) or "").strip(), _undocumented(signature, hints))
    if not docs.description:
        raise TypeError(f"tool {name!r} has no docstring; the model needs one to know what the tool does")
    fields: dict[str, Any] = {}
    for parameter in signature.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"tool {name!r}: parameter {parameter.name!r} can't be passed by name")
        text = docs.texts.get(parameter.name, _text_in(hints.get(parameter.name)))
        if parameter.name not in hints or text is None:
            raise TypeError(
                f"tool {name!r}: parameter {parameter.name!r} needs a type annotation and a line under `Args:`"
            )
        fields[f"arg_{parameter.name}"] = _field(parameter, hints[parameter.name], text)
    try:
        arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        parameters = parameters_of(arguments)
    except PydanticUserError as e:
        raise TypeError(f"tool {name!r}: a type that has no JSON schema: {str(e).splitlines()[0]}") from None
    return Tool(
        name=name,
        description=docs.description,
        function=function,
        parameters=parameters,
        read_arguments=functools.partial(_read_arguments, arguments),
    )


def _undocumented(signature: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]) -> list[str]:
    """The parameters whose texts only the docstring can have."""
    return [name for name in signature if _text_in(hints.get(name)) is None]


def _text_in(hint: Any) -> str | None:
    """The text of a parameter that stands in its annotation."""
    for extra in getattr(hint, "__metadata__", ()):
        text = extra if isinstance(extra, str) else getattr(extra, "description", None)
        if isinstance(text, str):
            return text
    return None


def _field(parameter: inspect.Parameter, hint: Any, text: str) -> Any:
    text, choices = split_choices(text)
    if choices is not None:
        hint = Annotated[hint, AfterValidator(functools.partial(_chosen, choices))]
    default = ... if parameter.default is inspect.Parameter.empty else parameter.default
    extra: Any = None if choices is None else {"enum": choices}
    # The alias is what the model sees; the field's own name can't clash with pydantic's (`copy`, `json`, `_x`).
    return hint, Field(default, alias=parameter.name, description=text, json_schema_extra=extra)


def _chosen(choices: list[Any], value: Any) -> Any:
    if value not in choices:
        raise ValueError(f"Input should be one of {json.dumps(choices, ensure_ascii=False)}")
    return value


def parameters_of(arguments: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model's fields as a tool's parameters."""
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


def schema_tool(
    definition: Mapping[str, Any], function: Callable[..., Any], *, is_remote: bool, is_strict: bool = True
) -> Tool:
    """Make a `Tool` of a Chat Completions definition: `{"type": "function", "function": {...}}`.

    The model is shown the definition as it stands. Arguments are checked against its `parameters` as far as they can be
    (see `envs.schemas.checks`); without `parameters`, or with null, any object will do. Raises `UserError` where they
    are no JSON schema of an object and `is_strict`; else what is no JSON schema in them is left unchecked.
    """
    about = definition["function"]
    name, parameters = about["name"], without_nulls(about.get("parameters"))
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if is_strict and (error := schema_error(parameters)):
        raise UserError(f"tool {name!r}: parameters: {error}")
    return Tool(
        name=name,
        description=about.get("description") or "",
        function=function,
        parameters=parameters if isinstance(parameters, Mapping) else {"type": "object"},
        read_arguments=functools.partial(_read_checked, argument_check(parameters, max_faults=_MAX_FAULTS)),
        is_remote=is_remote,
        definition=definition,
        is_read_aside=True,
    )


def _read_checked(check: Check, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("arguments: Input should be an object")
    if faults := check(value):
        raise ValueError("; ".join(f"{_place(place)}: {_cut(message)}" for place, message in faults))
    return value


def offered_tools(task: Task, tools: Mapping[str, Tool]) -> dict[str, Tool]:
    """What the model is offered on this task: the tools that the row names, or all, in the row's order.

    Where the row brings a definition of a remote tool, the model sees that, and arguments are checked against it; what
    is known of the tool already goes for a definition without `parameters`. The schema of a tool in process is its own,
    whatever the row says. A row that names no tools leaves out those that only a row can define; a tool that the row
    names and the environment does not have (yet, or any more) is not offered.
    """
    if task.tools is None:
        return {name: tool for name, tool in tools.items() if tool.parameters}
    offered = {name: tools[name] for name in task.tools if name in tools}
    for name, definition in task.definitions.items():
        if name in offered and offered[name].is_remote:
            whole = _completed(definition, offered[name])
            offered[name] = schema_tool(whole, offered[name].function, is_remote=True)
    return offered


def _completed(definition: Mapping[str, Any], known: Tool) -> Mapping[str, Any]:
    about = definition["function"]
    if about.get("parameters") is not None or not known.parameters:
        return definition
    given = {key: value for key, value in about.items() if value is not None}
    return {**definition, "function": {**known.schema()["function"], **given}}


MOST_REWARD = 1e12
"""In size. An advantage may be as large, and the gradient's norm is the root of a sum of squares in float32."""
EXPECTED_REWARD = f"expected a number from {-MOST_REWARD:g} to {MOST_REWARD:g}"


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What a tool may return in place of its output: the output, and what the call was worth.

    The reward is added to that of the episode and credited to the turn that made the call. The model reads the output
    alone.
    """

    output: Any
    reward: float


def finite_reward(value: Any, whose: str) -> float:
    """Raises `UserError` for a reward that is no finite number, `WorldError` for one that no gradient could hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        raise UserError(f"{whose}: reward: expected a finite number, got {value!r}")
    if abs(value) > MOST_REWARD:
        raise WorldError(f"{whose}: reward is {told_number(value)}; {EXPECTED_REWARD}")
    return float(value)


def told_number(value: float) -> str:
    """Of any size, in a few characters."""
    return f"{value:g}" if isinstance(value, float) else f"a whole number of {value.bit_length()} bits"


def cut_output(output: str, limit: int) -> str:
    """What a model reads of it: so many characters, and how many more there are."""
    return output if len(output) <= limit else f"{output[:limit]}\n[cut: {len(output) - limit:,} more characters]"


async def call_tool(tools: Mapping[str, Tool], call: ToolCall, *, timeout_s: float) -> ToolResult:
    """Validate and run one call. The model's faults come back as results with `error` set.

    Sync functions run in a worker thread, so that they hold up no other episode; their time begins when the thread
    does. A tool that raises anything but `ToolError` (a `TimeoutError` of its own included) is the world's or our
    fault: the exception passes through to the caller, as does `WorldError` where calls that hang have left no thread.
    Not covered: a sync function that exceeds its time is given up, not stopped; its thread goes on and is counted
    (`envs.limits.threads`). An async one that swallows its cancellation, or blocks the event loop, can't be given up.
    """
    start = time.perf_counter()

    def result(output: str, error: ToolErrorKind | None = None, reward: float | None = None) -> ToolResult:
        return ToolResult(
            call_id=call.call_id,
            name=call.name,
            output=output,
            error=error,
            latency_s=time.perf_counter() - start,
            reward=reward,
        )

    offered = tools.get(call.name)
    if offered is None:
        return result(
            f"Error: no tool named {quoted(call.name, _MAX_ECHO)}; use one of {', '.join(tools)}",
            ToolErrorKind.UNKNOWN_TOOL,
        )
    try:
        arguments = read_json(call.arguments)
    except ValueError as e:
        return result(f"Error: arguments are {e}", ToolErrorKind.BAD_ARGUMENTS)
    try:
        kwargs = await _read(offered, arguments)
    except ValueError as e:
        return result(f"Error: {e}", ToolErrorKind.BAD_ARGUMENTS)
    except RecursionError:
        return result("Error: arguments are nested too deep", ToolErrorKind.BAD_ARGUMENTS)
    try:
        async with time_limit(None if offered.is_remote else timeout_s) as limit:
            if offered.is_remote:
                value = await offered.function(call)
            else:
                value = await call_as(offered.name, offered.function, **kwargs)
    except ToolError as e:
        return result(f"Error: {e}", ToolErrorKind.REFUSED)
    except TimeoutError:
        if not limit.expired():
            raise
        return result(f"Error: {call.name} did not answer within {timeout_s:g} s", ToolErrorKind.TIMEOUT)
    reward = None
    if isinstance(value, Rewarded):
        value, reward = value.output, finite_reward(value.reward, f"tool {call.name!r}")
    try:
        return result(output_text(value), reward=reward)
    except TypeError as e:
        raise UserError(f"tool {call.name!r}: {e}; expected text, or what can be written as JSON") from None


async def _read(tool: Tool, arguments: Any) -> dict[str, Any]:
    """The function's arguments."""
    if not tool.is_read_aside:
        return tool.read_arguments(arguments)
    read: dict[str, Any] = await call_as(f"the check of {tool.name}'s arguments", tool.read_arguments, arguments)
    return read


def output_text(value: Any) -> str:
    """What the model reads of a tool's return value: text as it is, anything else as JSON.

    Written are, besides JSON's own values, those that MCP servers and FastAPI write, in pydantic's form of them:
    pydantic models, dataclasses, enums, dates, decimals, sets and generators, also as keys; and arrays and their
    numbers, by `tolist`. Raises `TypeError` that names the type. Not covered: the order of a set.
    """
    if isinstance(value, str):
        # An enum's member may be text too; `str(member)` would be its name.
        return str.__str__(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        pass
    try:
        return json.dumps(to_jsonable_python(value, fallback=_listed), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise TypeError(f"returned {type(value).__name__}, which can't be written as JSON: {e}") from None


def _listed(value: Any) -> Any:
    if not callable(tolist := getattr(type(value), "tolist", None)):
        raise TypeError(f"no JSON for the type {type(value).__name__}")
    return tolist(value)


def _details(error: ValidationError) -> str:
    """Each fault with its place. Names that the model made up are echoed escaped and short."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:_MAX_FAULTS])


def _place(loc: tuple[int | str, ...]) -> str:
    path = ".".join(map(str, loc)) or "arguments"
    return path if path.replace(".", "").isidentifier() and len(path) <= _MAX_ECHO else quoted(path, _MAX_ECHO)


def _cut(text: str) -> str:
    """A message that holds the model's own text somewhere."""
    return shown(text, 4 * _MAX_ECHO).encode("utf-8", "replace").decode()
