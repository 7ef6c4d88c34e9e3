"""Rows laid end to end, and what they begin alike once: the prompt of a group, the turns that forked rows share.

Shape suffixes: T positions.

Equal tokens from the row's start have equal hidden states and gradients that add up, so that what is shared is computed
once, forward and backward, and the update stays the same. Built of whole rows, a token at a time: a trie.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.learning.packing.rows import Microbatch, PrefixTree, TokenRow, microbatch_of, used_length

Tokens = NDArray[np.int64]


def pack_tree(rows: Sequence[TokenRow], max_tokens: int) -> list[Microbatch]:
    """See `trainer.learning.packing.pack`; what rows share counts once.

    A tree that is larger is cut where the least is shared, and what lies before the cut is repeated. Everything goes
    by the rows' tokens and order, so that it is deterministic.
    """
    tokens = {i: used for i, row in enumerate(rows) if len(used := _used(row))}
    order = sorted(tokens, key=lambda i: (tokens[i].tolist(), i))
    parts = _parts([tokens[i] for i in order], max_tokens)
    batches = [[order[j] for j in part] for part in parts]
    sizes = {id(batch): _size([tokens[i] for i in batch]) for batch in batches}
    batches.sort(key=lambda batch: (-sizes[id(batch)], min(batch)))
    return [_laid_out(rows, {i: tokens[i] for i in batch}) for batch in batches]


def num_unique_tokens(rows: Sequence[TokenRow]) -> int:
    """Positions of the rows as one tree."""
    return _size(sorted((_used(row) for row in rows), key=lambda used: used.tolist()))


def _used(row: TokenRow) -> Tokens:
    return np.array(row.token_ids[: used_length(row)], dtype=np.int64)


def _num_shared(a: Tokens, b: Tokens) -> int:
    """Tokens with which both begin."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _shared(ordered: Sequence[Tokens]) -> list[int]:
    """What each row shares with the one before it: in sorted order, all that it shares with any before it."""
    return [0] + [_num_shared(a, b) for a, b in itertools.pairwise(ordered)]


def _size(ordered: Sequence[Tokens]) -> int:
    return sum(map(len, ordered)) - sum(_shared(ordered))


def _parts(ordered: Sequence[Tokens], max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each microbatch, each in sorted order."""
    shared = _shared(ordered)
    # From the first row on, for as long as they fit; then cut at the shallowest branch that leaves no part half empty.
    pieces: list[tuple[int, list[int]]] = []
    start = 0
    while start < len(ordered):
        size, end, cuts = len(ordered[start]), start + 1, []
        while end < len(ordered) and size + len(ordered[end]) - shared[end] <= max_tokens:
            cuts.append((end, size))
            size += len(ordered[end]) - shared[end]
            end += 1
        if end < len(ordered):
            cuts.append((end, size))
            end, size = min(
                ((e, s) for e, s in cuts if s >= max_tokens / 2 or e == end), key=lambda cut: (shared[cut[0]], -cut[0])
            )
        pieces.append((size, list(range(start, end))))
        start = end
    # What is left over of one tree goes into the first microbatch with room for it.
    parts: list[list[int]] = []
    sizes: list[int] = []
    for size, indices in sorted(pieces, key=lambda piece: (-piece[0], piece[1][0])):
        place = next((p for p, taken in enumerate(sizes) if taken + size <= max_tokens), None)
        if place is None:
            parts.append(indices)
            sizes.append(size)
        else:
            parts[place] += indices
            sizes[place] += size
    return [sorted(part) for part in parts]


def _laid_out(rows: Sequence[TokenRow], tokens: dict[int, Tokens]) -> Microbatch:
    """`tokens` are those that are read of each row, in sorted order."""
    indices, ordered = list(tokens), list(tokens.values())
    shared = _shared(ordered)
    num_positions = sum(map(len, ordered)) - sum(shared)
    ids_T, depth_T = np.empty(num_positions, np.int64), np.empty(num_positions, np.int64)
    end_T = np.full(num_positions, num_positions)
    places: dict[int, Tokens] = {}
    path, position = np.empty(0, np.int64), 0
    for i, used, depth in zip(indices, ordered, shared, strict=True):
        end_T[path[depth:]] = position
        own = np.arange(position, position + len(used) - depth)
        ids_T[own], depth_T[own] = used[depth:], np.arange(depth, len(used))
        places[i] = path = np.concatenate((path[:depth], own))
        position += len(own)
    tree = PrefixTree(depth_T=torch.from_numpy(depth_T), end_T=torch.from_numpy(end_T))
    by_row = {i: places[i].tolist() for i in sorted(places)}
    return microbatch_of(rows, by_row, torch.from_numpy(ids_T)[None], tree)
