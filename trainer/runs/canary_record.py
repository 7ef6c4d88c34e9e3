"""canary.jsonl: what the trainer said of the canary under the base model, and under every version that was published.

By it a server is known that runs the policy of a certain step, wherever and whenever it is asked
(`trainer.exports.proof`). Two kinds of line: `{"token_ids", "base"}` where a session of the run begins, and
`{"step", "policy"}` after each publish that was proved; a later line of a step takes the place of the former.
Log-probabilities are of every token but the first of each sequence, the sequences one after the other, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from envs.errors import UserError
from trainer.runs.files import read_lines

CANARY = "canary.jsonl"
_DIGITS = 5

KeepRecord = Callable[[dict[str, Any]], None]


def keep_none(record: dict[str, Any]) -> None:
    """Where there is no run folder."""


def of_base(token_ids: Sequence[Sequence[int]], scores: Sequence[float]) -> dict[str, Any]:
    return {"token_ids": [list(ids) for ids in token_ids], "base": _rounded(scores)}


def of_policy(step: int, scores: Sequence[float]) -> dict[str, Any]:
    return {"step": step, "policy": _rounded(scores)}


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, _DIGITS) for score in scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRecord:
    """Of versions that were scored on the same tokens."""

    token_ids: list[list[int]]
    base: list[float]
    policies: dict[int, list[float]] = field(default_factory=dict)
    """By step."""

    def base_mismatch(self, scores: Sequence[float]) -> float:
        """Mean absolute difference of another base's scores from the trainer's, nats a token."""
        return sum(abs(a - b) for a, b in zip(scores, self.base, strict=True)) / len(self.base)


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid")

    token_ids: list[list[int]]
    base: list[FiniteFloat]


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid")

    step: int
    policy: list[FiniteFloat]


def find_canary(run: Path, step: int) -> CanaryRecord | None:
    """The newest record that holds the policy of `step`. Raises `UserError` for a damaged file."""
    for record in reversed(_records(run / CANARY)):
        lengths = {len(scores) for scores in (record.base, *record.policies.values())}
        if step in record.policies and lengths == {sum(len(ids) - 1 for ids in record.token_ids)}:
            return record
    return None


def read_canary(run: Path, step: int) -> CanaryRecord:
    """As `find_canary`. Raises `UserError` where there is none."""
    if (record := find_canary(run, step)) is not None:
        return record
    raise UserError(
        f"{run / CANARY}: does not hold what the trainer said of the canary at step {step}, by which a server would be "
        "known (runs of older versions wrote none); the command that `scripts/serve.py` runs serves the adapter all "
        "the same"
    )


def trained_on(run: Path, token_ids: Sequence[Sequence[int]]) -> CanaryRecord | None:
    """The record of these tokens, where versions were trained after it. Raises `UserError` for a damaged file."""
    same = [r for r in _records(run / CANARY) if r.policies and r.token_ids == list(map(list, token_ids))]
    return same[-1] if same else None


def check_trained_base(run: Path, record: CanaryRecord | None, scores: Sequence[float], most: float) -> None:
    """Raise `UserError` where the base model that gives `scores` is not the one that the run has trained so far.

    *Covered*: where the run has a `record` of the same tokens. `most` is the largest mean difference, in nats a token.
    """
    if record is None or len(record.base) != len(scores):
        return
    difference = record.base_mismatch(scores)
    if not difference <= most:
        raise UserError(
            f"model.name: the base model is not the one that {run} was trained on: on the canary its log-probabilities "
            f"differ by {difference:.3f} nats a token from what {CANARY} says of that (engine.canary_mean_tolerance is "
            f"{most:g}); a folder that was written over, or a hub's model that has moved on? Restore it"
        )


def _records(path: Path) -> list[CanaryRecord]:
    """The newest of each canary, oldest first."""
    records: list[CanaryRecord] = []
    hint = (
        "delete the file to do without: no server, and no base model, can then be proved to be that of the steps so far"
    )
    try:
        lines = read_lines(path)
    except UserError as e:
        raise UserError(f"{e}; {hint}") from None
    for number, line in enumerate(lines, start=1):
        try:
            if "base" in line:
                told = _Base.model_validate(line)
                # A world that answers the same has the same canary after a resume.
                same = [r for r in records if r.token_ids == told.token_ids]
                records = [r for r in records if r not in same]
                policies = same[0].policies if same else {}
                records.append(CanaryRecord(token_ids=told.token_ids, base=told.base, policies=policies))
            else:
                said = _Policy.model_validate(line)
                records[-1].policies[said.step] = said.policy
        except (ValidationError, IndexError):
            raise UserError(f"{path}, line {number}: is damaged: tells nothing of the canary; {hint}") from None
    return records
