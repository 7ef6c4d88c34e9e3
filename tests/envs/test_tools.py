"""Tools: schema from a function, validation of calls, faults of the model against faults of the world."""

from __future__ import annotations

import asyncio
import enum
import functools
import json
import threading
import time
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from envs.errors import ToolError, UserError, WorldError
from envs.tools import Tool, call_tool, tool
from envs.types import ToolCall, ToolErrorKind, ToolResult


@tool
def lookup(city: str, days: Annotated[int, Field(ge=1, le=7)] = 1, unit: Literal["C", "F"] = "C") -> str:
    """Weather of a city,
    day by day.

    More about it.

    Args:
        city: its name: in English
        days: how many days,
            counted from today
        unit: of the temperature

    Returns:
        text: not a parameter
    """
    return f"{city} {days!r} {unit}"


async def call(offered: Tool, arguments: object, *, name: str = "", timeout_s: float = 5) -> ToolResult:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    request = ToolCall(call_id="c1", name=name or offered.name, arguments=text)
    return await call_tool({offered.name: offered}, request, timeout_s=timeout_s)


def test_the_schema_comes_from_the_signature_and_the_docstring() -> None:
    assert lookup.schema() == {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Weather of a city,\nday by day.\n\nMore about it.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"description": "its name: in English", "type": "string"},
                    "days": {
                        "default": 1,
                        "description": "how many days, counted from today",
                        "maximum": 7,
                        "minimum": 1,
                        "type": "integer",
                    },
                    "unit": {
                        "default": "C",
                        "description": "of the temperature",
                        "enum": ["C", "F"],
                        "type": "string",
                    },
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_a_tool_without_parameters_has_an_empty_object_as_schema() -> None:
    @tool
    def now() -> str:
        """The time."""
        return "noon"

    parameters = now.schema()["function"]["parameters"]
    assert parameters == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


def undocumented(x: str) -> str:
    return x


def without_text(x: str) -> str:
    """Does it."""
    return x


def without_type(x) -> str:  # type: ignore[no-untyped-def]
    """Does it.

    Args:
        x: something
    """
    return str(x)


def with_rest(*args: str) -> str:
    """Does it.

    Args:
        args: something
    """
    return " ".join(args)


def with_keywords(**kwargs: str) -> str:
    """Does it.

    Args:
        kwargs: something
    """
    return " ".join(kwargs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (undocumented, "no docstring"),
        (without_text, "'x' needs a type annotation and a line under `Args:`"),
        (without_type, "'x' needs a type annotation"),
        (with_rest, "'args' can't be passed by name"),
        (with_keywords, "'kwargs' can't be passed by name"),
    ],
)
def test_a_function_that_the_model_could_not_understand_is_refused(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tool(function)


async def test_parameters_may_have_any_name_python_allows() -> None:
    @tool
    def odd(copy: str, json: str, schema: str, model_config: str, _x: str, arg_copy: str) -> str:
        """Does it.

        Args:
            copy: 1
            json: 2
            schema: 3
            model_config: 4
            _x: 5
            arg_copy: 6
        """
        return copy + json + schema + model_config + _x + arg_copy

    names = ["copy", "json", "schema", "model_config", "_x", "arg_copy"]
    assert list(odd.schema()["function"]["parameters"]["properties"]) == names
    assert (await call(odd, {n: str(i) for i, n in enumerate(names)})).output == "012345"


async def test_a_valid_call_gives_the_function_s_text_and_names_its_call() -> None:
    result = await call(lookup, {"city": "Rome", "days": 3})
    assert (result.output, result.error, result.call_id, result.name) == ("Rome 3 C", None, "c1", "lookup")
    assert 0 < result.latency_s < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "city: Field required"),
        ({"city": 5}, "city: Input should be a valid string"),
        ({"city": "Rome", "days": 0}, "days: Input should be greater than or equal to 1"),
        ({"city": "Rome", "days": 1.5}, "days: Input should be a valid integer"),
        ({"city": "Rome", "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        ({"city": "Rome", "town": "x"}, "town: Extra inputs are not permitted"),
        ({"city": "Rome", "arg_city": "x"}, "arg_city: Extra inputs are not permitted"),
        ({"city": "Rome", "self": 1}, "self: Extra inputs"),
        (["Rome"], "arguments: Input should be a valid dictionary"),
        ('"Rome"', "arguments: Input should be"),
        ("null", "arguments: Input should be"),
        ("", "not JSON"),
        ('{"city": "Rome"', "not JSON"),
        ("{'city': 'Rome'}", "not JSON"),
        ('{"city": ' + "9" * 5000 + "}", "not usable JSON"),
        ("[" * 100_000, "not usable JSON"),
    ],
)
async def test_arguments_that_do_not_fit_the_schema_are_shown_to_the_model(arguments: object, message: str) -> None:
    result = await call(lookup, arguments)
    assert result.error is ToolErrorKind.BAD_ARGUMENTS
    assert result.output.startswith("Error: ")
    assert message in result.output


