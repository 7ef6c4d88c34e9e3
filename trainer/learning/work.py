"""What one process does of a minibatch: which rows, in which microbatches, and what each of their tokens weighs.

Shape suffixes: N trainable tokens of a microbatch.

The denominators are those of the whole minibatch, counted before it is shared out, so that the sum over microbatches
and processes is the loss of one large batch (invariant 6).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.config import LossSettings
from trainer.learning.losses.base import token_weights
from trainer.learning.packing.layouts import Layout, pack
from trainer.learning.packing.rows import Microbatch, used_length
from trainer.learning.packing.shares import share_out
from trainer.learning.packing.tree import num_unique_tokens
from trainer.learning.samples import Sample, has_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One microbatch and what its loss needs. Old and reference log-probabilities are filled in where they matter."""

    microbatch: Microbatch
    rows: tuple[Sample, ...]
    """The microbatch's, in its order."""
    advantages_N: Tensor
    weights_N: Tensor
    row_of_N: Tensor
    sampler_logprobs_N: Tensor
    values_N: Tensor
    returns_N: Tensor
    """Of the critic's; empty without one."""
    versions_N: Tensor
    """int64: that sampled the token."""
    old_logprobs_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None
    staleness_N: Tensor | None = None
    """int64: how many updates before the step's first the token was sampled."""

    def by_row(self, values_N: Tensor) -> dict[int, Tensor]:
        """Values of the trainable tokens by the identity of the sample that they belong to."""
        parts = torch.split(values_N, list(self.microbatch.num_trainable_B))
        return {id(row): part for row, part in zip(self.rows, parts, strict=True)}


def share_of(
    minibatch: Sequence[Sample],
    loss: LossSettings,
    *,
    constant_tokens: int,
    layout: Layout,
    max_microbatch_tokens: int,
    accelerator: Accelerator,
) -> list[Work]:
    """The calling process's share of `minibatch`, which every process passes whole."""
    num_tokens = Counter[str]()
    for sample in minibatch:
        num_tokens[sample.rollout_id] += sample.num_trainable
    weights = token_weights(list(num_tokens.values()), loss.normalisation, constant_tokens=constant_tokens)
    weight_of = dict(zip(num_tokens, weights, strict=True))
    # Rows without a gradient count in the denominators above and cost no time below.
    rows = [s for s in minibatch if has_gradient(s, loss)]
    rows = share_out(rows, accelerator.num_processes, cost=_COSTS[layout])[accelerator.process_index]
    device = accelerator.device

    def per_token(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device)

    works = []
    for microbatch in pack(rows, max_microbatch_tokens, layout):
        packed = [rows[i] for i in microbatch.row_indices]
        works.append(
            Work(
                microbatch=microbatch,
                rows=tuple(packed),
                advantages_N=per_token(a for s in packed for a in s.trained(s.advantages)),
                weights_N=per_token(weight_of[s.rollout_id] for s in packed for _ in range(s.num_trainable)),
                row_of_N=torch.arange(len(packed), device=device).repeat_interleave(
                    torch.tensor(microbatch.num_trainable_B, device=device)
                ),
                values_N=per_token(x for s in packed for x in s.trained(s.values or s.advantages) if s.values),
                returns_N=per_token(x for s in packed for x in s.trained(s.returns or s.advantages) if s.returns),
                sampler_logprobs_N=per_token(x for s in packed for x in s.trained(s.logprobs)),
                versions_N=torch.tensor([v for s in packed for v in s.trained(s.versions)], device=device),
            )
        )
    return works


_COSTS: dict[Layout, Callable[[Sequence[Sample]], int]] = {
    "tree": num_unique_tokens,
    "padded": lambda rows: sum(used_length(row) for row in rows),
}
"""Positions that the model reads of rows which one process takes."""


def gradient_scale(samples: Sequence[Sample]) -> float:
    """Keeps the gradients of float16 models from underflowing; a power of two, so exact."""
    return 2.0 ** round(math.log2(sum(s.num_trainable for s in samples)))
