"""Schemas of tools as others write them: what can be checked is, the rest ends no run and blames no model."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import UserError
from envs.schemas.checks import argument_check, schema_error
from envs.tools import Tool, call_tool, offered_tools, schema_tool
from envs.types import Task, ToolCall, ToolErrorKind

BAD = ToolErrorKind.BAD_ARGUMENTS


async def answer(call: ToolCall) -> str:
    return call.arguments


def define(name: str = "f", **about: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **about}}


def tool_with(x: Any, *, is_strict: bool = True, **more: Any) -> Tool:
    parameters = {"type": "object", "properties": {"x": x}, **more}
    return schema_tool(define(parameters=parameters), answer, is_remote=True, is_strict=is_strict)


async def error_of(tool: Tool, text: str) -> ToolErrorKind | None:
    called = ToolCall(call_id="c", name=tool.name, arguments=text)
    return (await call_tool({tool.name: tool}, called, timeout_s=5)).error


def fits(schema: Any, x: Any, **more: Any) -> bool:
    return not argument_check({"properties": {"x": schema}, **more}, max_faults=5)({"x": x})


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Gone"},
        {"$ref": "https://example.com/x.json"},
        {"$ref": "other.json#/definitions/X"},
        {"$ref": "#/properties/x"},
        {"$ref": "#/properties/y"},
        {"allOf": [{"$ref": "#/properties/x"}]},
        {"anyOf": [{"$ref": "#/properties/x"}, {"$ref": "#/properties/y"}]},
        {"$dynamicRef": "#nowhere"},
        {"not": {"$ref": "#/$defs/Gone"}},
        {"oneOf": [{"$ref": "#/$defs/Gone"}, {"type": "integer"}]},
        {"if": {"$ref": "#/$defs/Gone"}, "then": {"type": "string"}},
        {"items": {"$ref": "#/$defs/Gone"}},
    ],
)
@pytest.mark.parametrize("value", ["1", "[1, [2]]", '{"x": {"x": 1}}'])
async def test_a_reference_that_leads_nowhere_or_in_a_circle_is_left_unchecked(schema, value):
    properties = {"x": schema, "y": {"$ref": "#/properties/x"}}
    tool = tool_with(schema, properties=properties, is_strict=False)
    assert await error_of(tool, f'{{"x": {value}}}') is None
    if "dynamic" not in str(schema):
        with pytest.raises(UserError, match=r"^tool 'f': parameters: \$ref '[^']+': leads (to nothing|round)"):
            tool_with(schema, properties=properties)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"n": {"$ref": "#/$defs/t"}}, "$defs": {"t": {"items": {"$ref": "#/$defs/t"}}}},
        {"properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"k": {"allOf": [{"$ref": "#/$defs/t"}]}}}}},
        {"$id": "https://e.com/a", "$defs": {"b": {"$id": "b", "$anchor": "c"}}, "properties": {"x": {"$ref": "b#c"}}},
        {"properties": {"$ref": {"type": "string"}, "x": {"enum": [{"$ref": "#/no"}], "default": {"$ref": "#/no"}}}},
        {"properties": {"x": {"$ref": "http://json-schema.org/draft-07/schema#"}}},
        {"$dynamicAnchor": "t", "properties": {"n": {"$dynamicRef": "#t"}}},
    ],
)
def test_references_that_can_be_followed_are_taken(parameters):
    assert schema_error(parameters) == ""


async def test_beside_a_reference_that_leads_nowhere_all_else_is_checked():
    properties = {"x": {"$ref": "#/$defs/Gone"}, "y": {"type": "integer"}}
    tool = tool_with({}, properties=properties, is_strict=False)
    assert await error_of(tool, '{"x": 1, "y": 2}') is None
    assert await error_of(tool, '{"x": 1, "y": "two"}') is BAD


async def test_a_recursive_schema_is_checked_all_the_way_down_and_the_models_depth_is_its_own_fault():
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}}}
    tool = tool_with({"$ref": "#/$defs/tree"}, **{"$defs": {"tree": tree}})

    def nested(depth: int, leaf: Any) -> str:
        return json.dumps({"x": {}}).replace("{}", '{"next": ' * depth + json.dumps({"n": leaf}) + "}" * depth)

    assert await error_of(tool, nested(30, 1)) is None
    assert await error_of(tool, nested(30, "one")) is BAD
    assert await error_of(tool, nested(900, 1)) is BAD


def test_what_the_drafts_themselves_define_can_be_referred_to():
    schema = {"$ref": "http://json-schema.org/draft-07/schema#"}
    assert fits(schema, {"type": "string"}) and not fits(schema, {"type": "thing"})


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^\p{L}+$", "été", "a1"),
        (r"^\p{Script=Greek}+$", "αβ", "ab"),
        (r"^(?<y>\d{4})-(?<m>\d\d)$", "2021-03", "21-3"),
        (r"^[\w-.]+$", "a-b.c", "a b"),
        (r"^\/a\-b$", "/a-b", "a-b"),
        ("^\\u00e9$", "é", "e"),
        ("b", "abc", "acd"),
    ],
)
def test_patterns_are_read_as_json_schema_writes_them(pattern, good, bad):
    assert fits({"pattern": pattern}, good) and not fits({"pattern": pattern}, bad)
    checked = argument_check({"patternProperties": {pattern: {"type": "integer"}}}, max_faults=5)
    assert not checked({good: 1}) and checked({good: "one"}) and not checked({bad: "one"})


UNREAD = [
    r"^\cA$",
    r"[^]",
    r"\u{1F600}",
    "(",
    r"\L<names>",
    r"^\h$",
    r"^\R\K$",
    "(?:ab){e}",
    r"^\m",
    "a" * 20_000,
    "(" * 5000,
]


@pytest.mark.parametrize("pattern", [*UNREAD, 7])
def test_a_pattern_that_cannot_be_read_is_left_unchecked(pattern):
    assert fits({"pattern": pattern}, "anything") and fits({"not": {"pattern": pattern}}, "anything")
    assert fits({}, 1, patternProperties={str(pattern): {"type": "string"}}, additionalProperties=False)
    assert not fits({"pattern": pattern, "type": "string"}, 3)


def test_a_pattern_that_would_take_hours_is_left_unchecked_after_a_moment():
    slow = {"pattern": r"^(?:(\w|\w\w|a)+)+\1$"}
    check = argument_check({"additionalProperties": slow}, max_faults=5)
    start = time.monotonic()
    assert check({str(i): "a" * 60 + "!" for i in range(50)}) == []
    assert time.monotonic() - start < 20


DOUBLING = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {"d60": {"type": "null"}}
TREE = {"properties": {"n": {"anyOf": [{"$ref": "#/$defs/t"}] * 2}}, "required": ["gone"]}


@pytest.mark.parametrize(
    ("schema", "definitions", "value"),
    [
        ({"$ref": "#/$defs/d0"}, DOUBLING, 1),
        ({"$ref": "#/$defs/t"}, {"t": TREE}, functools.reduce(lambda inner, _: {"n": inner}, range(60), {})),
        ({"pattern": r"^(?:(\w|\w\w|a)+)+\1$"}, {}, "a" * 5000 + "!"),
        ({"uniqueItems": True}, {}, [{"a": [i]} for i in range(5000)]),
        ({"patternProperties": {r"^(?:(\w|\w\w|a)+)+\1$": {}}}, {}, {"a" * 60 + f"!{i}": i for i in range(99)}),
        ({"dependentSchemas": {"a": {"$ref": "#/$defs/d0"}}}, DOUBLING, {"a": 1}),
        ({"not": {"$ref": "#/$defs/d0"}}, DOUBLING, 1),
        ({"oneOf": [{"$ref": "#/$defs/d0"}, {"unevaluatedProperties": False, "$ref": "#/$defs/d0"}]}, DOUBLING, {}),
    ],
)
async def test_a_check_that_would_never_end_holds_up_nobody_and_blames_nobody(schema, definitions, value):
    tool = tool_with(schema, **{"$defs": definitions})
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    start = time.thread_time()
    assert await error_of(tool, json.dumps({"x": value})) is None
    # The check had a thread of its own: the loop's did next to nothing, and went on meanwhile.
    assert time.thread_time() - start < 0.5
    await asyncio.sleep(0.02)
    assert ticks
    ticking.cancel()


async def test_what_a_check_finds_before_its_time_is_over_counts():
    tool = tool_with({}, properties={"a": {"type": "integer"}, "x": {"$ref": "#/$defs/d0"}}, **{"$defs": DOUBLING})
    assert await error_of(tool, '{"a": "one", "x": 1}') is BAD


@pytest.mark.parametrize(
    "schema", [{"$id": "http://["}, {"$id": "\0"}, {"$id": "http://[", "$ref": "#"}, {"$anchor": 3}]
)
async def test_what_a_validator_raises_between_keywords_ends_no_run(schema):
    assert await error_of(tool_with(schema, is_strict=False), '{"x": 1}') is None


async def test_a_schema_that_winds_round_itself_is_not_taken_for_deep_arguments():
    round_itself = {"unevaluatedProperties": False, "anyOf": [{"$ref": "#/$defs/u"}, {}]}
    tool = tool_with({"$ref": "#/$defs/u"}, is_strict=False, **{"$defs": {"u": round_itself}})
    assert await error_of(tool, '{"x": {"a": 1}}') is None


def test_properties_beyond_those_named_are_those_that_no_pattern_matches():
    strict = {"properties": {"a": {}}, "patternProperties": {r"^\p{L}{2}$": {}}, "additionalProperties": False}
    check = argument_check(strict, max_faults=5)
    assert not check({"a": 1, "éa": 2})
    assert check({"b": 1}) == [((), "Additional properties are not allowed ('b' was unexpected)")]
    typed = argument_check({**strict, "additionalProperties": {"type": "integer"}}, max_faults=5)
    assert not typed({"b": 1}) and typed({"b": "x"}) == [(("b",), "'x' is not of type 'integer'")]


@pytest.mark.parametrize(
    ("factor", "good", "bad"),
    [
        (0.01, [19.99, 0.07, 1.1, 4, 1e300, 10**400, -0.03, 0], [19.995, 0.001]),
        (0.1, [0.3, 0.7, 1e22], [0.25]),
        (1e-8, [0.00000001, 19.99], [1e-9]),
        (3, [9, 9.0, 3 * 10**400], [10, 3.5, 10**400]),
        (2.5, [5, 7.5], [6]),
    ],
)
def test_multiples_are_exact_in_the_decimals_as_written(factor, good, bad):
    assert all(fits({"multipleOf": factor}, x) for x in good) and not any(fits({"multipleOf": factor}, x) for x in bad)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 5000])
@pytest.mark.parametrize("schema", [{"type": "number"}, {"multipleOf": 0.01}, {"minimum": 0}, {}, True])
async def test_a_number_that_no_program_can_hold_is_a_bad_argument(number, schema):
    assert await error_of(tool_with(schema), f'{{"x": {number}}}') is BAD


@pytest.mark.parametrize("value", ["10", "1" * 400, "1.5e300", "0.1", "true", "null", '"1"', "[1, [2, {}]]"])
@pytest.mark.parametrize(
    "schema",
    [
        *({"type": t} for t in ("any", "dict", ["string", "unknown"], {"type": "string"}, 3, None)),
        *({"required": True}, {"properties": 3}, {"properties": {"a": "string"}}, {"items": "string"}),
        *({"enum": 3}, {"minimum": "0"}, {"multipleOf": 0}, {"multipleOf": "x"}, {"minLength": None}),
        *({"anyOf": {}}, {"allOf": 3}, {"not": "x"}, {"dependencies": [1]}, {"$ref": 7}, {"format": 3}),
        *({"maxItems": "1"}, {"propertyNames": 4}, {"contains": "x"}, {"$schema": 3}, {"$id": 3}, "nope", 3, None),
        *({"required": "abc"}, {"enum": "abc"}, {"anyOf": []}, {"oneOf": []}, {"type": []}, {"minItems": True}),
        *({"exclusiveMaximum": True}, {"not": {"const": 1, "type": "any"}}, {"maximum": "9"}),
    ],
)
async def test_what_is_no_json_schema_in_a_servers_schema_is_left_unchecked(schema, value):
    assert await error_of(tool_with(schema, is_strict=False), f'{{"x": {value}}}') is None


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"type": "object", "properties": {"x": {"type": "any"}}}, "not a JSON schema: 'any'"),
        ({"type": "object", "properties": {"x": {"type": "string", "required": True}}}, "not a JSON schema: True"),
        ({"type": "string"}, "type: expected 'object'"),
        ({"type": ["array", "null"]}, "type: expected 'object'"),
        ([], "expected a JSON schema"),
        ("object", "expected a JSON schema"),
    ],
)
def test_a_users_own_schema_that_is_none_is_refused_with_the_tools_name(parameters, expected):
    with pytest.raises(UserError, match=f"tool 'f': parameters: {expected}"):
        schema_tool(define(parameters=parameters), answer, is_remote=True)


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (True, {"x": 1}, None),
        (False, None, {"x": 1}),
        ({}, {"x": 1}, None),
        (None, {"x": 1}, None),
        ({"properties": {"x": {"type": "integer"}}}, {"x": 1}, {"x": "a"}),
        ({"type": ["object", "null"], "properties": {"x": True, "y": False}}, {"x": 1}, {"y": 1}),
        ({"properties": {"x": {"items": [{"type": "integer"}]}}}, {"x": [1, "a"]}, {"x": ["a"]}),
        ({"properties": {"x": {"minimum": 1, "exclusiveMinimum": True}}}, {"x": 2}, {"x": 1}),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "required": ["x"]}, {"x": 1}, {}),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "required": ["x"]}, {"x": 1}, {}),
        ({"$schema": "https://json-schema.org/draft/2019-09/schema", "required": ["x"]}, {"x": 1}, {}),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "required": ["x"]}, {"x": 1}, {}),
        ({"$schema": "http://json-schema.org/draft-03/schema#", "properties": {"x": {"required": True}}}, {"x": 1}, {}),
        ({"$schema": "https://example.com/mine", "required": ["x"]}, {"x": 1}, {}),
        ({"definitions": {"N": {"type": "null"}}, "properties": {"x": {"$ref": "#/definitions/N"}}}, {}, {"x": ""}),
    ],
)  # fmt: skip
async def test_schemas_of_every_draft_are_read(parameters, good, bad):
    tool = schema_tool(define(parameters=parameters), answer, is_remote=True)
    assert good is None or await error_of(tool, json.dumps(good)) is None
    assert bad is None or await error_of(tool, json.dumps(bad)) is BAD


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, 2.5, "", "a", "ab"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "x"]), inner, max_size=3),
    max_leaves=8,
)
schemas = st.recursive(
    st.sampled_from(
        [
            *({"type": t} for t in ("object", "array", "string", "integer", "number", "boolean", "null")),
            *({"multipleOf": 2}, {"pattern": "^a"}, {"enum": [1, "a", None]}, {"const": 1}, {"minimum": 1}),
            *({"uniqueItems": True}, {"required": ["a"]}, {"maxItems": 1}, {"minLength": 1}, True, False),
        ]
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"properties": st.dictionaries(st.sampled_from(["a", "x"]), inner, max_size=2)}),
        st.builds(lambda a, b: {"patternProperties": {"^a": a}, "additionalProperties": b}, inner, inner),
        st.builds(lambda key, some: {key: some}, st.sampled_from(["anyOf", "oneOf"]), st.lists(inner, min_size=1)),
        st.builds(lambda key, one: {key: one}, st.sampled_from(["not", "items", "contains", "propertyNames"]), inner),
        st.fixed_dictionaries({"if": inner, "then": inner, "else": inner}),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(deadline=None)
@given(schema=schemas, value=json_values)
def test_what_can_be_checked_is_checked_as_jsonschema_checks_it(schema, value):
    whole = {"type": "object", "properties": {"x": schema}}
    assert schema_error(whole) == ""
    theirs = jsonschema.Draft202012Validator(whole).is_valid({"x": value})
    assert (not argument_check(whole, max_faults=5)({"x": value})) == theirs


@pytest.mark.parametrize(
    "about",
    [
        {"description": "d", "strict": True, "parameters": {"type": "object", "properties": {}}},
        {"description": None, "parameters": {"properties": {}}},
        {"parameters": None},
        {"description": "", "x-mine": [1, None]},
        {},
    ],
)
def test_the_model_is_shown_a_rows_definition_as_it_stands(about):
    definition = {**define(**about), "cache": None}
    task = Task(task_id="t", messages=(), tools=("f",), definitions={"f": definition})
    known_by_rows = Tool(name="f", description="", function=answer, parameters={}, read_arguments=dict, is_remote=True)
    assert offered_tools(task, {"f": known_by_rows})["f"].schema() == definition


OWN = define(description="Say it again.", parameters={"type": "object", "properties": {"x": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (define(), OWN),
        (define(description=None, parameters=None), OWN),
        (define(description="Mine."), define(description="Mine.", parameters=OWN["function"]["parameters"])),
        (define(parameters={"type": "object"}), define(parameters={"type": "object"})),
        (define(parameters={}), define(parameters={})),
    ],
)
async def test_a_row_that_only_names_a_servers_tool_keeps_the_servers_schema(row, shown):
    own = schema_tool(OWN, answer, is_remote=True)
    offered = offered_tools(Task(task_id="t", messages=(), tools=("f",), definitions={"f": row}), {"f": own})["f"]
    assert offered.schema() == shown
    takes_text = "x" not in shown["function"]["parameters"].get("properties", {})
    assert (await error_of(offered, '{"x": "text"}') is None) == takes_text


def test_tools_that_only_a_row_can_define_are_left_out_where_the_row_names_none():
    own = schema_tool(OWN, answer, is_remote=True)
    bare = Tool(name="g", description="", function=answer, parameters={}, read_arguments=dict, is_remote=True)
    assert list(offered_tools(Task(task_id="t", messages=()), {"g": bare, "f": own})) == ["f"]


def test_a_tool_that_the_environment_does_not_have_now_is_not_offered():
    task = Task(task_id="t", messages=(), tools=("gone", "f"), definitions={"gone": define("gone")})
    assert list(offered_tools(task, {"f": schema_tool(OWN, answer, is_remote=True)})) == ["f"]


def test_keywords_that_are_null_say_nothing_and_are_shown_as_they_stand():
    about = {"type": "string", "description": None, "pattern": None, "anyOf": None, "default": None, "enum": ["a", "b"]}
    parameters = {
        "type": "object",
        "properties": {
            "x": about,
            "y": {"const": None},
            "z": {"items": None, "enum": [None, 1]},
            "enum": {"description": None, "enum": None},
            "gone": None,
        },
        "required": ["x"],
        "additionalProperties": False,
        "$defs": None,
        "title": None,
    }
    tool = schema_tool(define(parameters=parameters), answer, is_remote=True)
    assert tool.schema()["function"]["parameters"] == parameters
    assert tool.read_arguments({"x": "a", "y": None, "z": None, "enum": 3})
    for wrong in ({}, {"x": "c"}, {"x": "a", "y": 1}, {"x": "a", "z": 2}, {"x": "a", "more": 1}):
        with pytest.raises(ValueError, match=r"^(arguments|[xyz]|more): "):
            tool.read_arguments(wrong)
    empty = schema_tool(
        define(parameters={"type": "object", "properties": None, "required": None}), answer, is_remote=True
    )
    assert empty.read_arguments({}) == {}
