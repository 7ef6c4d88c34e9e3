"""The proof that the sampler runs the policy that is being trained (invariant 2).

Fixed token sequences, the canary, are scored by the engine and by the trainer after every publish. Two things must
hold. The engine agrees with the trainer within a tolerance. And the engine has *moved* as the trainer has: with
e, n the log-probabilities of engine and trainer now and e', n' those at a reference (the base model, the former
version), the share of the update that the engine applied is the regression slope

    a = <e - e', n - n'> / <n - n', n - n'>

which is 0 where the engine still runs the reference. Where it runs the new policy, and the update stands out from the
rounding of activations, it is 1; the constant difference of the two implementations cancels. An update smaller than the
rounding shows a share well below 1 on a right engine, too: rounding errors of the trainer's own scores are in n - n'
and not in e - e'. (Measured on SmolLM2-135M in bfloat16: 0.29 where the same trainer in float32 shows 0.96.) A small
share alone is therefore no proof of a stale engine. It is one where the engine's scores have hardly moved either, for
new weights would have stirred its own rounding, and where the update is far larger than any rounding.

*Not covered:* an update that moves no canary token by more than `_LEAST_MOVE` on average; an engine that was given
other new weights than the trainer's, as long as the update is within `_CLEAR_MOVE` times the base model's mismatch.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from envs.errors import PublishError
from trainer.engines.engine import Engine

_NUM_TOKENS, _MOST_ROWS = 448, 8

_LEAST_MOVE = 1e-3
"""Mean absolute change of the trainer's log-probabilities, nats, below which a reference says nothing."""

_LEAST_SHARE = 0.2
"""A smaller share of the update makes an engine suspect."""

_LEAST_STIR = 0.3
"""A suspect engine is refused whose scores moved by less than this share of the trainer's (root mean square)."""

_CLEAR_MOVE = 3.0
"""A suspect engine is refused, too, where the trainer moved by more than so many times the mismatch of the two on the
base model (root mean square). That is no less than the rounding, so a right engine's share is at least 0.89 there."""

_MOST_SURPLUS = 0.5
"""An engine is refused that shows more than 1.5 or less than 0.5 times what the trainer shows of a part."""

