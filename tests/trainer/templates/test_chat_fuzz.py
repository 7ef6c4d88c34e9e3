"""Hostile texts through every tool parser of vLLM: nothing that a model writes raises out of parsing or calling."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import pytest

from envs.errors import UserError
from envs.tools import call_tool
from tests.support.template_families import FAMILIES, TOOLS, search, template_files
from tests.support.template_play import PLAIN, model_with
from trainer.templates.chat import Chat

_MORE_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|tool_call|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<|action_start|>",
    "<|plugin|>",
    "<|action_end|>",
    "<tool_calls>",
    "</tool_calls>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<seed:tool_call>",
    "</seed:tool_call>",
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<escape>",
    "<|tool_call_start|>",
    "<function_call>",
    "</function_call>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<｜DSML｜",
    "<longcat_tool_call>",
    "</longcat_tool_call>",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    "<function_calls>",
    "</function_calls>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]
# A call of each dialect whose argument is VALUE.
_DIALECTS = [
    '<tool_call>{"name": "search", "arguments": {"query": VALUE}}</tool_call>',
    "<tool_call>\n<function=search>\n<parameter=query>\nVALUE\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
    "<|tool_call>call:search{query:VALUE}<tool_call|>",
    "<|tool_call_start|>[search(query=VALUE)]<|tool_call_end|>",
    "[search(query=VALUE)]",
    '{"name": "search", "parameters": {"query": VALUE}}',
    '[TOOL_CALLS] [{"name": "search", "arguments": {"query": VALUE}}]',
    '[TOOL_CALLS]search[ARGS]{"query": VALUE}',
    '<|tool_call|>[{"name": "search", "arguments": {"query": VALUE}}]',
    '<|action_start|><|plugin|>\n{"name": "search", "parameters": {"query": VALUE}}<|action_end|>',
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{"query": VALUE}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n{"query": VALUE}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<seed:tool_call>\n<function=search>\n<parameter=query>VALUE</parameter>\n</function>\n</seed:tool_call>",
    '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "search", "parameters": {"query": VALUE}}]<|END_ACTION|>',
    "<start_function_call>call:search{query:VALUE}<end_function_call>",
    '<tool_calls>[{"name": "search", "arguments": {"query": VALUE}}]</tool_calls>',
    "<function_calls>[search(query=VALUE)]</function_calls>",
]
_VALUES = ["[" * 1500, "9" * 5000, r'"\ud83d"', '"Acme', "{]", '{"a": {"a": 1e999}}', "<tool_call>", ""]
_TEXTS = ["", "<tool_call>", "</tool_call></think><think>", "[TOOL_CALLS]", "\x00\x7f", "{" * 3000, "(" * 1000]


@pytest.fixture(scope="module")
def chat(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("fuzz")
    template = PLAIN.replace(
        "CALL",
        '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>',
    )
    tokens = [*_MORE_TOKENS, *(token for family in FAMILIES.values() for token in family.tokens + family.stops)]
    tokens += [token for path in template_files().values() for token in _tokens_of(path)]
    return Chat(model_with(smollm2, folder / "model", template, tokens))


def _tokens_of(path: Path) -> list[str]:
    from tests.support.template_families import _TOKEN

    return _TOKEN.findall(path.read_text())


def test_hostile_texts_raise_nothing_out_of_any_parser(chat: Chat) -> None:
    from vllm.tool_parsers import ToolParserManager

    def ids(text: str) -> list[int]:
        return [*chat._encode(text), chat._answer_end.token_id]

    odd = [ids(text) for text in _TEXTS]
    odd += [[60_000, 2**31 - 1], [*chat._encode("<tool_call>"), 49_660, *chat._encode("</tool_call>")], []]
    good = {dialect: ids(dialect.replace("VALUE", '"Acme"')) for dialect in _DIALECTS}
    hostile = {d: [ids(d.replace("VALUE", value)) for value in _VALUES] for d in _DIALECTS}
    tools = {search.name: search}
    skipped, reading = [], set()
    for name in ToolParserManager.list_registered():
        one = copy.copy(chat)
        try:
            one._parser = chat._turn_parser(name, None)
        except UserError:
            skipped.append(name)
            continue
        texts = [*odd, *good.values()]
        for dialect, plain in good.items():
            if one.parse(plain, TOOLS).message.tool_calls:
                reading.add(name)
                texts += [*hostile[dialect], plain[:-1] + plain, plain[: len(plain) // 2]]
        for text in texts:
            for call in one.parse(text, TOOLS).message.tool_calls:
                result = asyncio.run(call_tool(tools, call, timeout_s=5))
                one.num_tokens(result.output)
    assert len(skipped) < 8, skipped
    assert len(reading) > 25, reading
