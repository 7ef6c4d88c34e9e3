"""What is decoded at once is what vLLM's incremental detokenizer gives token by token."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer

from trainer.templates.detokenizer import Detokenizer

TEXTS = [
    "plain words, 42.5 % of them",
    "Ünïcödé ᚠᛇᚻ 数字 \u2028 \U0001f980\U0001f468\u200d\U0001f469",
    " \n\n\t a  b ",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    """With tokens besides that are no bytes in letters."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(["<｜tool▁call｜>", "<a b>", "<0x41>", "<0xE2>"])
    return tokenizer


def lots_of_ids(tokenizer: Any) -> list[list[int]]:
    """Texts, texts with tokens missing so that half characters stand in them, special tokens among them, noise."""
    rng = random.Random(0)
    lots = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    for _ in range(300):
        kept = [i for i in rng.choice(lots[:3]) if rng.random() < 0.8]
        lots.append(kept[: rng.randrange(1 + len(kept))] + rng.choices(range(20), k=rng.randrange(3)))
        lots.append(rng.choices(range(len(tokenizer)), k=rng.randrange(12)))
        lots.append(rng.choices(range(400), k=rng.randrange(12)))
        lots.append(rng.choices([*range(300, 400), *range(len(tokenizer) - 4, len(tokenizer))], k=rng.randrange(9)))
    return lots


def with_decoder(tokenizer: Any, decoder: Any) -> Any:
    backend = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    backend.decoder = decoder
    return SimpleNamespace(_tokenizer=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "of a GGUF file"])
def test_the_whole_is_what_the_pieces_are_together(kind: str, skips: bool, tokenizer: Any) -> None:
    own = with_decoder(tokenizer, decoders.ByteLevel()) if kind == "byte level" else tokenizer
    detokenizer, prime = Detokenizer(own), tokenizer.encode("<|im_start|>assistant\n")
    at_once = 0
    for ids in lots_of_ids(tokenizer):
        pieces = detokenizer.pieces(ids, prime, skip_special_tokens=skips)
        assert detokenizer.streamed(ids, prime, skip_special_tokens=skips) == "".join(pieces)
        at_once += detokenizer._are_of_bytes(ids) and "\ufffd" not in detokenizer.whole(ids)
    assert 200 < at_once < 1000, "both ways are tried"


def test_a_decoder_that_looks_at_what_stands_before_is_streamed(tokenizer: Any) -> None:
    """One that strips the space of a text's first word, as those of the Llama 2 kind do."""
    stripping = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    detokenizer = Detokenizer(with_decoder(tokenizer, stripping))
    prime, ids = tokenizer.encode("So"), tokenizer.encode(" far")
    assert detokenizer.whole(ids) == "far"
    assert detokenizer.streamed(ids, prime, skip_special_tokens=False) == " far"


def test_a_whole_text_is_decoded_as_transformers_does(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    for ids in lots_of_ids(tokenizer):
        assert detokenizer.whole(ids) == tokenizer.decode(ids)
