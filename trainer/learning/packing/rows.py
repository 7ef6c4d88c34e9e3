"""What packing reads of a row, and what it makes of several.

Shape suffixes: B rows of a microbatch, T positions, N trainable tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class TokenRow(Protocol):
    """What packing reads of a row; `Sample` is one."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def trainable(self) -> Sequence[bool]: ...

    @property
    def constrained(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRow:
    """A row whose every token but the first is scored."""

    token_ids: Sequence[int]
    constrained: Sequence[tuple[int, int]] = ()

    @property
    def trainable(self) -> Sequence[bool]:
        return [t > 0 for t in range(len(self.token_ids))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixTree:
    """Which of T positions, laid end to end, read which: depth first, so that a subtree is a stretch.

    A position stands for a token with all that lies before it in its row, so that rows which begin alike share
    positions. Position q reads position k where k is q or comes before it in a row: k <= q < end_T[k].
    """

    depth_T: Tensor
    """int64: the token's place in its rows, from 0."""
    end_T: Tensor
    """int64: the first position behind the token and all that follows it in any row."""

    def to(self, device: torch.device) -> PrefixTree:
        return PrefixTree(depth_T=self.depth_T.to(device), end_T=self.end_T.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The rows of one forward and backward pass."""

    row_indices: tuple[int, ...]
    """Where the rows stand in the sequence that was packed; trainable tokens lie in this order."""
    num_trainable_B: tuple[int, ...]
    token_ids_BT: Tensor
    """A row each, padded on the right; (1, T) where there is a tree."""
    tree: PrefixTree | None
    """None: each row reads itself alone."""
    positions_N: Tensor
    """Into the flattened (B·T) positions: those whose output predicts a trainable token. They repeat where rows part,
    and where several rows train the same token behind the same tokens."""
    targets_N: Tensor
    """The trainable tokens themselves."""
    constrained: tuple[tuple[int, int], ...]
    """[start, end) in the N tokens of each answer that was sampled under a grammar, from the grammar's start."""

    def to(self, device: torch.device) -> Microbatch:
        return replace(
            self,
            token_ids_BT=self.token_ids_BT.to(device),
            tree=None if self.tree is None else self.tree.to(device),
            positions_N=self.positions_N.to(device),
            targets_N=self.targets_N.to(device),
        )


def used_length(row: TokenRow) -> int:
    """Positions the model has to read: what follows the last trainable token predicts nothing that counts."""
    return max((t for t, trainable in enumerate(row.trainable) if trainable), default=0)


def microbatch_of(
    rows: Sequence[TokenRow], places: Mapping[int, Sequence[int]], token_ids_BT: Tensor, tree: PrefixTree | None
) -> Microbatch:
    """The microbatch of the rows whose indices `places` holds, with the position of each token that is read."""
    positions: list[int] = []
    targets: list[int] = []
    num_trainable: list[int] = []
    constrained: list[tuple[int, int]] = []
    for i, places_of_row in places.items():
        row = rows[i]
        trained = [t for t, trainable in enumerate(row.trainable) if trainable]
        for start, end in row.constrained:
            first = len(targets) + trained.index(start)
            constrained.append((first, first + end - start))
        positions += [places_of_row[t - 1] for t in trained]
        targets += [row.token_ids[t] for t in trained]
        num_trainable.append(len(trained))
    return Microbatch(
        row_indices=tuple(places),
        num_trainable_B=tuple(num_trainable),
        token_ids_BT=token_ids_BT,
        tree=tree,
        positions_N=torch.tensor(positions, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        constrained=tuple(constrained),
    )
