"""The trainer's words, which every room reads and which know no room: what is asked for, what comes of it, its tokens.

A rollout owns one `Ledger` per row. It has one row, unless its chat template broke the earlier prefix and a new row was
forked. A forked row takes over what the model has already sampled as *context*, so over all rows of a rollout each
sampled token is trainable exactly once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from envs.types import Episode, Message, Task
from graders.types import Grade

Metrics = dict[str, float]
"""By the keys of metrics.jsonl, or by what follows their prefix."""


class Kind(StrEnum):
    """Which rollouts: by the name of their folder in the run's."""

    TRAIN = "rollouts"
    """Of the training tasks, to learn from."""
    EVAL = "evals"
    """Of held-out tasks, never learned from."""


def ids_begin_with(run_id: str, kind: Kind, step: int) -> str:
    """What the ids of a step's, or an evaluation's, rollouts begin with; those of no other do."""
    return f"{run_id}-{'eval' if kind is Kind.EVAL else 'step'}{step}-"


class Phase(StrEnum):
    """What a run is at, in the words in which it says so."""

    LOADING = "loading the model"
    EXPERT = "expert episodes"
    WARM_START = "warm start"
    STARTING = "starting the engine"
    PUBLISHING = "publishing"
    ROLLOUTS = "rollouts"
    TRAINING = "training"
    EVALUATING = "evaluating"
    EVALUATING_BEFORE = "evaluating before"
    EVALUATING_AFTER = "evaluating after"
    EXPORTING = "exporting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A conversation to imitate: the assistant messages of it are the expert's."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions (Chat Completions JSON) of the tools that the expert was offered."""
    untrained: frozenset[int] = frozenset()
    """Places of messages that are context, though they may be the assistant's: mistakes that are put right, say."""
    where: str = "warmstart"
    """The file and line, or what else it came of."""
    earlier: tuple[Demonstration, ...] = ()
    """The same episode up to where the tools changed; what was done before is context here and trained on there."""


UNTRAINABLE_VERSION = -1
"""Stands as policy version of a token that no policy sampled."""
NO_TURN = -1
"""Stands as its turn."""


