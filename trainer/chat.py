"""Messages ↔ token ids. The only owner of the tokenizer.

One turn of an episode, with `messages` all messages so far and `tools` the schemas of the tools offered:

    ledger = chat.open(messages, tools)                            # exactly what `vllm serve` would feed the model
    sampled = engine.generate(ledger)                              # never decoded and encoded again
    parsed = chat.parse(sampled, tools, turn=0)                    # by vLLM's parsers
    answers = ...                                                  # tool results, or the reply to a malformed call
    more = chat.extend(messages, parsed.message, answers, tools, sampled)
    ledger = more.token_ids if more.forked else ledger + sampled + more.token_ids
    messages = [*messages, parsed.message, *answers]
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.types import NOT_RUN, Message, ToolCall
from trainer.call_signs import opening_tag, tag_after
from trainer.chat_parsing import (
    ParsedTurn,
    ToolSchema,
    TurnParser,
    check_parser_names,
    tools_key,
    with_cached_vocabulary,
)
from trainer.chat_template import FALLBACK_TEMPLATE, Renderer, TemplateRefused, calls_as_text, read_template
from trainer.grammar import Grammar

__all__ = ["FALLBACK_TEMPLATE", "Chat", "Continuation", "ParsedTurn", "TemplateRefused", "ToolSchema"]

_PROBE = "probe text"
_PROBE_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}
_HELLO = Message(role="user", content="Hello")
_ANSWER = Message(role="assistant", content="Zebra.")
_UNCLOSED_TAG = re.compile(r"[<\[][^<>\[\]\s]*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What the model is given before a later turn."""

    token_ids: list[int]
    """The glue that follows the sampled tokens; where `forked`, the whole prompt anew."""
    forked: bool
    """The template altered earlier text (it dropped old reasoning, say): a new training row starts here."""
    drifted: bool
    """The model did not write this turn as the template writes the same message: serving would show it another text."""


