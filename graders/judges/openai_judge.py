"""The judge behind a server that speaks Chat Completions."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import time
from typing import Any

from envs.clients.bounded import PLAIN, bounded
from envs.clients.urls import check_url, server_url
from envs.errors import UserError, WorldError
from envs.limits.clocks import place_in
from envs.reading.variables import key_of
from envs.text import one_line
from graders.judges.base import JudgeConfig, JudgeMeter, JudgeReply, JudgeRequest, JudgeSampling

_OPENAI_HOST = "api.openai.com"
_CONNECT_TIMEOUT_S = 10.0
_MAX_BACK_OFF_S = 8.0
_MAX_ANSWER_BYTES = 8 * 2**20
"""Far above an answer of the longest reasoning."""
_MAX_ECHO = 200
_MOST_TOKENS = 10**9
_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|maximum (model|input) length|maximum number of tokens|prompt is too long"
)
"""How servers say it; few give it a code of its own."""
_CONTENT_FILTER = "content_filter"


def build_judge(config: JudgeConfig) -> OpenAIJudge:
    """The judge behind an HTTP server. The run's own engine (`engine`) is `trainer.engines.base_judge`'s."""
    assert config.base_url != "engine", "the engine's judge is bound to the run's engine"
    return OpenAIJudge(config)


class OpenAIJudge:
    """Asks a server that speaks Chat Completions with `response_format: json_schema`.

    What comes of each fault:
        408, 409, 429, 5xx, no connection, time-out   retried with back-off by the openai package; then `WorldError`
        an answer that is no chat completion          `WorldError`
        an answer above 8 MiB, or a compressed one    retried, then `WorldError`
        401, 403, 404 (an unknown model too)          `UserError`: no rollout could be graded, the run stops
        a redirect                                    not followed, prompt and key are for this server: `UserError` as
                                                      long as it has never answered, afterwards `WorldError`
        prompt longer than the judge's context, 413   `WorldError`: it says nothing about the answer, so it is no 0
        prompt stopped by a content filter            a refusal
        any other 4xx                                 `UserError` as long as this server has never answered: the request
                                                      is wrong as such. Afterwards `WorldError`: this one prompt is
                                                      at fault, and one odd rollout must not stop a run

    Covered: at most `max_concurrency` requests in flight, back-off included; a server that never answers or sends one
    byte at a time ends after (1 + max_retries) times `timeout_s`, plus the back-off; an answer that comes late or twice
    answers no other question. Not covered: servers that know `max_tokens` only; a bound over several processes (each
    has its own).
    """

    def __init__(self, config: JudgeConfig, *, key: str = "judge") -> None:
        """`key` is the section of the run's config that the settings stand in; what goes wrong is told in its words."""
        self._config = config
        self._key_of = key
        self._role = key.rpartition(".")[2]
        self._client: Any = None
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._meter = JudgeMeter()
        self._has_answered = False

    def check(self, sampling: JudgeSampling) -> None:
        """Raise `UserError` where the key or the openai package is missing."""
        del sampling  # The server knows what it takes.
        try:
            # Takes seconds, which the first question, and the rollouts beside it, need not wait for.
            importlib.import_module("openai")
        except ImportError as e:
            raise UserError(f"{self._key_of}: it needs the package openai; pip install openai ({e})") from None
        host, _ = check_url(f"{self._key_of}.base_url", self._url())
        if not self._key() and host == _OPENAI_HOST:
            raise UserError(
                f"{self._key_of}.api_key_env: the environment has no {self._config.api_key_env}; set it to your key, "
                f"set {self._key_of}.base_url to another server, or let the run's own engine answer"
            )

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        async with place_in(self._slots):
            start = time.perf_counter()
            try:
                reply, num_retries = await self._ask(request)
            except WorldError:
                self._meter.failed()
                raise
            self._meter.answered(
                latency_s=time.perf_counter() - start, num_tokens=reply.num_tokens, num_retries=num_retries
            )
            self._has_answered = True
            return reply

    def take_metrics(self) -> dict[str, float]:
        return self._meter.take()

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _ask(self, request: JudgeRequest) -> tuple[JudgeReply, int]:
        """The reply, and how often it was asked for again."""
        import openai

        if self._client is None:
            self._client = self._connect()
        model = self._config.model or request.model
        # The package's own limit is on each wait for bytes, which a server may stretch for ever.
        limit_s = (1 + self._config.max_retries) * self._config.timeout_s + self._config.max_retries * _MAX_BACK_OFF_S
        create = self._client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(limit_s):
                raw = await create(model=model, messages=[dict(m) for m in request.messages], **_parameters(request))
        except TimeoutError as e:
            raise self._fault(model, f"no answer within {limit_s:g} s, retries included") from e
        except openai.APIStatusError as e:
            return self._refused(model, e), 0
        except openai.APIError as e:
            raise self._fault(model, _words(e, e.__cause__)) from e
        try:
            return _read_reply(json.loads(raw.content)), raw.retries_taken
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise self._fault(model, f"its answer is no chat completion: {_words(e)}") from e

    def _refused(self, model: str, e: Any) -> JudgeReply:
        """What to make of a status of 400 and above, after the retries: see the class."""
        # The package tells the status and a message; a body that is no JSON has to be looked up.
        said = _words(e, e.body if isinstance(e.body, str) else None)
        if 300 <= e.status_code < 400:
            target = str(e.response.headers.get("location", ""))[:_MAX_ECHO]
            said = f"HTTP {e.status_code}: redirects to {target}, which is not followed"
        if e.status_code >= 500 or e.status_code in (408, 409, 429):
            raise self._fault(model, said) from e
        if e.code == _CONTENT_FILTER:
            return JudgeReply(text="", refusal=f"the server's content filter stopped the prompt: {said}")
        if e.status_code == 413 or e.code == "context_length_exceeded" or _TOO_LONG.search(said.lower()):
            raise self._fault(model, f"the prompt is too long for the {self._role}: {said}") from e
        if e.status_code not in (401, 403, 404) and self._has_answered:
            raise self._fault(model, said) from e
        raise UserError(
            f"{self._key_of}: {self._config.base_url} refuses the model {model!r} or the request: {said}; check "
            f"{self._key_of}.base_url, {self._key_of}.api_key_env ({self._config.api_key_env}), and the model's name "
            "and sampling (a grader's model and sampling_params)"
        ) from e

    def _fault(self, model: str, cause: str) -> WorldError:
        return WorldError(f"the {self._role} {model!r} at {self._config.base_url}: {cause}")

    def _connect(self) -> Any:
        import openai

        config = self._config
        return openai.AsyncOpenAI(
            base_url=self._url(),
            # Other servers want some key all the same, and the package demands one.
            api_key=self._key() or "none",
            timeout=openai.Timeout(config.timeout_s, connect=min(config.timeout_s, _CONNECT_TIMEOUT_S)),
            max_retries=config.max_retries,
            # A connection for each question: a late answer to the one before can't be taken for this one's.
            default_headers={**PLAIN, "Connection": "close"},
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [bounded(_MAX_ANSWER_BYTES)]}
            ),
        )

    def _url(self) -> str:
        return server_url(self._config.base_url, f"{self._key_of}.base_url")

    def _key(self) -> str:
        return key_of(self._config.api_key_env, f"{self._key_of}.api_key_env")


