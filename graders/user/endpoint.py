"""The hosted service's `endpoint`: the user's own HTTP server gives the score."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import Field

from envs.clients.http import HttpCaller, HttpLimits, HttpReply, RequestTooLarge, resolve_headers
from envs.clients.urls import server_url
from envs.errors import UserError, WorldError
from envs.types import Episode, Task
from graders.hosted.view import hosted_sample, item_of
from graders.settings import Continuous, Name
from graders.types import Grade, GraderErrorKind

_MAX_ECHO = 200
# The longest texts go first; below this nothing of a tool's output would be left to read.
_SHORTEST_TEXT = 64


class EndpointConfig(Continuous):
    """The user's own HTTP server: POST {sample, item, trace_id} → {"score": number}."""

    type: Literal["endpoint"]
    name: Name = "endpoint"
    url: str = Field(pattern=r"^(https?://|\$\{)", description="Samples are posted here.")
    headers: dict[str, str] = Field(
        default={}, description="Sent with every request; ${NAME} here and in the URL is read from the environment."
    )
    rate_limit: float | None = Field(default=None, gt=0, description="Requests a second.")
    timeout_s: float = Field(default=600.0, gt=0, description="Of one request.")

    def servers(self) -> dict[str, str]:
        return {"url": self.url}


class EndpointGrader:
    """POSTs `{sample, item, trace_id}` and reads `{"score": number}`. The `trace_id` is the one that the tools got.

    Covered: what the server does wrong is never scored 0. Time-outs, lost connections, 5xx and answers that are no JSON
    are retried; after that, and at once for a 4xx or an answer without a finite number, `WorldError` with the server's
    words. A sample above the limit of 1 MB is shortened in the trajectory (`messages`, `tool_calls`), the longest texts
    first, and says TRUNCATED_OBSERVATION; the keys that the hosted service has too are never touched, so that a sample
    whose answer alone is too large ends in `WorldError`. A row that is too large or no JSON is named before the run.
    Not covered: scores outside [0, 1] are taken as they are.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._limits = HttpLimits(timeout_s=config.timeout_s, rate_limit=config.rate_limit)
        headers = resolve_headers(config.headers, f"grader {config.name!r}: headers")
        url = server_url(config.url, f"grader {config.name!r}: url")
        self._caller = HttpCaller(url=url, headers=headers, limits=self._limits)

    async def grade(self, task: Task, episode: Episode) -> Grade:
        sample, item = hosted_sample(episode), item_of(task)
        payload = {"sample": sample, "item": item, "trace_id": episode.rollout_id}
        errors: tuple[GraderErrorKind, ...] = ()
        try:
            reply = await self._caller.post(payload, check=_check_json)
        except RequestTooLarge:
            errors = (GraderErrorKind.TRUNCATED_OBSERVATION,)
            reply = await self._post_shortened(payload)
        score = self._score(reply)
        why = f"{self._config.name} gives {score:g}"
        return Grade(
            reward=score,
            parts={self._config.name: score},
            explanation=f"{why} for a shortened sample" if errors else why,
            errors=errors,
        )

    def check(self, task: Task) -> None:
        try:
            text = json.dumps(item_of(task), allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as e:
            raise UserError(
                f"task {task.task_id}: grader {self._config.name!r} can't send its item as JSON: {e}"
            ) from None
        num_bytes, limit = len(text.encode("utf-8", "replace")), self._limits.max_request_bytes
        if num_bytes > limit:
            raise UserError(
                f"task {task.task_id}: its item has {num_bytes:,} bytes of JSON; grader {self._config.name!r} sends at "
                f"most {limit:,}, the sample included"
            )

    def take_metrics(self) -> dict[str, float]:
        return {f"grader/{self._config.name}/{name}": value for name, value in self._caller.take_metrics().items()}

    async def aclose(self) -> None:
        await self._caller.aclose()

    async def _post_shortened(self, payload: dict[str, Any]) -> HttpReply:
        longest = max((len(text) for text in _texts(payload["sample"])), default=0)
        while longest > _SHORTEST_TEXT:
            longest = max(longest // 2, _SHORTEST_TEXT)
            try:
                return await self._caller.post(
                    {**payload, "sample": _shortened(payload["sample"], longest)}, check=_check_json
                )
            except RequestTooLarge:
                continue
        raise WorldError(
            f"grader {self._config.name!r}: the sample is above {self._limits.max_request_bytes:,} bytes even with its "
            f"trajectory shortened"
        )

    def _score(self, reply: HttpReply) -> float:
        where = f"grader {self._config.name!r}"
        if reply.too_large:
            raise WorldError(f"{where}: its answer is above {self._limits.max_response_bytes:,} bytes")
        shown = " ".join(reply.text.split())[:_MAX_ECHO]
        if reply.status >= 400:
            raise WorldError(f"{where}: HTTP {reply.status}: {shown}")
        answer = reply.json()
        score = answer.get("score") if isinstance(answer, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not _is_finite(score):
            raise WorldError(f'{where}: expected {{"score": number}}, got {shown}')
        return float(score)


def _check_json(reply: HttpReply) -> None:
    if reply.status < 400:
        reply.json()


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        # A whole number of more digits than a float holds.
        return False


def _texts(sample: dict[str, Any]) -> list[str]:
    """The texts that `_shortened` may cut."""
    found = [m.get(key) for m in sample["messages"] for key in ("content", "reasoning_content")]
    found += [c["function"]["arguments"] for m in sample["messages"] for c in m.get("tool_calls", ())]
    found += [c[key] for c in sample["tool_calls"] for key in ("arguments", "output")]
    return [text for text in found if text]


def _shortened(sample: dict[str, Any], length: int) -> dict[str, Any]:
    """The sample with each text of the trajectory cut to `length` characters; the original is shared and stays."""

    def cut(text: str | None) -> str | None:
        if text is None or len(text) <= length:
            return text
        return f"{text[:length]}… [{len(text) - length} characters cut]"

    def cut_message(message: dict[str, Any]) -> dict[str, Any]:
        out = message | {key: cut(message[key]) for key in ("content", "reasoning_content") if key in message}
        if "tool_calls" in message:
            out["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": cut(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return out

    return sample | {
        "messages": [cut_message(m) for m in sample["messages"]],
        "tool_calls": [
            c | {"arguments": cut(c["arguments"]), "output": cut(c["output"])} for c in sample["tool_calls"]
        ],
    }
