"""Training rows: the samples made of a rollout's ledgers. Knows no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from trainer.config import LossSettings
from trainer.types import NO_TURN, Ledger

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training row.

    An episode of two turns, `<u> sum? <a>` → the model calls a tool → its result → the model answers:

        position     0    1     2    3     4      5    6     7    8    9
        token        <u>  sum?  <a>  call  </a>   <t>  42    <a>  42   </a>
        trainable    0    0     0    1     1      0    0     0    1    1
        logprobs     0.0  0.0   0.0  -1.2  -0.1   0.0  0.0   0.0  -0.4 -0.1
        versions     -1   -1    -1   7     7      -1   -1    -1   7    7
        advantages   0.0  0.0   0.0  0.5   0.5    0.0  0.0   0.0  0.5  0.5

    The token at position t is predicted from position t - 1, so the loss reads the model's output at positions
    2, 3, 7 and 8. A tool result that contains the model's very words stays untrainable: position 6, against 8.

    All rows of a rollout carry the rollout's whole advantage, on each of their trainable tokens; where it is credited
    by turn, that of the turn that sampled the token. It is not divided among them: each trainable token occurs in one
    row only, and the loss counts tokens (or rollouts), never rows.
    """

    token_ids: tuple[int, ...]
    trainable: tuple[bool, ...]
    """Whether the policy sampled the token; only such tokens enter the loss."""
    logprobs: tuple[float, ...]
    """The sampler's, after temperature; 0.0 where untrainable."""
    versions: tuple[int, ...]
    """The policy version that sampled the token; -1 where untrainable."""
    advantages: tuple[float, ...]
    """One a token; 0.0 where untrainable."""
    values: tuple[float, ...] = ()
    """The critic's of the state before each token, before the step; one a token, 0.0 where untrainable. Empty without
    a critic."""
    returns: tuple[float, ...] = ()
    """What the values should have been: likewise."""
    constrained: tuple[tuple[int, int], ...] = ()
    """[start, end) of each answer that was sampled under a grammar, from the grammar's start; its log-probabilities
    are those of what the grammar allows."""
    rollout_id: str
    task_id: str
    row: int = 0
    """Which of the rollout's ledgers this is."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        lengths = {n, len(self.trainable), len(self.logprobs), len(self.versions), len(self.advantages)}
        assert len(lengths) == 1 and {len(self.values), len(self.returns)} in ({0}, {n}), "ragged sample"
        assert not (n and self.trainable[0]), "nothing precedes the first token, so nothing predicts it"
        assert all(all(self.trainable[a:b]) for a, b in self.constrained), "a grammar constrains sampled tokens only"
        assert all(map(math.isfinite, self.advantages)), f"advantages of rollout {self.rollout_id} are not finite"

    @property
    def num_trainable(self) -> int:
        return sum(self.trainable)

    def trained(self, values: Sequence[Value]) -> list[Value]:
        """Those of its trainable tokens, of `values` that are one a token."""
        return [x for x, trainable in zip(values, self.trainable, strict=True) if trainable]

    @property
    def advantage(self) -> float:
        """The mean over its trainable tokens: the rollout's own where they all have the same. 0.0 without any."""
        own = self.trained(self.advantages)
        return own[0] if len({*own}) == 1 else fmean(own) if own else 0.0

    @property
    def has_advantage(self) -> bool:
        """Whether any token has one."""
        return any(self.advantages)


def sample_of(
    ledger: Ledger, *, advantage: float | Sequence[float], rollout_id: str, task_id: str, row: int = 0
) -> Sample:
    """The row that `ledger` holds, with the advantage of its rollout, or of each of the rollout's turns."""
    of_turn = [advantage] * (1 + max(ledger.turns, default=0)) if isinstance(advantage, int | float) else advantage
    return Sample(
        token_ids=tuple(ledger.prompt_ids),
        trainable=ledger.trainable,
        logprobs=ledger.logprobs,
        versions=ledger.versions,
        constrained=ledger.constrained,
        advantages=tuple(0.0 if turn == NO_TURN else of_turn[turn] for turn in ledger.turns),
        rollout_id=rollout_id,
        task_id=task_id,
        row=row,
    )


def rollout_samples(
    rows: Sequence[Ledger], *, advantage: float | Sequence[float], rollout_id: str, task_id: str
) -> list[Sample]:
    """The samples of one rollout: a row per ledger that has anything to train on."""
    return [
        sample_of(ledger, advantage=advantage, rollout_id=rollout_id, task_id=task_id, row=row)
        for row, ledger in enumerate(rows)
        if ledger.num_trainable
    ]


def num_trained_tokens(samples: Sequence[Sample], loss: LossSettings) -> int:
    """Tokens of the rows that cost the trainer something."""
    return sum(len(sample.token_ids) for sample in samples if has_gradient(sample, loss))


def has_gradient(sample: Sample, loss: LossSettings) -> bool:
    """An advantage on any token; with a KL term or a bonus for entropy in the loss, any row."""
    return sample.has_advantage or loss.trains_without_advantage