async def test_an_unknown_tool_is_answered_with_the_names_there_are() -> None:
    result = await call(lookup, {}, name="look_up")
    assert result.error is ToolErrorKind.UNKNOWN_TOOL
    assert result.output == "Error: no tool named 'look_up'; use one of lookup"


@pytest.mark.parametrize("junk", ["\ud800", "x" * 5000])
async def test_what_the_model_made_up_is_echoed_short_and_encodable(junk: str) -> None:
    results = [
        await call(lookup, {}, name=junk),
        await call(lookup, {"city": "Rome", junk: 1}),
        await call(lookup, {f"{junk}{i}": 1 for i in range(100)}),
    ]
    for result in results:
        assert result.error is not None
        result.output.encode()
        assert len(result.output) < 800


async def test_a_tool_error_is_the_model_s_to_read() -> None:
    @tool
    def refuse() -> str:
        """Refuses."""
        raise ToolError("the door is locked")

    result = await call(refuse, {})
    assert (result.output, result.error) == ("Error: the door is locked", ToolErrorKind.REFUSED)


@pytest.mark.parametrize("fault", [WorldError("down"), RuntimeError("bug"), TimeoutError("socket"), KeyError("k")])
async def test_any_other_exception_of_a_tool_passes_through(fault: Exception) -> None:
    @tool
    def fail() -> str:
        """Fails in a thread."""
        raise fault

    @tool
    async def fail_async() -> str:
        """Fails on the loop."""
        raise fault

    for failing in (fail, fail_async):
        with pytest.raises(type(fault)) as caught:
            await call(failing, {})
        assert caught.value.args == fault.args


async def test_async_functions_async_callables_and_partials_are_awaited() -> None:
    async def answer(x: str) -> str:
        """Answers.

        Args:
            x: text
        """
        await asyncio.sleep(0)
        return x

    class Answerer:
        async def __call__(self, x: str) -> str:
            return x

    made = tool(answer)
    variants = [answer, Answerer(), functools.partial(answer), lambda x: answer(x)]
    for function in variants:
        variant = replace(made, function=function)
        assert (await call(variant, {"x": "yes"})).output == "yes"


async def test_results_that_are_not_text_are_shown_as_json() -> None:
    @tool
    def data() -> dict[str, object]:
        """Data."""
        return {"city": "Zürich", "days": [1, None]}

    assert (await call(data, {})).output == '{"city": "Zürich", "days": [1, null]}'


class Unit(enum.Enum):
    METRE = "m"


class Mode(enum.StrEnum):
    FAST = "fast"


class Place(BaseModel):
    city: str
    since: date | None = None


@dataclass
class Trip:
    to: Place
    stops: set[int]


