"""From rows to tensors: what one forward and backward pass reads, and what each process takes of a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from trainer.learning.packing.padded import pack_padded
from trainer.learning.packing.rows import Microbatch, TokenRow
from trainer.learning.packing.tree import pack_tree

Layout = Literal["tree", "padded"]


def pack(rows: Sequence[TokenRow], max_tokens: int, layout: Layout) -> list[Microbatch]:
    """All rows that have a trainable token, as microbatches of at most `max_tokens` tokens, the largest first.

    A row that is longer has a microbatch of its own.
    """
    return pack_tree(rows, max_tokens) if layout == "tree" else pack_padded(rows, max_tokens)
