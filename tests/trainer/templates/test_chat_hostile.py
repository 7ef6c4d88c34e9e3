"""What a model may write under templates that think, that take one call a turn, and where vLLM's parsers raise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from envs.tools import schema_tool, tool
from envs.types import Message, StopReason, ToolCall
from tests.support.template_play import DIALECTS, PLAIN, THINKING, model_with, roll
from trainer.templates.chat import Chat, TemplateRefused

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|tool_call|>", "[TOOL_CALLS]", "<|python_tag|>")
TAGS += ("<|action_start|>", "<|plugin|>", "<|action_end|>")
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Acme"}}\n</tool_call>'
ONE_CALL = "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"


@tool
def search(query: str) -> str:
    """Find reports.

    Args:
        query: words
    """
    return f"revenue of {query}: 42"


PUT = schema_tool(
    {
        "type": "function",
        "function": {
            "name": "put",
            "parameters": {
                "type": "object",
                "properties": {"tags": {"type": "array"}, "n": {"type": "integer"}},
            },
        },
    },
    lambda **_: "ok",
    is_remote=False,
)


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(smollm2, tmp_path_factory.mktemp("hostile") / "model", None, TAGS)


@pytest.fixture(scope="module")
def make_chat(model: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("templates")
    made: dict[tuple[str, str, str | None], Chat] = {}

    def make(template: str, tool_parser: str = "hermes", reasoning_parser: str | None = None) -> Chat:
        key = (template, tool_parser, reasoning_parser)
        if key not in made:
            path = folder / f"{len(made)}.jinja"
            path.write_text(template)
            made[key] = Chat(model, tool_parser=tool_parser, reasoning_parser=reasoning_parser, chat_template=str(path))
        return made[key]

    return make


OPENED = THINKING.replace("CALL", DIALECTS["hermes"]).replace("OPENED", "<think>\n")
CLOSED = THINKING.replace("CALL", DIALECTS["hermes"]).replace("OPENED", "")


@pytest.mark.parametrize(
    ("template", "reasoning_parser", "turns"),
    [
        (OPENED, "qwen3", ["I search.\n</think>\n\n" + CALL, "It says 42.\n</think>\n\nIt is 42."]),
        (OPENED, None, ["I search.\n</think>\n\n" + CALL, "It says 42.\n</think>\n\nIt is 42."]),
        (CLOSED, "qwen3", ["<think>\nI search.\n</think>\n\n" + CALL, "<think>\nIt says 42.\n</think>\n\nIt is 42."]),
        (CLOSED, None, ["<think>\nI search.\n</think>\n\n" + CALL, "<think>\nIt says 42.\n</think>\n\nIt is 42."]),
        (CLOSED, "qwen3", [CALL, "<think></think>It is 42."]),
        (CLOSED, "qwen3", [CALL, "<think>\n\n</think>\n\nIt is 42."]),
        (CLOSED, None, [CALL, "<think>Another <tool_call>? No.</think>It is 42."]),
    ],
)
def test_an_answer_after_reasoning_is_an_answer(
    make_chat, template: str, reasoning_parser: str | None, turns: list[str]
) -> None:
    chat = make_chat(template, reasoning_parser=reasoning_parser)
    (rollout,) = roll(chat, turns, search)
    assert [t.malformed for t in rollout.episode.turns] == [False, False]
    assert rollout.episode.stop_reason is StopReason.ANSWERED
    assert rollout.episode.answer.endswith("It is 42.")


def test_a_broken_call_after_reasoning_is_still_malformed(make_chat) -> None:
    for reasoning_parser in ("qwen3", None):
        chat = make_chat(CLOSED, reasoning_parser=reasoning_parser)
        (rollout,) = roll(chat, ["<think>\nHm.\n</think>\n\n<tool_call>search Acme</tool_call>", "42"], search)
        assert [t.malformed for t in rollout.episode.turns] == [True, False]


def test_two_calls_under_a_template_that_takes_one_are_the_models_fault_and_none_is_run(make_chat) -> None:
    one = '{"name": "search", "parameters": {"query": "a"}}'
    chat = make_chat(
        PLAIN.replace("{{ m.content", ONE_CALL + "{{ m.content").replace("CALL", DIALECTS["llama3_json"]),
        "llama3_json",
    )
    done = roll(chat, [one, "42", f"{one}; {one}", "42"], search, n=4)
    assert all(r.reward == 1.0 for r in done)
    (tried,) = [r.episode for r in done if r.episode.turns[0].malformed]
    assert tried.turns[0].results == ()
    assert "one call at a time" in tried.messages[2].content
    # A conversation of another maker that holds such a turn is shown as plain text on the way, and refused as a prompt.
    calls = tuple(ToolCall(call_id=f"call0000{i}", name="search", arguments='{"query": "a"}') for i in range(2))
    turn = Message(role="assistant", tool_calls=calls)
    results = [Message(role="tool", content="42", call_id=c.call_id, name=c.name) for c in calls]
    before = [Message(role="user", content="How much?")]
    more = chat.extend(
        before, turn, results, [search.schema()], [*chat._encode(f"{one}; {one}"), chat._answer_end.token_id]
    )
    assert more.drifted
    assert chat.decode(more.token_ids) == "\n<|im_start|>user\n42\n42<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(TemplateRefused, match=r"^model\.chat_template: it refuses the conversation: one call"):
        chat.open([*before, turn, *results], [search.schema()])


def test_a_turn_of_another_shape_than_those_that_were_taken_is_tried_under_the_template(make_chat) -> None:
    texts_only = "{% for c in m.tool_calls or [] %}{% for v in c.function.arguments.values() %}{% if v is not string %}"
    texts_only += "{{ raise_exception('texts only') }}{% endif %}{% endfor %}{% endfor %}{{ m.content"
    chat = make_chat(PLAIN.replace("{{ m.content", texts_only).replace("CALL", DIALECTS["hermes"]))
    deep = "[" * 400 + "]" * 400
    said = {'"a"': False, '"b"': False, "7": True, '"c"': False, "[]": True, deep: True, '"d"': False}
    for value, malformed in said.items():
        text = f'<tool_call>{{"name": "search", "arguments": {{"query": {value}}}}}</tool_call>'
        parsed = chat.parse([*chat._encode(text), chat._answer_end.token_id], [search.schema()])
        assert parsed.malformed == malformed and ("texts only" in parsed.complaint) == malformed, value
    assert len(chat._taken_shapes) == 1


def test_whatever_a_template_raises_on_a_turn_is_a_refusal_of_that_turn(make_chat) -> None:
    """A TypeError in an expression, as well as an exception that the template raises itself."""
    dialect = DIALECTS["hermes"].replace(
        "{{ c.function.name }}", "{{ c.function.name }}{{ 1 + '' if c.function.arguments.query is number else '' }}"
    )
    chat = make_chat(PLAIN.replace("CALL", dialect))
    (rollout,) = roll(chat, [CALL.replace('"Acme"', "3"), CALL, "42"], search)
    assert [t.malformed for t in rollout.episode.turns] == [True, False, False]
    assert "TypeError" in rollout.episode.messages[2].content


XML = DIALECTS["qwen3_xml"]
GRANITE = (
    '{% if loop.first %}<|tool_call|>[{% endif %}{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}{% if loop.last %}]{% endif %}"
)
MISTRAL = (
    '{% if loop.first %}[TOOL_CALLS] [{% endif %}{"name": "{{ c.function.name }}", "arguments": '
    '{{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% if loop.last %}]{% endif %}'
)
INTERN = (
    '<|action_start|><|plugin|>\n{"name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}<|action_end|>"
)
DEEP, LONG = "[" * 1500, "9" * 5000


def xml(key: str, value: str) -> str:
    return f"<tool_call>\n<function=put>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("dialect", "parser", "texts"),
    [
        (XML, "qwen3_coder", [xml("tags", DEEP), xml("n", LONG)]),
        (DIALECTS["hermes"], "hermes", ['<tool_call>{"name": "put", "arguments": {"tags": ' + DEEP + "}}</tool_call>"]),
        (GRANITE, "granite", ['<|tool_call|>[{"name": "put", "arguments": {"n": ' + LONG + "}}]"]),
        (
            MISTRAL,
            "mistral",
            [
                '[TOOL_CALLS] [{"name": "put", "arguments": {"tags": ' + DEEP + "}}]",
                '[TOOL_CALLS] [{"name": "put", "arguments": {"n": ' + LONG + "}}]",
            ],
        ),
        (
            INTERN,
            "internlm",
            [
                '<|action_start|><|plugin|>\n{"name": "put", "parameters": {}}<|action_end|>' * 2,
                '<|action_start|><|plugin|>\n{"name": "put"<|action_end|>',
            ],
        ),
    ],
)
def test_what_a_parser_fails_on_is_a_malformed_turn_or_a_bad_argument(
    make_chat, dialect: str, parser: str, texts: list[str]
) -> None:
    chat = make_chat(PLAIN.replace("CALL", dialect), parser)
    for text in texts:
        (rollout,) = roll(chat, [text, "42"], PUT)
        first, last = rollout.episode.turns
        assert first.malformed or [r.error for r in first.results] == ["bad_arguments"]
        assert last.message.content == "42"
        assert rollout.reward == 1.0


def test_half_a_surrogate_pair_is_replaced_wherever_it_comes_from(make_chat) -> None:
    @tool
    def names() -> str:
        """List a folder."""
        return b"caf\xe9.txt".decode("utf-8", "surrogateescape")

    chat = make_chat(PLAIN.replace("CALL", DIALECTS["hermes"]))
    half = r'<tool_call>{"name": "search", "arguments": {"query": "\ud83d"}}</tool_call>'
    listing = '<tool_call>{"name": "names", "arguments": {}}</tool_call>'
    for text, shown in ((half, "revenue of ?: 42"), (listing, "caf?.txt")):
        (rollout,) = roll(chat, [text, "42"], search, names)
        assert rollout.reward == 1.0
        assert shown in chat.decode(rollout.ledgers[-1].prompt_ids)
    (rollout,) = roll(chat, ["42"], search, messages=[Message(role="user", content=json.loads(r'"What is \ud83d?"'))])
    assert "What is ??" in chat.decode(rollout.ledgers[-1].prompt_ids)


NOT_EMPTY = "{% if not m.content and not m.tool_calls %}{{ raise_exception('empty content') }}{% endif %}"


@pytest.mark.parametrize(
    ("turns", "user", "stop"),
    [
        ([CALL.replace("Acme", "nobody"), "42"], [], StopReason.WORLD_FAULT),
        (["42", "43"], [""], StopReason.WORLD_FAULT),
        (["", "43"], ["And?"], StopReason.TEMPLATE_REFUSED),
    ],
    ids=["the tool's", "the user's", "the model's"],
)
def test_a_text_that_the_template_refuses_is_the_fault_of_who_said_it(make_chat, turns, user, stop) -> None:
    @tool
    def search(query: str) -> str:
        """Find reports.

        Args:
            query: words
        """
        return "" if query == "nobody" else "42"

    template = PLAIN.replace("CALL", DIALECTS["hermes"])
    chat = make_chat(template.replace("{{ m.content | trim }}", NOT_EMPTY + "{{ m.content | trim }}"))
    (rollout,) = roll(chat, turns, search, user=user)
    assert rollout.episode.stop_reason is stop
    assert (rollout.reward is None) == (stop is StopReason.WORLD_FAULT)
    assert "empty content" in rollout.episode.error or stop is StopReason.TEMPLATE_REFUSED
