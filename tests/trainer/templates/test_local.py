"""Only what is new is rendered, where a template writes it without regard to what stands before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from envs.types import Message, ToolCall
from tests.support.template_families import FAMILIES, family_chat
from tests.support.template_play import DIALECTS, TOY_TEMPLATE
from trainer.templates.chat import Chat, TemplateRefused
from trainer.templates.fallback import PROBE_TOOL
from trainer.templates.local import added_by, is_local

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Find.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]
THROUGH = [name for name, family in FAMILIES.items() if not family.refused]
NOT_LOCAL = {
    "tells how many messages there are": TOY_TEMPLATE.replace(
        "{%- for m in messages -%}", "{{ messages | length }}{%- for m in messages -%}"
    ),
    "numbers its messages": TOY_TEMPLATE.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}"),
    "cuts old results": TOY_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if m.role != 'tool' or loop.revindex < 4 else '[cut]' }}"
    ),
}


def toy(smollm2: Path, folder: Path, template: str) -> Chat:
    path = folder / "template.jinja"
    path.write_text(template.replace("CALL_FORMAT", DIALECTS["hermes"]))
    return Chat(smollm2, chat_template=str(path))


def random_turn(rng: random.Random, number: int) -> tuple[Message, list[Message]]:
    """Calls with results, mostly; now and then an answer and a further question."""
    words = rng.choice(["", "I look.", "</tool_call> 7 ünits\n\n"])
    reasoning = rng.choice(["", "Let me see."])
    if rng.random() < 0.15:
        return Message(role="assistant", content="It is 42.", reasoning=reasoning), [
            Message(role="user", content="Sure?")
        ]
    ids = [f"call{number:03d}{i:02d}" for i in range(rng.choice([1, 1, 2]))]
    calls = tuple(ToolCall(call_id=i, name="search", arguments='{"query": "a b"}') for i in ids)
    turn = Message(role="assistant", content=words, reasoning=reasoning, tool_calls=calls)
    return turn, [Message(role="tool", content=f"{i}\n", call_id=i, name="search") for i in ids]


@pytest.mark.parametrize("name", THROUGH)
def test_what_is_added_is_what_the_whole_conversation_reads(name: str, smollm2: Path, tmp_path: Path) -> None:
    """Long episodes of turns of every kind, gone on with turn by turn, under every template that trl and vLLM ship."""
    chat = family_chat(smollm2, tmp_path / name, name)
    num_compared = 0
    for seed in range(4):
        rng = random.Random(seed)
        messages = [Message(role="user", content="How much?")]
        last = chat.begin(messages, TOOLS)
        for number in range(12):
            turn, answers = random_turn(rng, number)
            sampled = chat._encode("something else") if rng.random() < 0.5 else None
            try:
                whole = chat.prompt_text([*messages, turn, *answers], TOOLS)
            except TemplateRefused:
                continue
            written = sampled or chat._encode(whole[len(last.text) :][:40])
            last = chat.extend(messages, turn, answers, TOOLS, written, prompt=last.text)
            assert last.text == whole
            messages += [turn, *answers]
            num_compared += 1
    assert num_compared > 10


HOSTILE = ["", "\n", " a ", "<tool_call>", "</think>", "é \u2028", "{{ x }} {% y %}", "'\"&<>\\", "<|im_end|>\n"]
ARGUMENTS = [
    '{"a": 1.50, "b": [1, 2, {"c": "é\\u00e9\\n\\"<&>"}]}',
    *("{}", "null", "not json", "[1]", '{"a": NaN, "b": 1e999, "c": 1e400}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}'),
    '{"a":' * 150 + "1" + "}" * 150,
]


def test_what_the_fallback_adds_is_written_by_hand_as_the_template_writes_it(smollm2: Path) -> None:
    chat, rng = Chat(smollm2), random.Random(0)
    assert chat.uses_fallback and chat._gone_on._is_by_hand
    for _ in range(2000):
        calls = tuple(
            ToolCall(call_id=f"call{i:05d}", name=rng.choice(["f", 'se"é']), arguments=rng.choice(ARGUMENTS))
            for i in range(rng.choice([1, 2, 3]))
        )
        turn = Message(role="assistant", content=rng.choice(HOSTILE), reasoning=rng.choice(HOSTILE), tool_calls=calls)
        answers = [Message(role="tool", content=rng.choice(HOSTILE), call_id=c.call_id, name=c.name) for c in calls]
        for more, generate in ((answers, True), ([], False)):
            by_hand = chat._gone_on._by_hand(turn, more, generate=generate)
            assert by_hand == added_by(chat._render, [], turn, more, generate=generate)


@pytest.mark.parametrize("why", NOT_LOCAL)
def test_a_template_that_looks_at_what_stands_before_is_rendered_whole(why: str, smollm2: Path, tmp_path: Path) -> None:
    assert is_local(toy(smollm2, tmp_path, TOY_TEMPLATE)._render, [PROBE_TOOL])
    assert not is_local(toy(smollm2, tmp_path, NOT_LOCAL[why])._render, [PROBE_TOOL])


FOOLING = {
    "long results are cut later": TOY_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if loop.revindex < 5 or m.content | length < 100 else '[cut]' }}"
    ),
    "much of it is left out": TOY_TEMPLATE.replace("for m in messages", "for m in messages[:1] + messages[1:][-24:]"),
    "a word of the system message": TOY_TEMPLATE.replace(
        "{{ m.role }}", "{{ m.role }}{{ ' careful' if 'secret' in messages[0].content and m.role == 'tool' }}"
    ),
    "a tool's name": TOY_TEMPLATE.replace(
        "{{ m.role }}", "{{ m.role }}{{ ' hit' if tools and tools[0].function.name == 'search' and m.role == 'tool' }}"
    ),
}


@pytest.mark.parametrize("why", FOOLING)
def test_a_template_of_a_users_own_is_rendered_whole_whatever_the_probes_say(
    why: str, smollm2: Path, tmp_path: Path
) -> None:
    chat = toy(smollm2, tmp_path, FOOLING[why])
    assert is_local(chat._render, [PROBE_TOOL]), "the probes do not see it"
    messages = [Message(role="system", content="It is a secret."), Message(role="user", content="How much?")]
    text = chat.begin(messages, TOOLS).text
    for number in range(20):
        calls = (ToolCall(call_id=f"call{number:05d}", name="search", arguments='{"query": "a"}'),)
        turn = Message(role="assistant", tool_calls=calls)
        answers = [Message(role="tool", content="long " * 40, call_id=calls[0].call_id, name="search")]
        text = chat.extend(messages, turn, answers, TOOLS, chat._encode("x"), prompt=text).text
        messages += [turn, *answers]
        assert text == chat.prompt_text(messages, TOOLS)


def test_texts_are_encoded_and_rendered_as_transformers_does(smollm2: Path) -> None:
    chat = Chat(smollm2)
    for text in ("", " a", "a\n\n<|im_end|>\nb", "Ünïcödé 42.5%", "x" * 5000):
        assert chat._encode(text) == chat._tokenizer.encode(text, add_special_tokens=False)
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="How much?")]
    theirs = chat._tokenizer.apply_chat_template(
        [m.to_openai() for m in messages],
        tools=chat._parser.normalized_tools('[{"type": "function", "function": {"name": "f"}}]'),
        chat_template=chat._renderer.template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert chat.prompt_text(messages, [{"type": "function", "function": {"name": "f"}}]) == theirs
