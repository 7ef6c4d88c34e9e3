"""Which policy a server answers as, told by the canary. Pure.

The run has kept what its trainer says of fixed tokens under the base model and under every version
(`trainer.runs.canary_record`). With e, e' the log-probabilities that the server gives them under the adapter's name and
under its base, and n, n' the trainer's, the server's change e - e' is compared with those of the versions, n - n':
constant differences of two implementations cancel. Of two versions N and k, d = n_N - n_k apart,

    share = <(e - e') - (n_k - n'), d> / <d, d>

is 1 on a server of N, 0 on one of k. The trainer's own rounding moves both towards 1/2, and neither past it: a share
clearly below 1/2 is another version, one that is not clearly above it tells nothing. Against the base, whose place is
not rounded in e - e', it is <e - n', d> / <d, d>.

*Covered*: another base, the base itself, any other version of the same run that the canary can tell from this one.
*Not covered*: an adapter of another run that happens to lie nearest to this version; what a server does besides (its
chat template and parsers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.errors import UserError
from trainer.runs.canary_record import CanaryRecord

_CLEAR = 3.0
"""Standard errors between the share and the middle."""

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """That a server runs a version."""

    step: int
    num_tokens: int
    mismatch: float
    """Mean absolute difference between server and trainer, nats a token."""
    share_of_base: float
    """Of the change from the base model that the trainer shows, the server's."""
    alike: Sequence[int]
    """Other steps of the run that the canary can't tell from this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """One version against another."""

    share: float
    error: float
    size: float
    """Mean absolute difference of the two, nats a token."""

    @property
    def is_other(self) -> bool:
        return self.share + _CLEAR * self.error < 0.5

    @property
    def is_this(self) -> bool:
        return self.share - _CLEAR * self.error > 0.5


def check_base(record: CanaryRecord, served: Sequence[float], *, name: str, tolerance: float) -> None:
    """Raise `UserError` unless the server's base model, which it calls `name`, is the one that was trained."""
    mismatch = record.base_mismatch(served)
    if not mismatch <= tolerance:
        raise UserError(
            f"{name}, the server's base model, is not the one that was trained: on the canary its log-probabilities "
            f"differ from the trainer's by {mismatch:.3f} nats a token (engine.canary_mean_tolerance is {tolerance:g})"
        )


def prove(
    record: CanaryRecord, served: Sequence[float], base: Sequence[float], *, step: int, name: str, tolerance: float
) -> Proof:
    """That `served`, of the model `name` on a server whose base says `base`, is the policy of `step`.

    Raises `UserError` that says which policy it is instead, with figures.
    """
    of_base = _told(record, np.subtract(served, record.base), step, None)
    moved = np.subtract(served, base)
    others: dict[int | None, _Told] = {None: of_base}
    others |= {k: _told(record, moved - _change(record, k), step, k) for k in record.policies if k != step}
    nearest = min((step, *others), key=lambda version: _mean_difference(served, _scores(record, version)))
    mismatch = _mean_difference(served, _scores(record, nearest))
    if not mismatch <= tolerance:
        raise UserError(
            f"{name} is no policy of this run: on the canary its log-probabilities differ by {mismatch:.3f} nats a "
            f"token from those of {_named(nearest)}, the nearest (engine.canary_mean_tolerance is {tolerance:g})"
        )
    if wrong := [other for other, told in others.items() if told.is_other]:
        found = min(wrong, key=lambda version: _mean_difference(served, _scores(record, version)))
        told = others[found]
        # Without a minus before zero.
        share = round(told.share, 2) + 0.0
        raise UserError(
            f"{name} answers as {_named(found)}, not as step {step}: of what lies between the two on the canary "
            f"({told.size:.3f} nats a token) it shows {share:.0%} (standard error {told.error:.0%})"
        )
    if not of_base.is_this:
        raise UserError(
            f"{name} can't be proved to be step {step}: on the canary that differs from the base model by "
            f"{of_base.size:.4f} nats a token only, less than two engines do"
        )
    return Proof(
        step=step,
        num_tokens=len(served),
        mismatch=_mean_difference(served, record.policies[step]),
        share_of_base=of_base.share,
        alike=[other for other, told in others.items() if other is not None and not told.is_this],
    )


def _named(version: int | None) -> str:
    return "its base model" if version is None else f"step {version} of the run"


def _scores(record: CanaryRecord, version: int | None) -> Sequence[float]:
    """The trainer's of a step; None: of the base."""
    return record.base if version is None else record.policies[version]


def _change(record: CanaryRecord, step: int) -> Scores:
    """From the base to a step."""
    return np.subtract(record.policies[step], record.base)


def _told(record: CanaryRecord, rest: Scores, step: int, other: int | None) -> _Told:
    """`step` against `other`, of which `rest` is the server's difference."""
    between = np.subtract(record.policies[step], _scores(record, other))
    square = float(between @ between)
    if square == 0:
        return _Told(share=0.5, error=math.inf, size=0.0)
    share = float(rest @ between) / square
    error = math.sqrt(float(np.sum((rest - share * between) ** 2)) / max(1, len(rest) - 1) / square)
    return _Told(share=share, error=error, size=float(np.abs(between).mean()))


def _mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.abs(np.subtract(a, b)).mean())
