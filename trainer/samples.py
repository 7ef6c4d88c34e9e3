"""Training rows: the token ledger of an episode, and the samples made of it. Knows no tensors.

A rollout owns one `Ledger` per row. It has one row, unless its chat template broke the earlier prefix and a new row was
forked. A forked row takes over what the model has already sampled as *context*, so over all rows of a rollout each
sampled token is trainable exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNTRAINABLE_VERSION = -1
"""Stands as policy version of a token that no policy sampled."""


class Ledger:
    """The append-only record of one row: token in, token out.

    What the engine sampled is appended as it came and never decoded and encoded again; the next generation's prompt is
    `prompt_ids`. Nothing is ever removed or changed.
    """

    __slots__ = ("_constrained", "_logprobs", "_token_ids", "_trainable", "_versions")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._trainable: list[bool] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._constrained: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._token_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def prompt_ids(self) -> list[int]:
        """Every token so far: the prompt of the next generation (a copy)."""
        return list(self._token_ids)

    @property
    def num_trainable(self) -> int:
        return sum(self._trainable)

    @property
    def completion_ids(self) -> list[int]:
        """From the first sampled token to the last, with what stands between."""
        if not any(self._trainable):
            return []
        return self._token_ids[self._trainable.index(True) : len(self) - self._trainable[::-1].index(True)]

    def append_context(self, token_ids: Iterable[int]) -> None:
        """Append tokens that the policy did not choose: the prompt, tool results, the template's glue."""
        for token_id in token_ids:
            self._append(token_id, trainable=False, logprob=0.0, version=UNTRAINABLE_VERSION)

    def append_sampled(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        version: int,
        *,
        constrained_from: int | None = None,
    ) -> None:
        """Append what the engine sampled under policy `version`, the stop token included if it was sampled.

        `logprobs` are those of the distribution that was sampled from, that is after temperature and, from the token
        `constrained_from` on, under the grammar of the answer's schema.
        """
        if constrained_from is not None and constrained_from < len(token_ids):
            self._constrained.append((len(self) + constrained_from, len(self) + len(token_ids)))
        assert len(token_ids) == len(logprobs), f"{len(token_ids)} tokens, {len(logprobs)} log-probabilities"
        assert version >= 0 and self._token_ids, "a sampled token has a policy version and a prompt before it"
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            assert math.isfinite(logprob), f"the engine gave log-probability {logprob} for token {token_id}"
            self._append(token_id, trainable=True, logprob=float(logprob), version=version)

    def _append(self, token_id: int, *, trainable: bool, logprob: float, version: int) -> None:
        self._token_ids.append(int(token_id))
        self._trainable.append(trainable)
        self._logprobs.append(logprob)
        self._versions.append(version)

    def to_sample(self, *, advantage: float, rollout_id: str, task_id: str, row: int = 0) -> Sample:
        return Sample(
            token_ids=tuple(self._token_ids),
            trainable=tuple(self._trainable),
            logprobs=tuple(self._logprobs),
            versions=tuple(self._versions),
            constrained=tuple(self._constrained),
            advantage=advantage,
            rollout_id=rollout_id,
            task_id=task_id,
            row=row,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back bit for bit.

        `sampled` lists `[start, end, version]` of each run of trainable tokens; `logprobs` holds theirs, in order.
        `constrained`, left out where empty, lists `[start, end]` of each answer that was sampled under a grammar.
        """
        runs: list[list[int]] = []
        for i, (trainable, version) in enumerate(zip(self._trainable, self._versions, strict=True)):
            if not trainable:
                continue
            if runs and runs[-1][1] == i and runs[-1][2] == version:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1, version])
        logprobs = [x for x, trainable in zip(self._logprobs, self._trainable, strict=True) if trainable]
        constrained = {"constrained": [list(span) for span in self._constrained]} if self._constrained else {}
        return {"token_ids": list(self._token_ids), "sampled": runs, "logprobs": logprobs} | constrained

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Ledger:
        ledger, token_ids, logprobs, start = cls(), row["token_ids"], row["logprobs"], 0
        for begin, end, version in row["sampled"]:
            ledger.append_context(token_ids[start:begin])
            ledger.append_sampled(token_ids[begin:end], logprobs[: end - begin], version)
            logprobs, start = logprobs[end - begin :], end
        ledger.append_context(token_ids[start:])
        assert not logprobs, "more log-probabilities than sampled tokens"
        ledger._constrained = [(start, end) for start, end in row.get("constrained", ())]
        return ledger


def completion_ids(rows: Iterable[Ledger]) -> tuple[int, ...]:
    """What stands behind the prompt: of each row everything from its first sampled token to its last."""
    return tuple(token_id for row in rows for token_id in row.completion_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training row.

    An episode of two turns, `<u> sum? <a>` → the model calls a tool → its result → the model answers:

        position     0    1     2    3     4      5    6     7    8    9
        token        <u>  sum?  <a>  call  </a>   <t>  42    <a>  42   </a>
        trainable    0    0     0    1     1      0    0     0    1    1
        logprobs     0.0  0.0   0.0  -1.2  -0.1   0.0  0.0   0.0  -0.4 -0.1
        versions     -1   -1    -1   7     7      -1   -1    -1   7    7

    The token at position t is predicted from position t - 1, so the loss reads the model's output at positions
    2, 3, 7 and 8. A tool result that contains the model's very words stays untrainable: position 6, against 8.

    All rows of a rollout carry the rollout's whole advantage. It is not divided among them: each trainable token
    occurs in one row only, and the loss counts tokens (or rollouts), never rows.
    """

    token_ids: tuple[int, ...]
    trainable: tuple[bool, ...]
    """Whether the policy sampled the token; only such tokens enter the loss."""
    logprobs: tuple[float, ...]
    """The sampler's, after temperature; 0.0 where untrainable."""
    versions: tuple[int, ...]
    """The policy version that sampled the token; -1 where untrainable."""
    advantage: float
    """Of the whole rollout."""
    constrained: tuple[tuple[int, int], ...] = ()
    """[start, end) of each answer that was sampled under a grammar, from the grammar's start; its log-probabilities
    are those of what the grammar allows."""
    rollout_id: str
    task_id: str
    row: int = 0
    """Which of the rollout's ledgers this is."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        assert n == len(self.trainable) == len(self.logprobs) == len(self.versions), "ragged sample"
        assert not (n and self.trainable[0]), "nothing precedes the first token, so nothing predicts it"
        assert all(all(self.trainable[a:b]) for a, b in self.constrained), "a grammar constrains sampled tokens only"
        assert math.isfinite(self.advantage), f"advantage {self.advantage} of rollout {self.rollout_id}"

    @property
    def num_trainable(self) -> int:
        return sum(self.trainable)


def rollout_samples(rows: Sequence[Ledger], *, advantage: float, rollout_id: str, task_id: str) -> list[Sample]:
    """The samples of one rollout: a row per ledger that has anything to train on."""
    return [
        ledger.to_sample(advantage=advantage, rollout_id=rollout_id, task_id=task_id, row=row)
        for row, ledger in enumerate(rows)
        if ledger.num_trainable
    ]