class Ledger:
    """The append-only record of one row: token in, token out.

    What the engine sampled is appended as it came and never decoded and encoded again; the next generation's prompt is
    `prompt_ids`. Nothing is ever removed or changed.
    """

    __slots__ = ("_constrained", "_logprobs", "_token_ids", "_trainable", "_turns", "_versions")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._trainable: list[bool] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._turns: list[int] = []
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
    def trainable(self) -> tuple[bool, ...]:
        """Whether the policy sampled the token."""
        return tuple(self._trainable)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The sampler's, after temperature; 0.0 where untrainable."""
        return tuple(self._logprobs)

    @property
    def versions(self) -> tuple[int, ...]:
        """The policy version that sampled the token; `UNTRAINABLE_VERSION` where none did."""
        return tuple(self._versions)

    @property
    def turns(self) -> tuple[int, ...]:
        """Which turn of the rollout sampled the token, counted from 0; `NO_TURN` where none did."""
        return tuple(self._turns)

    @property
    def constrained(self) -> tuple[tuple[int, int], ...]:
        """[start, end) of what was sampled under a grammar."""
        return tuple(self._constrained)

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
        ids = list(map(int, token_ids))
        self._extend(ids, [0.0] * len(ids), trainable=False, version=UNTRAINABLE_VERSION, turn=NO_TURN)

    def append_sampled(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        version: int,
        *,
        turn: int | None = None,
        constrained_from: int | None = None,
    ) -> None:
        """Append what the engine sampled under policy `version`, the stop token included if it was sampled.

        `turn` is the rollout's, counted from 0; without it the one after the last of this row.

        `logprobs` are those of the distribution that was sampled from, that is after temperature and, from the token
        `constrained_from` on, under the grammar of the answer's schema.
        """
        if constrained_from is not None and constrained_from < len(token_ids):
            self._constrained.append((len(self) + constrained_from, len(self) + len(token_ids)))
        assert len(token_ids) == len(logprobs), f"{len(token_ids)} tokens, {len(logprobs)} log-probabilities"
        assert version >= 0 and self._token_ids, "a sampled token has a policy version and a prompt before it"
        if turn is None:
            turn = 1 + max(self._turns, default=NO_TURN)
        assert all(map(math.isfinite, logprobs)), _not_finite(token_ids, logprobs)
        ids = list(map(int, token_ids))
        self._extend(ids, list(map(float, logprobs)), trainable=True, version=version, turn=turn)

    def _extend(self, token_ids: list[int], logprobs: list[float], *, trainable: bool, version: int, turn: int) -> None:
        n = len(token_ids)
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._trainable += [trainable] * n
        self._versions += [version] * n
        self._turns += [turn] * n

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back bit for bit.

        `sampled` lists `[start, end, version]` of each run of trainable tokens, `turns` the turn of each; `logprobs`
        holds theirs, in order. `constrained`, left out where empty, lists `[start, end]` of each answer that was
        sampled under a grammar.
        """
        runs: list[list[int]] = []
        turns: list[int] = []
        for i, (trainable, version) in enumerate(zip(self._trainable, self._versions, strict=True)):
            if not trainable:
                continue
            if runs and runs[-1][1] == i and runs[-1][2] == version and turns[-1] == self._turns[i]:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1, version])
                turns.append(self._turns[i])
        logprobs = [x for x, trainable in zip(self._logprobs, self._trainable, strict=True) if trainable]
        constrained = {"constrained": [list(span) for span in self._constrained]} if self._constrained else {}
        tokens = {"token_ids": list(self._token_ids), "sampled": runs, "turns": turns, "logprobs": logprobs}
        return tokens | constrained

    @classmethod
    def from_json(cls, row: dict[str, Any], *, first_turn: int = 0) -> Ledger:
        """What versions before turns were noted have written counts as a turn a run, from `first_turn` on."""
        ledger, token_ids, logprobs, start = cls(), row["token_ids"], row["logprobs"], 0
        turns = row.get("turns", range(first_turn, first_turn + len(row["sampled"])))
        for (begin, end, version), turn in zip(row["sampled"], turns, strict=True):
            ledger.append_context(token_ids[start:begin])
            ledger.append_sampled(token_ids[begin:end], logprobs[: end - begin], version, turn=int(turn))
            logprobs, start = logprobs[end - begin :], end
        ledger.append_context(token_ids[start:])
        assert not logprobs, "more log-probabilities than sampled tokens"
        ledger._constrained = [(start, end) for start, end in row.get("constrained", ())]
        return ledger


def completion_ids(rows: Iterable[Ledger]) -> tuple[int, ...]:
    """What stands behind the prompt: of each row everything from its first sampled token to its last."""
    return tuple(itertools.chain.from_iterable(row.completion_ids for row in rows))


def _not_finite(token_ids: Sequence[int], logprobs: Sequence[float]) -> str:
    token_id, logprob = next((t, x) for t, x in zip(token_ids, logprobs, strict=True) if not math.isfinite(x))
    return f"the engine gave log-probability {logprob} for token {token_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """An episode with its token ledger and its grade."""

    episode: Episode
    task: Task
    ledgers: tuple[Ledger, ...]
    """Usually one training row; one more for every turn at which the template rewrote the earlier text."""
    grade: Grade | None
    """None where there is none to learn from: masked out of the loss. `measures.masked_by` says why."""
    watch: Grade | None = None
    """What the grader that is never trained on gave; None without one, and where it failed."""
    is_unscored: bool = False
    """The user's reward functions all gave None: masked, but no fault of the world's, and not tried again."""
    num_drifted_turns: int = 0
    """Turns whose raw text differs from what serving would render for the parsed message."""
    num_attempts: int = 1
    """More than one where the world failed, and the episode was played again, or a grading, and was tried again."""
    unclosed: tuple[str, ...] = ()
    """Why environments of it did not close, those of earlier attempts included."""

    @property
    def reward(self) -> float | None:
        return None if self.grade is None else self.grade.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What to roll out: the task and how its randomness is fixed."""

    task: Task
    rollout_id: str
    seed: int


class LiveRollouts(Protocol):
    """Keeps on disk which rollouts are open, so that what a killed run left behind can be released."""

    def opened(self, rollout_id: str) -> None: ...

    def closed(self, rollout_id: str) -> None: ...