class Chat:
    """A tokenizer, a chat template and vLLM's parsers. Immutable; one serves all episodes.

    *Covered*: fast tokenizers; templates that end an assistant's turn with one stop token; text content.
    *Not covered*: images, templates that need more than the messages, the tools and `template_kwargs`.
    """

    def __init__(
        self,
        model: Path,
        *,
        tool_parser: str = "hermes",
        reasoning_parser: str | None = None,
        chat_template: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the tokenizer of the folder `model` and prove that template and parsers fit each other.

        `tool_parser` and `reasoning_parser` are vLLM's names. `chat_template` is a file, or `auto`: the model's own if
        it knows tools, else the fallback, which goes with `hermes`. Raises `UserError` naming the setting at fault.
        """
        check_parser_names(tool_parser, reasoning_parser)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        if not tokenizer.is_fast:
            raise UserError(f"model.name: the tokenizer of {model} has no tokenizer.json; a fast tokenizer is needed")
        self._tokenizer = with_cached_vocabulary(tokenizer)
        self._template_kwargs = dict(template_kwargs or {})
        self._renderer = Renderer(self._tokenizer, None, self._template_kwargs)
        if chat_template != "auto":
            self._renderer = Renderer(self._tokenizer, read_template(chat_template), self._template_kwargs)
        elif not self._knows_tools():
            self._renderer = Renderer(self._tokenizer, FALLBACK_TEMPLATE.read_text(), self._template_kwargs)
        self.uses_fallback = self._renderer.template == FALLBACK_TEMPLATE.read_text()
        if chat_template != "auto" and not self._knows_tools():
            raise UserError(
                f"model.chat_template: {chat_template} renders no tools; the model would never hear of them"
            )
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self.stop_token_ids = _stop_token_ids(model, tokenizer.eos_token_id)
        self._end_text, self._end_id = self._find_end_of_turn()
        self._parser = self._turn_parser(tool_parser, reasoning_parser)
        # A turn's prompt is the text that the turn before it was extended to: it need not be rendered again.
        self._render_cached = functools.lru_cache(maxsize=512)(self._render_uncached)
        self._prime = self._encode(self._render([_HELLO], (), generate=True))[-16:]
        # Without the reasoning parser: some take a turn that closes no reasoning for nothing but reasoning.
        written = self._prove_parser(self._turn_parser(tool_parser, None))
        self._learn_signs(written)

    # ---- messages → token ids

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> list[int]:
        """The prompt of `messages`, ready for the model's turn: what `vllm serve` feeds its engine for them.

        Raises `TemplateRefused`, a `UserError`, where the template takes no such conversation.
        """
        return self._encode(self._render(messages, tools, generate=True, strict=True))

    def extend(
        self,
        before: Sequence[Message],
        turn: Message,
        answers: Sequence[Message],
        tools: Sequence[ToolSchema],
        sampled: Sequence[int],
    ) -> Continuation:
        """What follows the tokens `sampled`, which were read as `turn`, and leads to the next turn.

        `before` are the messages of the prompt that they were sampled after; `answers` the tool results, or the user's
        message that answers a malformed call. The sampled tokens stay as they are: only text after the end of the turn
        is encoded. One rendering where the model writes as the template does, two otherwise. A turn of calls that the
        template takes on no account is rendered as plain text, and its results as a user's message; raises
        `TemplateRefused` where that is refused too.
        """
        prompt = self._render(before, tools, generate=True)
        text = self._render([*before, turn, *answers], tools, generate=True)
        stopped = bool(sampled) and sampled[-1] in self.stop_token_ids
        written = self.decode(sampled[:-1] if stopped else sampled)
        kept = prompt + written + self._end_text
        drifted = not text.startswith(kept)
        if drifted:
            kept = self._through_end(self._render([*before, turn], tools, generate=False))
            if not (kept.startswith(prompt) and text.startswith(kept)):
                return Continuation(token_ids=self._encode(text), forked=True, drifted=False)
        glue = self._encode_after_turn(text[len(kept) :])
        if not sampled or sampled[-1] != self._end_id:
            # Cut off by a limit, or stopped by another stop token: the turn is closed as the template closes it.
            glue = [self._end_id, *glue]
        drifted |= stopped and sampled[-1] != self._end_id
        return Continuation(token_ids=glue, forked=False, drifted=drifted)

    def encode_assistant(
        self, messages: Sequence[Message], turn: Message, tools: Sequence[ToolSchema] = ()
    ) -> list[int]:
        """The tokens that an expert writing `turn` after `messages` generates, the stop token included.

        Raises `UserError` when the template writes a finished turn other than the one that its own generation prompt
        begins (it opens reasoning there, say): such a turn has no canonical tokens.
        """
        prompt = self._render(messages, tools, generate=True)
        full = self._render([*messages, turn], tools, generate=False)
        if not full.startswith(prompt):
            raise UserError(
                "model.chat_template: a finished assistant's turn does not begin as its generation prompt (which ends "
                f"in {prompt[-40:]!r}); scripted expert turns can't be encoded under it. Check "
                "model.chat_template_kwargs (enable_thinking, say)"
            )
        return self._encode_after_turn(self._through_end(full)[len(prompt) :])

    # ---- token ids → messages

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSchema] = (), *, turn: int = 0) -> ParsedTurn:
        """Read a generation as `vllm serve` would. `turn`, its number in the episode, makes the call ids unique.

        A turn with a call that parses is a turn of calls, whatever else stands in it: serving executes those too. A
        turn with no parsed call but an unmistakable sign of one is malformed; under the parser `hermes` that is also
        the turn of several calls of which one is broken, since it then gives up all of them. So is a turn of calls
        that the template can't render (some take one call a turn): serving could not go on from it, so none of its
        calls may run. Raises nothing for what a model wrote.
        """
        parsed = self._parser.parse(token_ids, tools, prime=self._prime, turn=turn)
        if not parsed.message.tool_calls:
            return parsed
        refusal = self._renderer.refusal(parsed.message, self._parser.normalized_tools(tools_key(tools)))
        if not refusal:
            return parsed
        return replace(
            parsed,
            message=calls_as_text(parsed.message),
            malformed=True,
            complaint=f"{NOT_RUN}, the chat format refuses them: {refusal}",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included. For people and for comparison; never to be encoded again."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    # ---- answers with a form

    def grammar(self, schema: str, *, vocab_size: int) -> Grammar:
        """What may be written, stop tokens included, where the answer must fit a JSON schema."""
        return Grammar(self._tokenizer, schema, vocab_size=vocab_size, stop_token_ids=self.stop_token_ids)

    def check_response_format(self, response_format: Mapping[str, Any], schema: str) -> None:
        """Raise `UserError` where `vllm serve` would not simply constrain the answer to the schema."""
        self._parser.check_response_format(response_format, schema)

    # ---- serving

    @property
    def end_token_id(self) -> int:
        """The stop token with which the template ends an assistant's turn."""
        return self._end_id

    def save_template(self, folder: Path) -> Path | None:
        """Write the template used beside an exported adapter; None where the model's own template is used."""
        if self._renderer.template is None:
            return None
        path = folder / "chat_template.jinja"
        path.write_text(self._renderer.template)
        return path

    def serve_arguments(self, template: Path | None) -> list[str]:
        """The arguments under which `vllm serve` renders and parses as this chat does."""
        arguments = ["--enable-auto-tool-choice", "--tool-call-parser", self.tool_parser]
        if self.reasoning_parser:
            arguments += ["--reasoning-parser", self.reasoning_parser]
        if template:
            arguments += ["--chat-template", str(template)]
        if self._template_kwargs:
            arguments += ["--default-chat-template-kwargs", json.dumps(self._template_kwargs)]
        return arguments

    # ---- inside

    def _render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], *, generate: bool, strict: bool = False
    ) -> str:
        return self._render_cached(tuple(messages), tools_key(tools), generate, strict)

    def _render_uncached(self, messages: tuple[Message, ...], tools_json: str, generate: bool, strict: bool) -> str:
        tools = self._parser.normalized_tools(tools_json)
        try:
            return self._renderer.render(messages, tools, generate=generate)
        except TemplateRefused:
            if strict:
                raise
            return self._renderer.render_as_text(messages, tools, generate=generate)

    def num_tokens(self, text: str) -> int:
        return len(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        # Half a surrogate pair (escaped in JSON, or in a file name that is no UTF-8) is no text that has tokens.
        text = text.encode("utf-8", "replace").decode()
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _through_end(self, text: str) -> str:
        return text[: text.rfind(self._end_text) + len(self._end_text)]

    def _encode_after_turn(self, text: str) -> list[int]:
        # Encoded behind a special token, as it stands in the ledger: some tokenizers put a space before a text's start.
        ids = self._encode(self._end_text + text)
        assert ids[0] == self._end_id, "a special token is encoded on its own"
        return ids[1:]

    def _knows_tools(self) -> bool:
        if self._renderer.template is None and not self._tokenizer.chat_template:
            return False
        return "probe_tool" in self._renderer.render([_HELLO], [dict(_PROBE_TOOL)], generate=True)

    def _turn_parser(self, tool_parser: str, reasoning_parser: str | None) -> TurnParser:
        return TurnParser(
            self._tokenizer,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            template_kwargs=self._template_kwargs,
            stop_token_ids=self.stop_token_ids,
        )

    def _find_end_of_turn(self) -> tuple[str, int]:
        text = self._renderer.render([_HELLO, Message(role="assistant", content=_PROBE), _HELLO], None, generate=False)
        after = text[text.find(_PROBE) + len(_PROBE) :]
        added = self._tokenizer.added_tokens_decoder
        found = [(after.find(t.content), t.content, i) for i, t in added.items() if t.special and t.content in after]
        if not found:
            raise UserError(
                "model.chat_template: it ends an assistant's turn with no special token of the model's tokenizer"
            )
        _, end_text, end_id = min(found)
        if end_id not in self.stop_token_ids:
            raise UserError(
                f"model.chat_template: it ends an assistant's turn with {end_text!r} (token {end_id}), at which the "
                "model does not stop; expected it in eos_token_id of the model's generation_config.json"
            )
        return end_text, end_id

    def _prove_parser(self, parser: TurnParser) -> str:
        """A call as the template writes it, read back by the parser: a wrong parser would never see one."""
        call = ToolCall(call_id="call00000", name="probe_tool", arguments=json.dumps({"text": _PROBE}))
        turn = Message(role="assistant", tool_calls=(call,))
        answer = self._render([_HELLO, _ANSWER], [_PROBE_TOOL], generate=False, strict=True)
        full = self._render([_HELLO, turn], [_PROBE_TOOL], generate=False, strict=True)
        # What turns of calls and answers have in common (the turn's header, empty reasoning) is no part of the call.
        start = next((i for i, (a, b) in enumerate(zip(answer, full, strict=False)) if a != b), len(full))
        if tag := _UNCLOSED_TAG.search(full, max(0, start - 60), start):
            start = tag.start()
        written = full[start : max(start, full.rfind(self._end_text))]
        ids = self._encode_after_turn(written)
        parsed = parser.parse(ids, [_PROBE_TOOL], prime=self._prime, turn=0).message.tool_calls
        if [(c.name, json.loads(c.arguments)) for c in parsed] != [("probe_tool", {"text": _PROBE})]:
            raise UserError(
                f"model.tool_parser: {parser.tool_parser!r} does not read the calls that the chat template writes "
                f"({written.strip()!r}); expected the name that `vllm serve --tool-call-parser` takes for this model"
            )
        return written

    def _learn_signs(self, written_call: str) -> None:
        thought = replace(_ANSWER, reasoning=_PROBE)
        elsewhere = [
            self._render([_HELLO, turn], [_PROBE_TOOL], generate=True, strict=True) for turn in (_ANSWER, thought)
        ]
        self._parser.learn_signs(opening_tag(written_call, elsewhere), tag_after(elsewhere[1], _PROBE))


def _stop_token_ids(model: Path, eos_token_id: int | None) -> frozenset[int]:
    """The tokens at which `vllm serve` stops: the tokenizer's, and those of generation_config.json."""
    ids = {eos_token_id} if eos_token_id is not None else set()
    path = model / "generation_config.json"
    if path.is_file():
        eos = json.loads(path.read_text()).get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else {eos} - {None}
    return frozenset(ids)
