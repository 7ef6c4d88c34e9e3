"""What a judge is asked and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from graders.config import JudgeSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRequest:
    """One question to a judge."""

    model: str
    messages: tuple[Mapping[str, str], ...]
    """Chat Completions messages, `role` and `content`, rendered."""
    schema: Mapping[str, Any] | None
    """JSON schema that the answer must fit; the server enforces it. None asks for plain text."""
    sampling: JudgeSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReply:
    """What the judge answered."""

    text: str
    """JSON text, as a rule; cut off where the judge ran out of tokens."""
    refusal: str = ""
    num_tokens: int = 0
    """Prompt and completion tokens; 0 where the answer came out of the cache."""


class Judge(Protocol):
    """Answers one request. Raises `WorldError` when it can't be reached after its retries.

    It may also be what `ChecksSampling` and `envs.base.Counts` describe.
    """

    async def ask(self, request: JudgeRequest) -> JudgeReply: ...

    async def aclose(self) -> None: ...


@runtime_checkable
class ChecksSampling(Protocol):
    """A judge that can tell before the run whether it can be asked."""

    def check(self, sampling: JudgeSampling) -> None:
        """Raises `UserError` where it can't be asked at all, or not so; called by each grader that will ask it."""
        ...


def check_judge(judge: Judge, sampling: JudgeSampling) -> None:
    """Raise `UserError` where `judge` can't be asked so."""
    if isinstance(judge, ChecksSampling):
        judge.check(sampling)


class JudgeMeter:
    """Counts what a judge was asked, from one `take` to the next."""

    def __init__(self) -> None:
        self._latencies_s: list[float] = []
        self._counts: Counter[str] = Counter()

    def answered(self, *, latency_s: float, num_tokens: int, num_retries: int = 0) -> None:
        self._latencies_s.append(latency_s)
        self._counts.update(requests=1, retries=num_retries, tokens=num_tokens)

    def failed(self) -> None:
        self._counts.update(requests=1, failures=1)

    def take(self) -> dict[str, float]:
        """Empty where nothing was asked. The latency is the mean of what was answered, retries included."""
        counts, latencies_s = self._counts, self._latencies_s
        self._counts, self._latencies_s = Counter(), []
        if not counts:
            return {}
        taken: dict[str, float] = {f"judge/{n}": counts[n] for n in ("requests", "failures", "retries", "tokens")}
        return taken | ({"judge/latency_s": fmean(latencies_s)} if latencies_s else {})
