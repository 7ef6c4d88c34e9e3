"""Token ids as text: all of them at once, or token by token as vLLM's incremental detokenizer gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_NO_CHARACTER = "\ufffd"
"""Stands for bytes that are no UTF-8: half a character, say."""
_BESIDES = {"ByteFallback", "Fuse", "Replace"}
"""What decoders that transformers makes of a GGUF file have besides; none of it touches a token that spells bytes."""
_BLANK = {"String": "\u2581"}
"""What is replaced: no token that spells bytes has it."""
_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """Of one fast tokenizer. Nothing of it changes but what it knows of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.pre_tokenizers import ByteLevel

        self._tokenizer = tokenizer
        self._backend = tokenizer._tokenizer
        self._cleans = bool(tokenizer.clean_up_tokenization_spaces)
        self._alphabet = frozenset(ByteLevel.alphabet()) if _joins_bytes(self._backend.decoder) else frozenset()
        self._of_bytes: set[int] = set()
        """Tokens that have been seen to spell bytes."""

    def whole(self, token_ids: Sequence[int]) -> str:
        """The text as transformers decodes it, special tokens included."""
        if self._cleans:
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def streamed(self, token_ids: Sequence[int], prime: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The pieces put together. `prime` are the last tokens of the prompt, which ends in no half character."""
        if self._are_of_bytes(prime) and self._are_of_bytes(token_ids):
            # Bytes are put together in the same way however many there are: as long as no half character is left, the
            # whole is what the pieces are, and one call takes a tenth of the time that one a token takes.
            text = str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
            if _NO_CHARACTER not in text:
                return text
        return "".join(self.pieces(token_ids, prime, skip_special_tokens=skip_special_tokens))

    def pieces(self, token_ids: Sequence[int], prime: Sequence[int], *, skip_special_tokens: bool) -> list[str]:
        """The text of each token as it is streamed: half a character gives nothing."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=list(prime), skip_special_tokens=skip_special_tokens)
        pieces = []
        for token_id in token_ids:
            try:
                piece = stream.step(self._backend, token_id)
            except Exception as e:  # tokenizers' own exception class is not exported
                if "Invalid prefix" not in str(e):
                    raise
                # Bytes that are no UTF-8: vLLM starts the stream afresh and goes on.
                stream = DecodeStream(skip_special_tokens=skip_special_tokens)
                piece = stream.step(self._backend, token_id)
            pieces.append(piece or "")
        return pieces

    def _are_of_bytes(self, token_ids: Sequence[int]) -> bool:
        """Whether each stands for bytes and nothing else, whatever its neighbours are."""
        if self._of_bytes.issuperset(token_ids):
            return True
        for token_id in set(token_ids) - self._of_bytes:
            token = self._backend.id_to_token(token_id)
            if token is None or not self._alphabet.issuperset(token) or _FALLBACK.fullmatch(token):
                return False
            self._of_bytes.add(token_id)
        return True


def _joins_bytes(decoder: Any) -> bool:
    """Whether it is the byte-level one, by itself or behind others that leave its tokens alone."""
    told = json.loads(decoder.__getstate__()) if decoder is not None else {}
    *others, last = told.get("decoders", [told])
    return last.get("type") == "ByteLevel" and all(
        other["type"] in _BESIDES and other.get("pattern", _BLANK) == _BLANK for other in others
    )
