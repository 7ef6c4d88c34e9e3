"""Whether a chat template writes what follows a prompt without regard to what stands before it.

Most do: a turn of calls and its results read the same after any conversation. Then only what is new has to be rendered,
and a turn costs the same however long the episode is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from envs.types import Message, ToolCall
from trainer.templates.chat_template import HELLO, TemplateRefused
from trainer.templates.fallback import ANSWER, PROBE_CALL, PROBE_TOOL
from trainer.templates.turn_parser import ToolSchema


class Render(Protocol):
    def __call__(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], *, generate: bool, strict: bool = False
    ) -> str: ...


def added_by(
    render: Render, turn: Message, answers: Sequence[Message], tools: Sequence[ToolSchema], *, generate: bool
) -> str | None:
    """What a turn of calls and its results add to any prompt under a local template; `generate`: the next one begins.

    None where they may change what stands before them: a user's message may (reasoning before it is dropped, say).
    """
    if not turn.tool_calls or any(answer.role != "tool" for answer in answers):
        return None
    head = render([HELLO], tools, generate=True)
    try:
        text = render([HELLO, turn, *answers], tools, generate=generate, strict=True)
    except TemplateRefused:
        return None
    return text[len(head) :] if text.startswith(head) else None


def is_local(render: Render, tools: Sequence[ToolSchema]) -> bool:
    """Whether `added_by` under these tools is what is added to conversations with a tool.

    Tried on turns of several kinds after conversations of several kinds and lengths. Those that the template refuses
    say nothing; of each kind of conversation some turn must be taken.
    """
    for before in _conversations():
        try:
            prompt = render(before, [PROBE_TOOL], generate=True, strict=True)
        except TemplateRefused:
            continue
        num_taken = 0
        for turn, *answers in _turns():
            for more, generate in ((answers, True), ([], False)):
                added = added_by(render, turn, more, tools, generate=generate)
                if added is None:
                    continue
                num_taken += 1
                try:
                    whole = render([*before, turn, *more], [PROBE_TOOL], generate=generate, strict=True)
                except TemplateRefused:
                    return False
                if whole != prompt + added:
                    return False
        if not num_taken:
            return False
    return True


def _called(number: int, *, calls: int = 1, **said: str) -> list[Message]:
    ids = [f"call{number:03d}{i:02d}" for i in range(calls)]
    made = tuple(ToolCall(call_id=i, name=c.name, arguments=c.arguments) for i in ids for c in PROBE_CALL.tool_calls)
    results = [Message(role="tool", content=f"result {i}", call_id=i, name=made[0].name) for i in ids]
    return [Message(role="assistant", tool_calls=made, **said), *results]


def _turns() -> list[list[Message]]:
    """A turn of each kind with its results."""
    return [
        _called(90),
        _called(91, calls=2),
        _called(92, reasoning="I have to look."),
        _called(93, content="I look it up."),
        _called(94, reasoning="First this.", content="I look it up."),
    ]


def _conversations() -> Iterator[list[Message]]:
    """Begun in each way, and gone on with by up to two turns, of each kind after each kind; and a long one."""
    rules = Message(role="system", content="Be brief.")
    asked = replace(HELLO, content="How much is it?")
    finished = [rules, asked, *_called(1, reasoning="I look."), replace(ANSWER, reasoning="I saw."), HELLO]
    for begun in ([asked], [rules, asked], finished):
        yield begun
        for turn in _turns():
            yield [*begun, *turn]
    for first, second in itertools.product(_turns(), repeat=2):
        yield [asked, *first, *second]
    yield [asked, *itertools.chain.from_iterable(_called(number) for number in range(1, 9))]
