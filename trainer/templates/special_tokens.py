"""The special tokens of a chat format, and texts that spell them out.

A text in which such a token is spelled out becomes that token where the prompt is encoded, here as in `vllm serve`: a
tool's output can so end its own message and write others. What the model spells out of ordinary tokens stays ordinary
in the row that it is trained on, and is the token itself in serving's next prompt. Neither can be mended without
serving other prompts than `vllm serve` does; both are counted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.reading.documents import read_document
from envs.types import Message, ToolCall
from trainer.templates.detokenizer import Detokenizer


class SpecialTokens:
    """Those that the tokenizer calls special, those that end a turn, and those that the template writes between texts.

    *Not covered*: tokens that a tokenizer normalises, and those that are special to the template alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        detokenizer: Detokenizer,
        *,
        stop_token_ids: Collection[int],
        template_ids: Collection[int],
    ) -> None:
        """`template_ids`: all tokens of conversations that show what the template writes."""
        self._detokenizer = detokenizer
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        written = {i for i in added if i in template_ids}
        special = {i for i, token in added.items() if token.special}
        self._ids = special | written | set(stop_token_ids)
        self._any = _one_of(added[i].content for i in self._ids if i in added)
        turns = (special & written) | set(stop_token_ids)
        self._of_turns = _one_of(added[i].content for i in turns if i in added)

    def num_in(self, text: str) -> int:
        """How many special tokens the text spells out."""
        return sum(1 for _ in self._any.finditer(text))

    def num_spelled(self, token_ids: Sequence[int]) -> int:
        """How many of them generated tokens spell out of ordinary ones."""
        num_real = sum(map(self._ids.__contains__, token_ids))
        return max(0, self.num_in(self._detokenizer.whole(token_ids)) - num_real)

    def of_turns_in(self, message: Message) -> str:
        """The first token in the message's texts that begins or ends turns; empty where none does."""
        texts = itertools.chain([message.content, message.reasoning], *map(_texts_of, message.tool_calls))
        return next((found[0] for text in texts if (found := self._of_turns.search(text))), "")


def _texts_of(call: ToolCall) -> Iterator[str]:
    """What a template may write of it: the arguments' JSON as it stands, or its values, in which escapes are undone."""
    yield from (call.name, call.arguments)
    with contextlib.suppress(ValueError, RecursionError):
        parts = [json.loads(call.arguments)]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                parts += [*part, *part.values()]
            elif isinstance(part, list):
                parts += part
            elif isinstance(part, str):
                yield part


def _one_of(texts: Any) -> re.Pattern[str]:
    # The longest first, as tokenizers take them. Of nothing: what matches nowhere.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def generation_config(model: Path) -> Mapping[str, Any]:
    """What generation_config.json says; nothing where there is none. Raises `UserError`."""
    path = model / "generation_config.json"
    found = read_document(path, f"model.name: {path}") if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"model.name: {path}: expected an object")
    return found


def stop_token_ids(model: Path, eos_token_id: int | None) -> frozenset[int]:
    """The tokens at which `vllm serve` stops: the tokenizer's, and those of generation_config.json.

    Raises `UserError` for what is no token's number there.
    """
    eos = generation_config(model).get("eos_token_id")
    ids = [i for i in (*(eos if isinstance(eos, list) else [eos]), eos_token_id) if i is not None]
    if wrong := [i for i in ids if not isinstance(i, int) or i < 0]:
        path = model / "generation_config.json"
        raise UserError(f"model.name: {path}: eos_token_id: expected the number of a token, got {wrong[0]!r}")
    return frozenset(ids)