def giving(value: object) -> Tool:
    @tool
    def data() -> object:
        """Data."""
        return value

    return data


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Place(city="Zürich", since=date(2024, 7, 26)), '{"city": "Zürich", "since": "2024-07-26"}'),
        ([Place(city="a")], '[{"city": "a", "since": null}]'),
        (Trip(Place(city="a"), {1, 2}), '{"to": {"city": "a", "since": null}, "stops": [1, 2]}'),
        (date(2024, 7, 26), '"2024-07-26"'),
        ({"at": datetime(2024, 7, 26, 8), "for": timedelta(minutes=1)}, '{"at": "2024-07-26T08:00:00", "for": "PT1M"}'),
        ({3}, "[3]"),
        (frozenset([3]), "[3]"),
        (Unit.METRE, '"m"'),
        (Mode.FAST, "fast"),
        ({Mode.FAST: Mode.FAST, Unit.METRE: Unit.METRE}, '{"fast": "fast", "m": "m"}'),
        ({date(2024, 7, 26): 1}, '{"2024-07-26": 1}'),
        (Decimal("1.50"), '"1.50"'),
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Path("a/b"), '"a/b"'),
        (b"bytes", '"bytes"'),
        ((n for n in (1, 2)), "[1, 2]"),
        (
            {"n": np.int64(3), "x": np.arange(3), "yes": np.bool_(True), "f": np.float32(0.5)},
            '{"n": 3, "x": [0, 1, 2], "yes": true, "f": 0.5}',
        ),
        (None, "null"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_results_are_written_as_json_where_python_has_a_usual_way_to(value: object, shown: str) -> None:
    assert (await call(giving(value), {})).output == shown


class Odd: ...


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (Odd(), "returned Odd, .*no JSON for the type Odd"),
        ({"x": [Odd()]}, "returned dict, .*no JSON for the type Odd"),
        (Odd, "returned type, .*no JSON for the type type"),
        (CIRCLE, "returned list, .*Circular"),
        (b"\xff", "returned bytes, .*utf-8"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_result_that_can_t_be_written_stops_the_run_with_the_tool_s_name_and_the_type(
    value: object, told: str
) -> None:
    with pytest.raises(UserError, match=f"tool 'data': {told}.*; expected text, or what can be written as JSON"):
        await call(giving(value), {})


async def test_a_call_over_its_time_is_a_time_out_for_async_and_for_sync_tools() -> None:
    released = threading.Event()

    @tool
    async def sleep() -> str:
        """Sleeps."""
        await asyncio.sleep(60)
        return ""

    @tool
    def block() -> str:
        """Blocks."""
        released.wait(60)
        return ""

    for slow in (sleep, block):
        start = time.perf_counter()
        result = await call(slow, {}, timeout_s=0.05)
        assert result.error is ToolErrorKind.TIMEOUT
        assert result.output == f"Error: {slow.name} did not answer within 0.05 s"
        assert 0.05 <= result.latency_s <= time.perf_counter() - start < 30
    released.set()


async def test_calls_of_one_turn_run_at_the_same_time() -> None:
    num_calls = 40
    together = threading.Barrier(num_calls)

    @tool
    def meet() -> str:
        """Waits until all calls are running: passes only when none waits for another."""
        together.wait(20)
        return "met"

    arrived = asyncio.Barrier(num_calls)

    @tool
    async def meet_async() -> str:
        """The same on the event loop."""
        await arrived.wait()
        return "met"

    for meeting in (meet, meet_async):
        results = await asyncio.gather(*(call(meeting, {}, timeout_s=30) for _ in range(num_calls)))
        assert [r.output for r in results] == ["met"] * num_calls


@given(arguments=st.text(max_size=80) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
async def test_whatever_the_model_writes_as_arguments_is_answered(arguments: str) -> None:
    result = await call(lookup, arguments)
    assert result.error is ToolErrorKind.BAD_ARGUMENTS
    result.output.encode()
