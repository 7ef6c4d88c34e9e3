"""A generated turn, read as `vllm serve` reads it: reasoning, content and tool calls, by vLLM's own parsers.

Every import of vLLM that the chat needs stands in this file; the names are the same from vLLM 0.25.1 to 0.31.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.errors import UserError
from envs.types import Message, ToolCall
from trainer.templates.call_signs import after_reasoning, is_attempt
from trainer.templates.detokenizer import Detokenizer

ToolSchema = Mapping[str, Any]
"""A tool as Chat Completions JSON: `{"type": "function", "function": {...}}`."""


_MOST_KEPT = 1024
"""Lists of tools of which something is kept."""
_OF_GPT_OSS = {"openai", "openai_gptoss"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What one generation said."""

    message: Message
    """The assistant's message as a client of `vllm serve` gets it."""
    malformed: bool
    """It tried to call a tool and no call of it can be run. Never a final answer."""
    num_reasoning_tokens: int
    """As vLLM's reasoning parser counts them; the tags are not counted."""
    finished: bool
    """It ended with a stop token; False when a limit cut it off."""
    complaint: str = ""
    """What the model is to be told of a malformed turn, where that is more than that no call could be read."""


class TurnParser:
    """vLLM's tool and reasoning parser under one tokenizer.

    *Covered*: every parser that `vllm serve` composes for Chat Completions without streaming, `tool_choice="auto"`.
    *Not covered*: gpt-oss's harmony format, slow tokenizers, call ids that the parser itself chooses (Kimi).
    """

    def __init__(
        self,
        tokenizer: Any,
        detokenizer: Detokenizer,
        *,
        tool_parser: str,
        reasoning_parser: str | None,
        template_kwargs: Mapping[str, Any],
        stop_token_ids: frozenset[int],
    ) -> None:
        """Raises `UserError` for a parser name that vLLM does not know or that does not go with the tokenizer."""
        check_parser_names(tool_parser, reasoning_parser)
        from vllm.parser import ParserManager

        self.tool_parser = tool_parser
        self._reasoning_name = reasoning_parser
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._template_kwargs = dict(template_kwargs)
        self._stop_token_ids = stop_token_ids
        self._request = functools.lru_cache(maxsize=_MOST_KEPT)(self._request_of)
        self._normalized = functools.lru_cache(maxsize=_MOST_KEPT)(self._normalized_of)
        self._markers: tuple[str, ...] = ()
        self._reasoning_ends: tuple[str, ...] = ()
        try:
            self._parser_class = ParserManager.get_parser(
                tool_parser_name=tool_parser, reasoning_parser_name=reasoning_parser, enable_auto_tools=True
            )
            request = self._request(tools_key([{"type": "function", "function": {"name": "probe"}}]))
            self._new_parser(request.tools).parse("", request, enable_auto_tools=True)
        except Exception as e:  # whatever a parser raises for want of a token in the vocabulary or of a package
            names = f"model.tool_parser: {tool_parser!r}, model.reasoning_parser: {reasoning_parser!r}"
            raise UserError(f"{names} can't be used with this model: {e}") from e
        # Failed parses are counted and shown to the model; vLLM would print a traceback for each of them. Disabled one
        # by one: a level set on their common parent is undone when the engine configures logging.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("vllm.tool_parsers.", "vllm.parser.", "vllm.reasoning.")):
                logging.getLogger(name).disabled = True

    def learn_signs(self, marker: str, reasoning_end: str) -> None:
        """The tags with which the template opens a call and closes reasoning; empty where it has none."""
        reasoning_parser = self._new_parser(None).reasoning_parser
        ends = [reasoning_end, getattr(reasoning_parser, "reasoning_end_str", None) or "", "</think>"]
        self._markers = (marker,) if marker else ()
        self._reasoning_ends = tuple(end for end in dict.fromkeys(ends) if end)

    def parse(
        self, token_ids: Sequence[int], tools: Sequence[ToolSchema], *, prime: Sequence[int], turn: int
    ) -> ParsedTurn:
        """Read a generation. `prime` are the last tokens of the prompt; they only steady the decoding of spaces.

        Raises nothing for what a model wrote: a text that vLLM's parser fails on is a malformed turn.
        """
        finished = bool(token_ids) and token_ids[-1] in self._stop_token_ids
        body = token_ids[:-1] if finished else token_ids
        request = self._request(tools_key(tools))
        skips = bool(request.skip_special_tokens)
        text = self._detokenizer.streamed(body, prime, skip_special_tokens=skips)
        try:
            parser = self._new_parser(request.tools)
            reasoning, content, calls = parser.parse(
                text, request, enable_auto_tools=True, model_output_token_ids=list(token_ids)
            )
            message = _message(content, reasoning, calls or [], turn)
            pieces = functools.partial(self._detokenizer.pieces, body, prime, skip_special_tokens=skips)
            num_reasoning_tokens = _num_reasoning_tokens(parser, body, pieces, message.reasoning)
        except Exception:  # parsers raise whatever their own code trips over: RecursionError, ValueError, KeyError, ...
            message = Message(role="assistant", content=text)
            return ParsedTurn(message=message, malformed=bool(tools), num_reasoning_tokens=0, finished=finished)
        malformed = False
        if tools and not message.tool_calls:
            raw = self._detokenizer.streamed(body, prime, skip_special_tokens=False) if skips else text
            after = after_reasoning(raw, self._reasoning_ends)
            if after is raw and message.reasoning and message.content.strip():
                # Reasoning that ends in no tag, as the parser split it off.
                after = raw[raw.rfind(message.reasoning) + len(message.reasoning) :]
            malformed = is_attempt(after, [tool["function"]["name"] for tool in tools], self._markers)
        return ParsedTurn(
            message=message, malformed=malformed, num_reasoning_tokens=num_reasoning_tokens, finished=finished
        )

    def normalized_tools(self, tools_json: str) -> list[dict[str, Any]] | None:
        """The tools as `vllm serve` hands them to the template: its own field order, unknown keys dropped."""
        return self._normalized(tools_json)

    def check_response_format(self, response_format: Mapping[str, Any], schema: str) -> None:
        """Raise `UserError` where the parsers make something else of a request's format than its JSON schema."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        asked = {"model": "policy", "messages": [], "response_format": response_format}
        request = self._new_parser(None).adjust_request(ChatCompletionRequest.model_validate(asked))
        served = request.to_sampling_params(1, {}).structured_outputs
        is_schema = served is not None and (served.json_object or served.json == json.loads(schema))
        # gpt-oss is told by its model type in serving, where its own parser takes the place of those named.
        if not is_schema or {self.tool_parser, self._reasoning_name} & _OF_GPT_OSS:
            raise UserError(
                f"rollout.response_format: under the parsers {self.tool_parser!r} and {self._reasoning_name!r} "
                "`vllm serve` builds a grammar of its own around the schema, which training does not support; leave "
                "response_format out, or ask for the form in the prompt"
            )

    def _new_parser(self, tools: Any) -> Any:
        # Parsers carry state, so each turn gets its own, as each request does in `vllm serve`.
        return self._parser_class(self._tokenizer, tools, chat_template_kwargs=self._template_kwargs)

    def _request_of(self, tools_json: str) -> Any:
        """The Chat Completions request that offers these tools, as the parsers have adjusted it."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        tools = json.loads(tools_json)
        offered = {"tools": tools, "tool_choice": "auto"} if tools else {}
        try:
            request = ChatCompletionRequest.model_validate({"model": "policy", "messages": [], **offered})
        except ValueError as e:
            raise UserError(f"tools: not a Chat Completions tool schema: {e}") from e
        return self._new_parser(request.tools).adjust_request(request)

    def _normalized_of(self, tools_json: str) -> list[dict[str, Any]] | None:
        request = self._request(tools_json)
        return [tool.model_dump() for tool in request.tools] if request.tools else None


