"""A chat template at work: messages → text as `vllm serve` renders them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from envs.errors import UserError
from envs.messages import as_object, served_form
from envs.types import Message
from trainer.templates.turn_parser import content_is_a_list

HELLO = Message(role="user", content="Hello")


_LONGEST_SHAPE = 2000


class TemplateRefused(UserError):
    """The chat template can't render a conversation. `reason` is what the template says.

    A `UserError` where the conversation is the user's own (a row, a demonstration); where a model's turn led to it, the
    rollout ends that episode alone.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"model.chat_template: it refuses the conversation: {reason}")
        self.reason = reason


class Renderer:
    """A tokenizer's template, or one that takes its place. Immutable."""

    def __init__(self, tokenizer: Any, template: str | None, template_kwargs: Mapping[str, Any]) -> None:
        """`template` None is the tokenizer's own, which may differ with and without tools."""
        self.template = template
        self._tokenizer = tokenizer
        self.names = {**tokenizer.special_tokens_map, **template_kwargs}
        """What a template may speak of besides messages and tools, as `apply_chat_template` hands it on."""

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generate: bool) -> str:
        """The text of `messages`. Raises `TemplateRefused`, whatever the template raised."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # Raises for several templates of which none is the default.
            template = self.template or self._tokenizer.get_chat_template(tools=tools)
            as_list = _content_is_a_list(template)
            # What `apply_chat_template` calls; itself it looks the special tokens up every time.
            [text], _ = render_jinja_template(
                [[served_form(m, as_list=as_list) for m in messages]],
                tools=tools,
                chat_template=template,
                add_generation_prompt=generate,
                **self.names,
            )
        except Exception as e:  # a template's own refusal, and whatever its expressions trip over (TypeError, ...)
            reason = str(e) if type(e).__module__.startswith("jinja2") else f"{type(e).__name__}: {e}"
            raise TemplateRefused(reason) from e
        return str(text)

    def refusal(self, turn: Message, tools: list[dict[str, Any]] | None) -> str:
        """Why the template takes no such assistant's turn, whatever precedes it; empty where it takes it."""
        answers = [Message(role="tool", content="ok", call_id=c.call_id, name=c.name) for c in turn.tool_calls]
        try:
            self.render([HELLO, turn, *answers], tools, generate=True)
        except TemplateRefused as e:
            return e.reason
        return ""

    def minds_texts(
        self, before: Sequence[Message], turn: Message, answers: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> bool:
        """Whether the template takes a conversation that it refused with other texts in `answers` (empty ones, say)."""
        try:
            self.render_as_text([*before, turn, *(replace(a, content="ok") for a in answers)], tools, generate=True)
        except TemplateRefused:
            return False
        return True

    def render_as_text(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generate: bool) -> str:
        """The text of `messages` with those turns of calls that the template takes on no account written as plain text.

        The results of such a turn follow as one user's message. Raises `TemplateRefused` where that is refused too.
        """
        plain: list[Message] = []
        written = False
        for message in messages:
            if message.role == "tool" and written:
                before = plain.pop() if plain[-1].role == "user" else Message(role="user")
                plain.append(replace(before, content=f"{before.content}\n{message.content}".strip("\n")))
                continue
            written = bool(message.tool_calls) and bool(self.refusal(message, tools))
            plain.append(calls_as_text(message) if written else message)
        return self.render(plain, tools, generate=generate)


def shape_of(turn: Message) -> str:
    """The turn without its texts and numbers: what stands in it, the names of its calls and arguments, their types.

    Empty for one that is too long or too deeply nested to be told so.
    """

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shape(inner) for inner in value]
        return bool(value) if isinstance(value, str) else type(value).__name__

    try:
        calls = [[call.name, shape(as_object(call.arguments))] for call in turn.tool_calls]
        text = json.dumps([bool(turn.content.strip()), bool(turn.reasoning.strip()), calls])
    except RecursionError:
        return ""
    return text if len(text) < _LONGEST_SHAPE else ""


def calls_as_text(turn: Message) -> Message:
    """The turn with its calls as part of its text."""
    calls = [f'{{"name": "{c.name}", "arguments": {c.arguments}}}' for c in turn.tool_calls]
    return replace(turn, content="\n".join(filter(None, [turn.content, *calls])), tool_calls=())


_content_is_a_list = functools.lru_cache(maxsize=32)(content_is_a_list)
