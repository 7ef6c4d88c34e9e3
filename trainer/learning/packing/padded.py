"""Rows of similar length side by side, padded on the right: what every model can read, and the tree's oracle.

Shape suffixes: B rows of a microbatch, T positions (the longest row's).

Attention is causal, so a padded position never reaches an earlier one, and no padded position is read: the model needs
no attention mask, and takes its fastest attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.learning.packing.rows import Microbatch, TokenRow, microbatch_of, used_length


def plan(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each microbatch: longest first, at most `max_tokens` padded tokens each.

    A row longer than `max_tokens` gets a microbatch of its own. Ties go by index, so the plan is deterministic.
    Longest first, because a lack of memory then shows in the first microbatch and not in the last.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first row of a microbatch is its longest, so it sets the padded length.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pack_padded(rows: Sequence[TokenRow], max_tokens: int) -> list[Microbatch]:
    """See `trainer.learning.packing.pack`; padding counts as tokens."""
    lengths = [used_length(row) for row in rows]
    kept = [i for i, length in enumerate(lengths) if length > 0]
    return [
        _tensors(rows, [kept[j] for j in indices], lengths) for indices in plan([lengths[i] for i in kept], max_tokens)
    ]


def _tensors(rows: Sequence[TokenRow], indices: Sequence[int], lengths: Sequence[int]) -> Microbatch:
    num_positions = max(lengths[i] for i in indices)
    token_ids_BT = torch.zeros(len(indices), num_positions, dtype=torch.long)
    places = {}
    for b, i in enumerate(indices):
        token_ids_BT[b, : lengths[i]] = torch.tensor(rows[i].token_ids[: lengths[i]], dtype=torch.long)
        places[i] = range(b * num_positions, b * num_positions + lengths[i])
    return microbatch_of(rows, places, token_ids_BT, None)
