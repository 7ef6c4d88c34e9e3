"""From rows to tensors: microbatches of similar length, split evenly over processes.

Shape suffixes: B rows of a microbatch, T positions (the longest row's), N trainable tokens of a microbatch.

Rows are padded on the right. Attention is causal, so a padded position never reaches an earlier one, and no padded
position is read: the model needs no attention mask, and takes its fastest attention kernel.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.learning.samples import Sample


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """The rows of one forward and backward pass."""

    row_indices: tuple[int, ...]
    """Where the B rows stand in the sequence that was packed; trainable tokens lie in this order."""
    num_trainable_B: tuple[int, ...]
    token_ids_BT: Tensor
    positions_N: Tensor
    """Into the flattened (B·T) positions: those whose output predicts a trainable token."""
    targets_N: Tensor
    """The trainable tokens themselves."""
    constrained: tuple[tuple[int, int], ...]
    """[start, end) in the N tokens of each answer that was sampled under a grammar, from the grammar's start."""

    def to(self, device: torch.device) -> Microbatch:
        return Microbatch(
            row_indices=self.row_indices,
            num_trainable_B=self.num_trainable_B,
            token_ids_BT=self.token_ids_BT.to(device),
            positions_N=self.positions_N.to(device),
            targets_N=self.targets_N.to(device),
            constrained=self.constrained,
        )


def used_length(row: TokenRow) -> int:
    """Positions the model has to read: what follows the last trainable token predicts nothing that counts."""
    return max((t for t, trainable in enumerate(row.trainable) if trainable), default=0)


def minibatches_of(samples: Sequence[Sample], num_minibatches: int, *, seed: str) -> list[list[Sample]]:
    """Cut the samples into minibatches of about as many rollouts; the rows of a rollout stay together.

    Rollouts are shuffled first, so that a minibatch mixes groups.
    """
    rollout_ids = list(dict.fromkeys(s.rollout_id for s in samples))
    if num_minibatches > 1:
        random.Random(seed).shuffle(rollout_ids)
    place = {rollout_id: i * num_minibatches // len(rollout_ids) for i, rollout_id in enumerate(rollout_ids)}
    minibatches: list[list[Sample]] = [[] for _ in range(num_minibatches)]
    for sample in samples:
        minibatches[place[sample.rollout_id]].append(sample)
    return [m for m in minibatches if m]


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


def split(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of each part, so that parts have about equal sums: longest first, each to the lightest part so far.

    A part may be empty. That does no harm: gradients are summed once an update, not at every backward pass.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(num_parts), key=lambda p: (loads[p], p))
        parts[lightest].append(i)
        loads[lightest] += lengths[i]
    return [sorted(part) for part in parts]


def pack(rows: Sequence[TokenRow], max_tokens: int) -> list[Microbatch]:
    """All rows that have a trainable token, as microbatches of at most `max_tokens` padded tokens."""
    lengths = [used_length(row) for row in rows]
    kept = [i for i, length in enumerate(lengths) if length > 0]
    return [
        _tensors(rows, [kept[j] for j in indices], lengths) for indices in plan([lengths[i] for i in kept], max_tokens)
    ]


def _tensors(rows: Sequence[TokenRow], indices: Sequence[int], lengths: Sequence[int]) -> Microbatch:
    num_positions = max(lengths[i] for i in indices)
    token_ids_BT = torch.zeros(len(indices), num_positions, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    num_trainable: list[int] = []
    constrained: list[tuple[int, int]] = []
    for b, i in enumerate(indices):
        row = rows[i]
        token_ids_BT[b, : lengths[i]] = torch.tensor(row.token_ids[: lengths[i]], dtype=torch.long)
        trained = [t for t, trainable in enumerate(row.trainable) if trainable]
        for start, end in row.constrained:
            first = len(targets) + trained.index(start)
            constrained.append((first, first + end - start))
        positions += [b * num_positions + t - 1 for t in trained]
        targets += [row.token_ids[t] for t in trained]
        num_trainable.append(len(trained))
    return Microbatch(
        row_indices=tuple(indices),
        num_trainable_B=tuple(num_trainable),
        token_ids_BT=token_ids_BT,
        positions_N=torch.tensor(positions, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        constrained=tuple(constrained),
    )
