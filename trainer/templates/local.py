"""Whether a chat template writes what follows a prompt without regard to what stands before it.

Most do: a turn of calls and its results read the same after any conversation. Then only what is new has to be rendered,
and a turn costs the same however long the episode is.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from envs.types import Message, ToolCall
from trainer.templates.chat_template import HELLO, TemplateRefused
from trainer.templates.fallback import (
    ANSWER,
    FALLBACK_TEMPLATE,
    PROBE_CALL,
    PROBE_TOOL,
    added_by_fallback,
    is_shipped,
)
from trainer.templates.turn_parser import ToolSchema

_RENDERED_WHOLE = {4**i for i in range(1, 12)}


class Render(Protocol):
    def __call__(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], *, generate: bool, strict: bool = False
    ) -> str: ...


class Added(Protocol):
    """What a turn and its answers add to any prompt; None where that depends on the prompt."""

    def __call__(self, turn: Message, answers: Sequence[Message], *, generate: bool) -> str | None: ...


class GoneOn:
    """Conversations that go on, rendered from where they stood as far as the template allows it.

    Only templates that are shipped: probes can't know what one of a user's looks at.
    """

    def __init__(self, render: Render, template: Any, names: Mapping[str, Any]) -> None:
        """`template` is the text of the one that `render` uses, `names` what it is given besides the messages."""
        self._render = render
        self._template = template
        self._names = names

    def text(
        self,
        prompt: str,
        before: Sequence[Message],
        turn: Message,
        answers: Sequence[Message],
        tools: Sequence[ToolSchema],
        *,
        generate: bool,
    ) -> str:
        """The whole conversation, of which `prompt` is what `before` was rendered to. `generate`: a turn begins."""
        if (added_by := self._added_by(tools)) and not _is_rendered_whole(before, prompt):
            added = added_by(turn, answers, generate=generate)
            if added is not None:
                return prompt + added
        return self._render([*before, turn, *answers], tools, generate=generate)

    def _added_by(self, tools: Sequence[ToolSchema]) -> Added | None:
        if self._is_by_hand:
            return self._by_hand
        return functools.partial(added_by, self._render, tools) if self._is_local else None

    @functools.cached_property
    def _is_by_hand(self) -> bool:
        return self._template == FALLBACK_TEMPLATE.read_text() and is_added(self._render, self._by_hand)

    @functools.cached_property
    def _is_local(self) -> bool:
        return isinstance(self._template, str) and is_shipped(self._template) and is_local(self._render, [PROBE_TOOL])

    def _by_hand(self, turn: Message, answers: Sequence[Message], *, generate: bool) -> str | None:
        if not _is_of_calls(turn, answers):
            return None
        try:
            return added_by_fallback(turn, answers, str(self._names["eos_token"]), generate=generate)
        except RecursionError:
            # Arguments nested too deep, which the template refuses.
            return None


def _is_rendered_whole(before: Sequence[Message], prompt: str) -> bool:
    """Of some conversations, whichever run they stand in, all is rendered now and then, less often the longer they are:
    were the proof fooled, the row would fork."""
    return len(before) // 2 in _RENDERED_WHOLE and zlib.crc32(prompt.encode("utf-8", "replace")) % 8 == 0


def _is_of_calls(turn: Message, answers: Sequence[Message]) -> bool:
    return bool(turn.tool_calls) and all(answer.role == "tool" for answer in answers)


def added_by(
    render: Render, tools: Sequence[ToolSchema], turn: Message, answers: Sequence[Message], *, generate: bool
) -> str | None:
    """What a turn of calls and its results add to any prompt under a local template; `generate`: the next one begins.

    None where they may change what stands before them: a user's message may (reasoning before it is dropped, say).
    """
    if not _is_of_calls(turn, answers):
        return None
    head = render([HELLO], tools, generate=True)
    try:
        text = render([HELLO, turn, *answers], tools, generate=generate, strict=True)
    except TemplateRefused:
        return None
    return text[len(head) :] if text.startswith(head) else None


def is_local(render: Render, tools: Sequence[ToolSchema]) -> bool:
    """Whether `added_by` under these tools is what is added to conversations with a tool."""
    return is_added(render, functools.partial(added_by, render, tools))


def is_added(render: Render, added_by: Added) -> bool:
    """Whether that is what is added to conversations with a tool.

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
                added = added_by(turn, more, generate=generate)
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
