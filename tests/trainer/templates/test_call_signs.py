"""A failed attempt at a call is told from an answer, reasoning aside."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.templates.call_signs import after_reasoning, is_attempt, opening_tag, tag_after

NAMES = ["search", "cat", "list"]
ATTEMPTS = [
    '<tool_call>{"name": "search", "arguments": {"query": "Acme</tool_call>',
    "<tool_call>find the revenue</tool_call>",
    "<tool_call> search Acme </tool_call>",
    "<|tool_call_begin|>search",
    "Let me look. <tool_call>\n",
    '{"query": "Acme"}</tool_call>',
    "<function=search>\n<parameter=query>",
    '[TOOL_CALLS]search{"query": ',
    "<start>search",
    'I call {"name": "search", "arguments": {"query": "Acme"}}.',
    'I call {"name": "search", "arguments": {"query": "Acme',
    '```json\n{"name": "search", "arguments": {"query": "Acme"}}\n```',
    'I search:\n```json\n{"name": "search", "parameters": {"query": "Acme"}}\n```',
    '`{"name": "cat", "arguments": {}}`',
    '{"type": "function", "function": {"name": "search", "arguments": {"query": "Acme"}}}',
    '{"name": "serch", "arguments": {"query": "Acme"}}',
    '[search(query="Acme")]',
    "cat('a.txt')",
    'search (query="Acme',
    'search("Acme")\ncat("a.txt")',
    'search {"query": "Acme"}',
    'functions.search:0{"query": "Acme"}',
    '{"name": "search", "param',
    '{"name": "search"',
    '{"tool": "search", "args": {"query": "Acme"}}',
    '{"tool_calls": [{"name": "search", "arguments": {}}]}',
    '{name: "search", arguments: {query: "Acme"}}',
    '<function_call>{"name": "search", "arguments": {"query": "Acme"}}</function_call>',
    '<search>{"query": "Acme"}</search>',
    '<invoke name="search"><parameter name="query">Acme</parameter></invoke>',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search",
    'Action: search\nAction Input: {"query": "Acme"}',
    "<tool_call>查询 Acme</tool_call>",
    "<tool>search</tool>",
    "I look it up.\n<tool>search</tool>\n",
    "<tool>search</tool><query>Acme</query>",
    '<tool_name>search</tool_name>\n<parameters>{"query": "Acme"}</parameters>',
    "<use_tool>\n<tool_name>search</tool_name>\n<args>\n<query>Acme",
    '<function>search("Acme")</function>',
    '<action>search {"query": "Acme"}</action>',
    '<function name="search"><query>Acme</query></function>',
    'Let me see. <tool name="cat">a.txt</tool>',
    "call:search{query:<escape>Acme<escape>}",
    "<start_function_call>call:search{query:<escape>Acme<escape>}<end_function_call>",
    "I look it up. call:search{query:<escape>Ac",
    "<call>search{query:Acme}",
    'search{query:<|"|>Acme<|"|>}',
    "Action: search[Acme]",
    'Thought: I need it.\nAction: search {"query": "Acme"}',
    'Tool: search\nArguments: {"query": "Acme"}',
    'tool: search {"query": "Acme"}',
    "<seed:tool_call>\n<function=search>",
    '<minimax:tool_call>\n<invoke name="search">',
    '<|tools_prefix|>[{"search": {"query": "Acme"}}]<|tools_suffix|>',
    '<|action_start|><|plugin|>{"name": "search"',
    'functools[{"name": "search", "arguments": {"query": "Acme"}}]',
    '<TOOLCALL>[{"name": "search"}]</TOOLCALL>',
    '{"parameters": {"query": "Acme"}, "name": "search"}',
]
ANSWERS = [
    "42",
    "",
    "The model wrote `<tool_call>` and stopped; the value is 42.",
    "I used the <tool_call> tag once. It is 42.",
    "Between <tool_call> and </tool_call> stands JSON.",
    'Such a call reads:\n```\n<tool_call>{"name": "search", "arguments": {}}\n```\nIt found 42.',
    'After {"name": "search", "arguments": {"query": "Acme"}} had failed I found 42.',
    '{"calls": [{"name": "search", "arguments": {"query": "Acme"}}], "answer": 42}',
    '{"name": "Acme", "arguments": {"for": ["cheap"]}, "verdict": "buy"}',
    '{"name": "Acme", "parameters": {"revenue": 42}}',
    "The failures < tool calls in all years.",
    "search (twice) gave 42",
    "cat (felis catus)",
    "list (a) holds 3, list (b) holds 4",
    "search(query) finds a report, cat(path) reads it (both are tools)",
    '{"parameters": {"a": 1}, "items": [{"name": "search"}], "ok": true}',
    '[{"name": "Acme", "arguments": {"for": 1}, "verdict": "buy"}]',
    '{"tool": "search", "input": "Acme", "result": 42}',
    '{"name": "list", "kind": "tool"}',
    "The opening tag is called (<tool_call>).",
    "Tags (<tool_call>/</tool_call>) wrap a call.",
    "使用<tool_call>标签来调用工具。",
    "标签是「<tool_call>」。",
    "Das Modell schreibt «<tool_call>» vor jedem Aufruf.",
    "I used <tool>search</tool>, which gave 42.",
    "<tool>search</tool> gave 42",
    "The tool was <tool>search</tool>.",
    "I used:\n<tool>search</tool>\nIt is 42.",
    "Write `<tool>search</tool>` for it.",
    "<answer>cat</answer>",
    "<b>cat</b>",
    "<list><item>cat</item></list>",
    "<answer>42</answer>\n<tool>search</tool>",
    "<tools><tool>search</tool><tool>cat</tool></tools>",
    '<tool name="hammer">1</tool>',
    '<tool name="search"> was asked twice.',
    "call:search{query:Acme} gave 42",
    "In the call:search column stands 42.",
    "They call search{x} a functor; it is 42.",
    "Action: search again next year",
    "Action: cat (twice).",
    "Tool: search\nInput: Acme\nOutput: 42",
    'Tool: search\nArguments: {"query": "Acme"}\nIt gave 42.',
    "cat {felis: catus}",
    "The functional call is 42.",
    "Wir rufen <function> auf; das Ergebnis ist 42.",
]


@pytest.mark.parametrize("text", ATTEMPTS)
def test_a_failed_attempt_is_seen(text: str) -> None:
    assert is_attempt(text, NAMES, ["<start>"])


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_that_quotes_or_mentions_calls_is_no_attempt(text: str) -> None:
    assert not is_attempt(text, NAMES, ["<start>"])


def test_what_stands_before_the_end_of_reasoning_is_left_out_unless_nothing_follows() -> None:
    ends = ["[/THINK]", "</think>"]
    assert after_reasoning("<think>Call <tool_call>?</think>42</think>", ends) == "42</think>"
    assert after_reasoning("Hm.[/THINK]42", ends) == "42"
    assert after_reasoning("42", ends) == "42"
    assert after_reasoning("I call <tool_call></think>\n", ends) == "I call <tool_call></think>\n"


def test_the_tag_of_a_call_is_one_that_no_turn_without_calls_holds() -> None:
    elsewhere = ["<turn><think></think>Zebra.<end>"]
    assert opening_tag('<think>\n\n</think>\n\n<tool_call>{"name"', "f", elsewhere) == "<tool_call>"
    assert opening_tag("[TOOL_CALLS] [{", "f", elsewhere) == "[TOOL_CALLS]"
    assert opening_tag("f<turn><calls><invoke>", "f", elsewhere) == "<calls>"
    assert opening_tag("<function=f>", "f", elsewhere) == ""
    assert opening_tag('{"name": "f"}', "f", elsewhere) == ""
    assert tag_after("<think>\nprobe\n</think>\n\nZebra.", "probe") == "</think>"
    assert tag_after("Zebra.", "probe") == ""


HOSTILE = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "search", "arguments": ',
    '{"arguments": ',
    '{"arguments": {"name": "cat"',
    "search(",
    "search (",
    'search{"a": ',
    "call:search{",
    "<tool>search</tool> ",
    "<tool name=",
    "action:search\n",
    "action:search[] ",
    "tool: search\ninput:{",
    "\n",
    "`",
    "``` ",
    "{",
    "<",
    "[",
    "<search>",
]


@pytest.mark.parametrize("before", ["", "x "])
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_long_turn_of_openings_takes_no_time_to_speak_of(piece: str, before: str) -> None:
    """Some 0.2 s of this process for 100,000 characters; what grew with the square of the text would take minutes."""
    text = before + piece * (100_000 // len(piece)) + "x"
    start = time.process_time()
    is_attempt(text, NAMES, ["<start>"])
    assert time.process_time() - start < 5


@given(st.text(alphabet='<>{}[]()`"name:argutslc_= /|\\', max_size=60))
def test_any_text_is_judged(text: str) -> None:
    assert is_attempt(text, NAMES) in (True, False)
