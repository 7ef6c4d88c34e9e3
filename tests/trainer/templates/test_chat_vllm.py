"""The contract with serving: `vllm serve`, started as an exported adapter's user would, renders and parses as we do."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from envs.types import Message, ToolCall
from trainer.templates.chat import Chat

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Find reports that hold all the words.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}, "limit": {"type": "integer", "default": 5}},
                "required": ["query"],
            },
        },
    },
    # Key order and unknown keys must not matter.
    {"function": {"parameters": {"type": "object", "properties": {}}, "name": "list", "x": 1}, "type": "function"},
]
SYSTEM = Message(role="system", content="Answer with a number.")
QUESTION = Message(role="user", content="What was Acme's revenue in 2021? Écris-le: 東京 😀\n")
CALLS = Message(
    role="assistant",
    content="Let me look.\n",
    tool_calls=(
        ToolCall(call_id="call00000", name="search", arguments='{"query": "Acmé", "limit": 3}'),
        ToolCall(call_id="call00001", name="list", arguments="{}"),
    ),
)
RESULTS = [
    Message(role="tool", content="acme/2021.txt\n", call_id="call00000", name="search"),
    Message(role="tool", content="", call_id="call00001", name="list"),
]
MALFORMED = Message(role="assistant", content='<tool_call>{"name": "search", "arg')
REPLY = Message(role="user", content="Error: that was no valid tool call.")
NOT_AN_OBJECT = Message(
    role="assistant", tool_calls=(ToolCall(call_id="call00200", name="search", arguments='"Acme"'),)
)
CONVERSATIONS = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "tool results": [SYSTEM, QUESTION, CALLS, *RESULTS],
    "two turns": [QUESTION, CALLS, *RESULTS, Message(role="assistant", content=" 5 "), REPLY],
    "malformed": [QUESTION, MALFORMED, REPLY, CALLS, *RESULTS],
    "arguments that are no object": [QUESTION, NOT_AN_OBJECT, REPLY],
    "special tokens in a result": [
        QUESTION,
        CALLS,
        RESULTS[0],
        Message(role="tool", content="<|im_end|>\n<|im_start|>"),
    ],
}
WRITINGS = {
    "call": '<tool_call>{"name": "search", "arguments": {"query": "Acmé"}}</tool_call>',
    "spaced call": 'Look: <tool_call>\n{"name":"search","arguments":{"query":"Acme","limit":3}}\n</tool_call> ok',
    "two calls": '<tool_call>{"name": "list", "arguments": {}}</tool_call>\n'
    '<tool_call>{"name": "nonesuch", "arguments": {"a": [1.50, null]}}</tool_call>',
    "one of two calls broken": '<tool_call>{"name": "list", "arguments": {}}</tool_call><tool_call>{"n</tool_call>',
    "no closing tag": '<tool_call>{"name": "list", "arguments": {}}',
    "broken": "<tool_call>search</tool_call>",
    "answer": " 1,234 . It 's 東京",
}


@pytest.fixture(scope="module")
def chat(taught_model: Path) -> Chat:
    return Chat(taught_model)


def post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"model": "policy", **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)
    except urllib.error.HTTPError as e:
        raise AssertionError(e.read().decode()) from e


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "no tools"])
def test_the_rendered_prompt_is_what_vllm_serve_renders(
    served: str, chat: Chat, messages: list[Message], tools: list[dict[str, Any]]
) -> None:
    body = {"messages": [m.to_openai() for m in messages], **({"tools": tools} if tools else {})}
    assert chat.open(messages, tools) == post(f"{served}/tokenize", body)["tokens"]


def test_turns_are_parsed_as_vllm_serve_parses_them(served: str, chat: Chat) -> None:
    """Forced writings, and free ones; the server says which tokens it parsed."""
    free: list[dict[str, Any]] = [{"temperature": 1.0, "seed": seed, "max_tokens": 40} for seed in range(6)]
    # The grammar leaves the model the choice of the tokens: often not those that the tokenizer would choose.
    forced = [
        {"temperature": 1.0, "seed": 1, "max_tokens": 300, "structured_outputs": {"choice": [text]}}
        for text in WRITINGS.values()
    ]
    body = {"messages": [QUESTION.to_openai()], "tools": TOOLS, "return_token_ids": True}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda more: post(f"{served}/v1/chat/completions", {**body, **more}), forced + free))
    written = []
    for answer in answers:
        assert answer["prompt_token_ids"] == chat.open([QUESTION], TOOLS)
        (choice,) = answer["choices"]
        turn = chat.parse(choice["token_ids"], TOOLS)
        served = choice["message"]
        assert turn.message.content == (served["content"] or "")
        assert [(c.name, c.arguments) for c in turn.message.tool_calls] == [
            (c["function"]["name"], c["function"]["arguments"]) for c in served.get("tool_calls") or []
        ]
        assert turn.finished == (choice["finish_reason"] != "length")
        written.append((chat.decode(choice["token_ids"]).removesuffix("<|im_end|>"), turn))
    for name, (text, turn) in zip(WRITINGS, written, strict=False):
        assert text == WRITINGS[name], name
        assert turn.malformed == (name in ("one of two calls broken", "broken")), name
        assert bool(turn.message.tool_calls) == (name in ("call", "spaced call", "two calls", "no closing tag")), name


def test_a_served_conversation_continues_from_the_ledger(served: str, chat: Chat) -> None:
    """Prompt, sampled tokens and glue together are the prompt of the server's next turn."""
    before = [SYSTEM, QUESTION]
    sampled = chat.encode_assistant(before, CALLS, TOOLS)
    more = chat.extend(before, CALLS, RESULTS, TOOLS, sampled)
    assert not (more.forked or more.drifted)
    body = {"messages": [m.to_openai() for m in [*before, CALLS, *RESULTS]], "tools": TOOLS}
    assert chat.open(before, TOOLS) + sampled + more.token_ids == post(f"{served}/tokenize", body)["tokens"]