Scores = list[float]
"""Log-probabilities of all canary tokens, the sequences one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    name: str
    engine: Scores
    trainer: Scores


async def canary_rows(
    num_tasks: int, solved: Callable[[int], Awaitable[Sequence[int]]], *, max_tokens: int
) -> list[list[int]]:
    """The token ids of the first tasks, `solved` one after the other; as many as it takes to have enough tokens, since
    scoring them is most of what a publish costs on a CPU.

    Of a long episode it is the end, where the model's own turns are, not the long system prompt that every agent has.
    """
    # Scoring generates a token, for which there must be room.
    longest = min(_NUM_TOKENS // 2, max_tokens - 1)
    rows: list[list[int]] = []
    for number in range(min(num_tasks, _MOST_ROWS)):
        left = _NUM_TOKENS - sum(map(len, rows))
        if left <= 1:
            break
        rows.append(list((await solved(number))[-min(left, longest) :]))
    return rows


class Canary:
    """Holds the canary's tokens and what engine and trainer said of them before."""

    def __init__(self, token_ids: Sequence[Sequence[int]], *, tolerance: float) -> None:
        """`tolerance`: largest mean absolute difference between engine and trainer, nats a token."""
        self.token_ids = [list(ids) for ids in token_ids]
        self._tolerance = tolerance
        self._rounding = math.inf
        self._base: _Reference | None = None
        self._former: _Reference | None = None

    @property
    def rounding(self) -> float:
        """Root mean square of the difference between engine and trainer on the base model, nats a token."""
        return self._rounding

    async def score(self, engine: Engine) -> Scores:
        # One after the other: vLLM 0.31 fails on prompt log-probabilities under LoRA of more than one request at once.
        return [x for ids in self.token_ids for x in await engine.score(ids)]

    async def note_base(self, engine: Engine, trainer: Scores) -> dict[str, float]:
        """Compare the engine before its first publish with the trainer's base model (adapter disabled)."""
        scores = await self.score(engine)
        mismatch = self._check_mismatch(scores, trainer, "the base model was loaded")
        self._rounding = _rms([e - n for e, n in zip(scores, trainer, strict=True)])
        self._base = _Reference(name="the base model", engine=scores, trainer=trainer)
        return {"canary/base_mismatch": mismatch}

    async def prove(self, engine: Engine, trainers: Awaitable[Scores], *, version: int) -> dict[str, float]:
        """Check the engine against the trainer's scores under the adapter, which may be under way meanwhile.

        Raises `PublishError`.
        """
        scores = await self.score(engine)
        trainer = await trainers
        metrics = {"canary/mismatch": self._check_mismatch(scores, trainer, f"policy-v{version} was published")}
        for reference in (self._base, self._former):
            if reference is None:
                continue
            moved = [n - m for n, m in zip(trainer, reference.trainer, strict=True)]
            if sum(map(abs, moved)) / len(moved) < _LEAST_MOVE:
                continue
            engine_moved = [e - f for e, f in zip(scores, reference.engine, strict=True)]
            share, error = _slope(engine_moved, moved)
            metrics[f"canary/applied_since_{reference.name.split()[-1]}"] = share
            is_suspect = share + 3 * error < _LEAST_SHARE
            has_not_stirred = _rms(engine_moved) < _LEAST_STIR * _rms(moved)
            if is_suspect and (has_not_stirred or _rms(moved) > _CLEAR_MOVE * self._rounding):
                raise PublishError(
                    f"after policy-v{version} was published the engine still answers as {reference.name}: it shows "
                    f"{share:.0%} of the update that the trainer shows on the canary (standard error {error:.0%})"
                )
        self._former = _Reference(name="the former version", engine=scores, trainer=trainer)
        return metrics

    async def prove_parts(self, engine: Engine, trainer: Scores, moves: Mapping[str, Scores]) -> dict[str, float]:
        """Check that the engine runs every part of the adapter; `note_base` comes before. Raises `PublishError`.

        `trainer` is what the trainer says under an adapter in which all parts change something, `moves` by how much
        each part alone changes what it says under the base model. With e, n as above, y = (e - e') - (n - n') is
        regressed on the moves: a part that the engine leaves out has the coefficient -1, one that it applies 0.
        Returns the share of each part that the engine shows, without those that move too little to be judged.
        """
        assert self._base is not None
        scores = await self.score(engine)
        moved = np.subtract(trainer, self._base.trainer)
        excess = np.subtract(scores, self._base.engine) - moved
        clear = {name: move for name, move in moves.items() if _rms(move) > max(_LEAST_MOVE, self._rounding)}
        if not clear:
            return {}
        matrix = np.array(list(clear.values())).T
        inverse = np.linalg.pinv(matrix.T @ matrix)
        surplus = inverse @ matrix.T @ excess
        variance = float(np.sum((excess - matrix @ surplus) ** 2)) / max(1, len(excess) - len(clear))
        errors = np.sqrt(variance * np.diag(inverse))
        wrong = [
            f"{name} ({1 + float(c):.0%})"
            for name, c, error in zip(clear, surplus, errors, strict=True)
            if abs(c) > max(_MOST_SURPLUS, 4 * error)
        ]
        if _rms(list(moved + excess)) < _LEAST_STIR * _rms(list(moved)):
            raise PublishError("the engine still answers as the base model under an adapter that changes every layer")
        if wrong or _rms(list(excess)) > _MOST_SURPLUS * _rms(list(moved)):
            raise PublishError(
                "the engine does not run the adapter as the trainer does: of what the trainer shows on the canary for "
                f"each kind of layer the engine shows another share: {', '.join(wrong) or 'none in particular'}"
            )
        return {name: 1 + float(c) for name, c in zip(clear, surplus, strict=True)}

    def _check_mismatch(self, scores: Scores, trainer: Scores, event: str) -> float:
        mismatch = sum(abs(e - n) for e, n in zip(scores, trainer, strict=True)) / len(scores)
        if not mismatch <= self._tolerance:
            raise PublishError(
                f"after {event} the engine's log-probabilities differ from the trainer's by {mismatch:.3f} nats a "
                f"token on the canary (engine.canary_mean_tolerance is {self._tolerance}): it runs another policy"
            )
        return mismatch


def _rms(values: Scores) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def _slope(y: Scores, x: Scores) -> tuple[float, float]:
    """Least-squares slope of y on x through the origin, and its standard error."""
    xx = sum(v * v for v in x)
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / xx
    residual = sum((b - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / max(1, len(x) - 1)
    return slope, math.sqrt(residual / xx)