def _parameters(request: JudgeRequest) -> dict[str, Any]:
    """The structure to enforce, and of the sampling what is set: the server has its own defaults for the rest."""
    sampling = request.sampling
    chosen = {
        "seed": sampling.seed,
        "top_p": sampling.top_p,
        "temperature": sampling.temperature,
        "max_completion_tokens": sampling.max_completions_tokens,
        "reasoning_effort": sampling.reasoning_effort,
    }
    parameters: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if request.schema is not None:
        schema = {"name": "grade", "strict": True, "schema": dict(request.schema)}
        parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
    return parameters


def _read_reply(completion: Any) -> JudgeReply:
    """Raises `LookupError`, `TypeError`, `ValueError` or `OverflowError` for what is no chat completion."""
    choice = completion["choices"][0]
    message = choice["message"]
    if not isinstance(message, dict):
        raise TypeError("its message is no object")
    text, refusal = message.get("content") or "", message.get("refusal") or ""
    if not isinstance(text, str) or not isinstance(refusal, str):
        raise TypeError("its message is no text")
    if choice.get("finish_reason") == _CONTENT_FILTER:
        refusal = refusal or "the server's content filter stopped the answer"
    num_tokens = int((completion.get("usage") or {}).get("total_tokens") or 0)
    # What no server can have counted would overflow where tokens are added up; half characters fit into no file.
    return JudgeReply(
        text=text.encode("utf-8", "replace").decode(),
        refusal=refusal.encode("utf-8", "replace").decode(),
        num_tokens=num_tokens if 0 <= num_tokens <= _MOST_TOKENS else 0,
    )


def _words(*causes: BaseException | str | None) -> str:
    """What the causes say, on one line and not too long."""
    text = " ".join(str(cause) or type(cause).__name__ for cause in causes if cause is not None)
    return one_line(text, _MAX_ECHO)
