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
from envs.reading.json_text import read_json
from envs.types import NOT_RUN, Message
from trainer.templates.call_signs import opening_tag, tag_after
from trainer.templates.chat_template import HELLO, Renderer, TemplateRefused, calls_as_text, shape_of
from trainer.templates.detokenizer import Detokenizer
from trainer.templates.ends import PROBE_RESULT, End, find_ends, num_common
from trainer.templates.fallback import (
    ANSWER,
    FALLBACK_TEMPLATE,
    PROBE,
    PROBE_CALL,
    PROBE_TOOL,
    choose_template,
)
from trainer.templates.grammar import Grammar
from trainer.templates.local import GoneOn
from trainer.templates.special_tokens import SpecialTokens, stop_token_ids
from trainer.templates.turn_parser import (
    OfferedTools,
    ParsedTurn,
    ToolSchema,
    TurnParser,
    check_parser_names,
    tools_key,
    with_cached_vocabulary,
)

__all__ = ["FALLBACK_TEMPLATE", "Chat", "Continuation", "OfferedTools", "ParsedTurn", "TemplateRefused", "ToolSchema"]

_MOST_SHAPES = 4096
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
    text: str
    """All of the next prompt, as the template renders it."""


class Chat:
    """A tokenizer, a chat template and vLLM's parsers. Immutable; one serves all episodes.

    *Covered*: fast tokenizers; templates that end each assistant's turn with a stop token; text content.
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
        if "openai" in (tool_parser, reasoning_parser) or reasoning_parser == "openai_gptoss":
            raise UserError(
                "model.tool_parser: gpt-oss is not supported: `vllm serve` does not render its conversations by the "
                "chat template but by a program of its own (harmony), whose channels a template can't follow"
            )
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except Exception as e:  # a tokenizer with code of its own; whatever a broken file leads to
            raise UserError(f"model.name: the tokenizer of {model} can't be loaded: {' '.join(str(e).split())}") from e
        if not tokenizer.is_fast:
            raise UserError(f"model.name: the tokenizer of {model} has no tokenizer.json; a fast tokenizer is needed")
        self._tokenizer = with_cached_vocabulary(tokenizer)
        self._detokenizer = Detokenizer(tokenizer)
        self._template_kwargs = dict(template_kwargs or {})
        template, self._why_fallback = choose_template(self._tokenizer, chat_template, self._template_kwargs)
        self._renderer = Renderer(self._tokenizer, template, self._template_kwargs)
        self.uses_fallback = bool(self._why_fallback)
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self.stop_token_ids = stop_token_ids(model, tokenizer.eos_token_id)
        self._parser = self._turn_parser(tool_parser, reasoning_parser)
        probe_tool = self._parser.normalized_tools(tools_key([PROBE_TOOL]))
        self._answer_end, self._call_end = find_ends(self._tokenizer, self._renderer, self.stop_token_ids, probe_tool)
        self._taken_shapes: set[tuple[str, str]] = set()
        self._gone_on = GoneOn(self._render, template or self._tokenizer.chat_template, self._renderer.names)
        # A demonstration's prompt is the text that the turn before it was extended to.
        self._render_cached = functools.lru_cache(maxsize=16)(self._render_uncached)
        # The rollouts of a group begin alike.
        self._begun = functools.lru_cache(maxsize=16)(self._begun_uncached)
        self._prime = self._encode(self._render([HELLO], (), generate=True))[-16:]
        # Without the reasoning parser: some take a turn that closes no reasoning for nothing but reasoning.
        written = self._prove_parser(self._turn_parser(tool_parser, None))
        self._learn_signs(written)
        self.special = SpecialTokens(
            tokenizer,
            self._detokenizer,
            stop_token_ids=self.stop_token_ids,
            template_ids=set(self._encode(self._shown_whole())),
        )

    # ---- messages → token ids

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, strict: bool = True) -> list[int]:
        """The prompt of `messages`, ready for the model's turn: what `vllm serve` feeds its engine for them.

        `strict` is for conversations that a user wrote; without it a model's turns of calls that the template takes on
        no account are plain text, as `extend` writes them. Raises `TemplateRefused`, a `UserError`, where the template
        takes no such conversation.
        """
        return self.begin(messages, tools, strict=strict).token_ids

    def begin(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, strict: bool = True
    ) -> Continuation:
        """As `open`, with the text that `extend` goes on from."""
        text, token_ids = self._begun(tuple(messages), tools_key(tools), strict)
        return Continuation(token_ids=list(token_ids), forked=True, drifted=False, text=text)

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The prompt of `open`, under `strict`, as text."""
        return self._render(messages, tools, generate=True, strict=True)

    def extend(
        self,
        before: Sequence[Message],
        turn: Message,
        answers: Sequence[Message],
        tools: Sequence[ToolSchema],
        sampled: Sequence[int],
        *,
        prompt: str | None = None,
    ) -> Continuation:
        """What follows the tokens `sampled`, which were read as `turn`, and leads to the next turn.

        `before` are the messages of the prompt that they were sampled after; `answers` the tool results, or the user's
        message that answers a malformed call. The sampled tokens stay as they are: only text after the end of the turn
        is encoded. `prompt` is the text of `before`, where the caller has it of the last `begin` or `extend`. One
        rendering where the model writes as the template does, two otherwise; and under a template that writes what
        follows a prompt without regard to what stands before it, only what is new is rendered. A turn of calls that the
        template takes on no account is rendered as plain text, and its results as a user's message; raises
        `TemplateRefused` where that is refused too.
        """
        prompt = prompt or self._render(before, tools, generate=True)
        stopped = bool(sampled) and sampled[-1] in self.stop_token_ids
        written = self.decode(sampled[:-1] if stopped else sampled)
        end = self._end_of(turn)
        kept = prompt + written + end.text
        text = self._gone_on.text(prompt, before, turn, answers, tools, generate=True)
        drifted = not text.startswith(kept)
        if drifted:
            full = self._gone_on.text(prompt, before, turn, (), tools, generate=False)
            kept = self._until_end(full, num_common(prompt, full), end)
            if not (kept.startswith(prompt) and text.startswith(kept)):
                return Continuation(token_ids=self._encode(text), forked=True, drifted=False, text=text)
        glue = self._encode_after(end, text[len(kept) :])
        if not sampled or sampled[-1] != end.token_id:
            # Cut off by a limit, or stopped by another stop token: the turn is closed as the template closes it.
            glue = [end.token_id, *glue]
        drifted |= stopped and sampled[-1] != end.token_id
        return Continuation(token_ids=glue, forked=False, drifted=drifted, text=text)

    def minds_texts(
        self, before: Sequence[Message], turn: Message, answers: Sequence[Message], tools: Sequence[ToolSchema]
    ) -> bool:
        """Whether a refusal of this conversation is due to what tools or users said, and not to the model's `turn`."""
        return self._renderer.minds_texts(before, turn, answers, self._parser.normalized_tools(tools_key(tools)))

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
        end = self._end_of(turn)
        return self._encode_after(end, self._until_end(full, len(prompt), end)[len(prompt) :])

    # ---- token ids → messages

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSchema] = (), *, turn: int = 0) -> ParsedTurn:
        """Read a generation as `vllm serve` would. `turn`, its number in the episode, makes the call ids unique.

        A turn with a call that parses is a turn of calls, whatever else stands in it: serving executes those too. A
        turn with no parsed call but an unmistakable sign of one is malformed; under the parser `hermes` that is also
        the turn of several calls of which one is broken, since it then gives up all of them. So is a turn of calls
        that the template can't render (some take one call a turn): serving could not go on from it, so none of its
        calls may run. (A template that refused one text and took another in its place would be heard by `extend` only:
        turns alike but for their texts are tried once.) Raises nothing for what a model wrote.
        """
        parsed = self._parser.parse(token_ids, tools, prime=self._prime, turn=turn)
        if not parsed.message.tool_calls:
            return parsed
        # One rendering for each shape of turn, not for each turn: what templates refuse is seen in the shape.
        tools_json, shape = tools_key(tools), shape_of(parsed.message)
        if shape and (tools_json, shape) in self._taken_shapes:
            return parsed
        refusal = self._renderer.refusal(parsed.message, self._parser.normalized_tools(tools_json))
        if not refusal:
            if len(self._taken_shapes) >= _MOST_SHAPES:
                self._taken_shapes.clear()
            self._taken_shapes.add((tools_json, shape))
            return parsed
        return replace(
            parsed,
            message=calls_as_text(parsed.message),
            malformed=True,
            complaint=f"{NOT_RUN}, the chat format refuses them: {refusal}",
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included. For people and for comparison; never to be encoded again."""
        return self._detokenizer.whole(token_ids)

    # ---- answers with a form

    def grammar(self, schema: str, *, vocab_size: int) -> Grammar:
        """What may be written, stop tokens included, where the answer must fit a JSON schema."""
        return Grammar(self._tokenizer, schema, vocab_size=vocab_size, stop_token_ids=self.stop_token_ids)

    def check_response_format(self, response_format: Mapping[str, Any], schema: str) -> None:
        """Raise `UserError` where `vllm serve` would not simply constrain the answer to the schema."""
        self._parser.check_response_format(response_format, schema)

    # ---- serving

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

    def _begun_uncached(self, messages: tuple[Message, ...], tools_json: str, strict: bool) -> tuple[str, list[int]]:
        text = self._render_cached(messages, tools_json, True, strict)
        return text, self._encode(text)

    def num_tokens(self, text: str) -> int:
        return len(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        # Half a surrogate pair (escaped in JSON, or in a file name that is no UTF-8) is no text that has tokens.
        text = text.encode("utf-8", "replace").decode()
        # The tokenizer's own encoder: what stands around it makes a batch of one, which takes longer than the encoding.
        return list(self._tokenizer._tokenizer.encode(text, add_special_tokens=False).ids)

    def _until_end(self, text: str, start: int, end: End) -> str:
        """A conversation up to the end of its last turn, which begins at or after `start`.

        The end is added where the template leaves it to what follows.
        """
        at = text.rfind(end.text, start)
        return text[:at] + end.text if at >= 0 else text + end.text

    def _encode_after(self, end: End, text: str) -> list[int]:
        # Encoded behind a special token, as it stands in the ledger: some tokenizers put a space before a text's start.
        ids = self._encode(end.text + text)
        assert ids[0] == end.token_id, "a special token is encoded on its own"
        return ids[1:]

    def _turn_parser(self, tool_parser: str, reasoning_parser: str | None) -> TurnParser:
        return TurnParser(
            self._tokenizer,
            self._detokenizer,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            template_kwargs=self._template_kwargs,
            stop_token_ids=self.stop_token_ids,
        )

    def _end_of(self, turn: Message) -> End:
        return self._call_end if turn.tool_calls else self._answer_end

    def _prove_parser(self, parser: TurnParser) -> str:
        """A call as the template writes it, read back by the parser: a wrong parser would never see one."""
        prompt, answer, full = (
            self._render([HELLO, *turn], [PROBE_TOOL], generate=not turn, strict=True)
            for turn in ((), (ANSWER,), (PROBE_CALL,))
        )
        # What turns of calls and answers have in common (the turn's header, empty reasoning) is no part of the call.
        start = num_common(answer, full)
        if tag := _UNCLOSED_TAG.search(full, max(0, start - 60), start):
            start = tag.start()
        written = self._until_end(full, start, self._call_end)[start:].removesuffix(self._call_end.text)
        whole = written if start < len(prompt) else full[len(prompt) : start] + written
        for text in (written, whole) if full.startswith(prompt) else (written,):
            calls = parser.parse(self._encode_after(self._call_end, text), [PROBE_TOOL], prime=self._prime, turn=0)
            if [(c.name, read_json(c.arguments)) for c in calls.message.tool_calls] == [
                ("probe_tool", {"text": PROBE})
            ]:
                return written
        whose = f"fallback template ({self._why_fallback})" if self.uses_fallback else "chat template"
        fitting = "hermes" if self.uses_fallback else "what `vllm serve --tool-call-parser` is given for this model"
        raise UserError(
            f"model.tool_parser: {parser.tool_parser!r} does not read the calls that the {whose} writes "
            f"({written.strip()!r}); expected {fitting}"
        )

    def _shown_whole(self) -> str:
        """Conversations that show all that the template writes between texts."""
        shown = ([HELLO, PROBE_CALL, PROBE_RESULT], [HELLO, replace(ANSWER, reasoning=PROBE), HELLO])
        return "".join(self._render(messages, [PROBE_TOOL], generate=True, strict=True) for messages in shown)

    def _learn_signs(self, written_call: str) -> None:
        turns = [
            self._render([HELLO, turn], [PROBE_TOOL], generate=True, strict=True).rpartition(HELLO.content)[2]
            for turn in (ANSWER, replace(ANSWER, reasoning=PROBE))
        ]
        self._parser.learn_signs(opening_tag(written_call, "probe_tool", turns), tag_after(turns[1], PROBE))
