"""What a judge is asked and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from pydantic import Field, field_validator

from envs.reading.variables import NAME
from envs.settings import Settings


class JudgeConfig(Settings):
    """Where `score_model` and `label_model` find their judges: any OpenAI-compatible server, or the run's engine."""

    base_url: str = Field(
        default="https://api.openai.com/v1",
        pattern=r"^(https?://.+|\$\{.+|engine)$",
        description="The server's URL with /v1, ${NAME} in it read from the environment; `engine` asks the run's own "
        "base model with the adapter off.",
    )
    api_key_env: str = Field(default="OPENAI_API_KEY", pattern=NAME, description="The environment variable of the key.")
    model: str | None = Field(default=None, description="Asked in place of the model that the graders name.")
    max_concurrency: int = Field(default=32, ge=1, description="Requests in flight.")
    timeout_s: float = Field(default=120.0, gt=0, description="Of one request.")
    max_retries: int = Field(default=3, ge=0, description="Further attempts at a request that failed.")
    cache_size: int = Field(default=100_000, ge=0, description="Answers kept, by content; 0 turns the cache off.")

    @field_validator("base_url")
    @classmethod
    def _ends_before_the_path(cls, url: str) -> str:
        for path in ("/chat/completions", "/completions"):
            if url.rstrip("/").endswith(path):
                raise ValueError(f"expected the URL up to /v1; {path} is added to it")
        return url


class JudgeSampling(Settings):
    """How a judge samples."""

    seed: int | None = Field(default=None, description="Passed on; null: none.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling; null: as the server has it.")
    temperature: float | None = Field(default=None, ge=0, description="0 is greedy; null: as the server has it.")
    max_completions_tokens: int | None = Field(default=None, ge=1, description="The hosted service spells it so.")
    reasoning_effort: str | None = Field(default=None, description="Of judges that have levels of it.")


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


class NobodyAsked:
    """Stands in for the judge where graders are only checked: it needs no key and no server."""

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        raise AssertionError("a grader that is only checked asks no judge")

    async def aclose(self) -> None: ...


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