class OfferedTools(tuple[ToolSchema, ...]):
    """Tools that stay as they are over many turns: their key is made once."""

    @functools.cached_property
    def key(self) -> str:
        return json.dumps(self)


def tools_key(tools: Sequence[ToolSchema]) -> str:
    """The tools as JSON text, under which what depends on them is kept."""
    return tools.key if isinstance(tools, OfferedTools) else json.dumps(list(tools))


def _message(content: str | None, reasoning: str | None, calls: Sequence[Any], turn: int) -> Message:
    return Message(
        role="assistant",
        content=content or "",
        reasoning=reasoning or "",
        tool_calls=tuple(
            # Nine letters and digits: Mistral's templates refuse any other id.
            ToolCall(call_id=f"call{turn:03d}{i:02d}", name=call.name, arguments=call.arguments)
            for i, call in enumerate(calls)
        ),
    )


def _num_reasoning_tokens(
    parser: Any, body: Sequence[int], pieces_of_body: Callable[[], list[str]], reasoning: str
) -> int:
    if not reasoning:
        return 0
    # Asked of the reasoning parser itself: vLLM 0.25's composed parser does not hand the count on.
    if count := parser.reasoning_parser.count_reasoning_tokens(list(body)):
        return int(count)
    # vLLM counts from the token that opens it; the prompt may have opened it already, or the tag be several tokens.
    pieces = pieces_of_body()
    begin = "".join(pieces).find(reasoning)
    places = itertools.accumulate((len(piece) for piece in pieces), initial=0)
    return sum(start < begin + len(reasoning) and stop > begin for start, stop in itertools.pairwise(places))


def check_parser_names(tool_parser: str, reasoning_parser: str | None) -> None:
    """Raise `UserError`, listing the names there are, for a parser that the installed vLLM does not have."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    names = ToolParserManager.list_registered()
    if tool_parser not in names:
        raise UserError(f"model.tool_parser: vLLM has none named {tool_parser!r}. Expected one of: {', '.join(names)}")
    names = ReasoningParserManager.list_registered()
    if reasoning_parser is not None and reasoning_parser not in names:
        raise UserError(
            f"model.reasoning_parser: vLLM has none named {reasoning_parser!r}. "
            f"Expected null or one of: {', '.join(names)}"
        )


def content_is_a_list(template: str) -> bool:
    """Whether `vllm serve` hands this template a message's content as a list of parts instead of a string."""
    from vllm.renderers.hf import _detect_content_format

    return bool(_detect_content_format(template, default="string") == "openai")


def with_cached_vocabulary(tokenizer: Any) -> Any:
    """The tokenizer as vLLM's parsers expect it: asking it for its vocabulary costs nothing."""
    from vllm.tokenizers.hf import get_cached_tokenizer

    return get_cached_tokenizer(tokenizer)
