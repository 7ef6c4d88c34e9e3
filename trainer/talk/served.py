"""A policy that a server serves, asked by token ids as the run's own engine is: `vllm serve`, which gives them back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from envs.clients.urls import check_url
from envs.errors import UserError, WorldError
from envs.reading.json_text import read_json
from envs.reading.variables import key_of
from envs.secrets import hidden_in
from trainer.engines.engine import Completion, Sampling
from trainer.exports.commands import SERVED_NAME

_CONNECT_S = 5.0
_TURN_S = 600.0


class ServedPolicy:
    """A `Sampler` behind `/v1/completions`. Whether the server's weights are the run's it can't know."""

    def __init__(self, url: str, *, model: str | None, api_key_env: str) -> None:
        """`url` with or without /v1; `model` None: the one called `policy`, or the only one.

        `find` and `start` come before the first turn.
        """
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._api_key_env = api_key_env
        self._stops: list[int] = []
        self._vocabulary = 0
        key = key_of(api_key_env, "--api-key-env")
        check_url("--url", url)
        self._http = httpx.AsyncClient(
            base_url=self._url,
            timeout=httpx.Timeout(_TURN_S, connect=_CONNECT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def find(self) -> str:
        """The model's name. Raises `UserError` for whatever stands against it."""
        with self._told():
            names = [str(model["id"]) for model in (await self._ask("GET", "/v1/models"))["data"]]
            if self._model is None:
                self._model = SERVED_NAME if SERVED_NAME in names else names[0] if len(names) == 1 else None
            if not names:
                raise UserError(f"--url {self._url}: serves no model")
            if self._model not in names:
                said = "which of its models is it?" if self._model is None else f"serves no model {self._model!r};"
                raise UserError(f"--url {self._url}: {said} name one of {', '.join(names)} with --model")
        return self._model

    async def start(self, prompt_ids: Sequence[int], *, stop_token_ids: Sequence[int], vocabulary: int) -> None:
        """Have it write one token. `vocabulary`: the ids of the model's tokens are below it. Raises as `find`."""
        self._stops, self._vocabulary = list(stop_token_ids), vocabulary
        with self._told():
            await self.generate(prompt_ids, Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=0))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, IndexError):
            raise UserError(f"--url {self._url}: does not answer as `vllm serve` does") from None
        except WorldError as e:
            raise UserError(f"--url {e}") from None

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        asked: dict[str, Any] = {
            "model": self._model,
            "prompt": list(prompt_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed % 2**63,
            "stop_token_ids": self._stops,
            "logprobs": 0,
            "return_token_ids": True,
        }
        if sampling.schema is not None:
            asked["structured_outputs"] = {"json": sampling.schema}
        answer = await self._ask("POST", "/v1/completions", asked)
        try:
            choice = answer["choices"][0]
            token_ids = [int(token_id) for token_id in choice["token_ids"]]
            logprobs = [float(x) for x in choice["logprobs"]["token_logprobs"]]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            raise WorldError(f"{self._url}: gives no token ids back; expected `vllm serve` 0.10.2 or later") from None
        if (
            len(token_ids) != len(logprobs)
            or len(token_ids) > sampling.max_tokens
            or not all(0 <= token_id < self._vocabulary for token_id in token_ids)
            or not all(map(math.isfinite, logprobs))
        ):
            raise WorldError(
                f"{self._url}: gives back what no turn of this model is: more tokens than were asked for, or others "
                "than it has; is it this run's policy that is served there?"
            )
        finished = choice.get("finish_reason") == "stop"
        return Completion(token_ids=token_ids, logprobs=logprobs, finished=finished, policy_version=0)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Raises `UserError` for a key that is refused, `WorldError` for every other failure."""
        try:
            answer = await self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as e:
            raise WorldError(f"{self._url}: nobody answers there ({str(e) or type(e).__name__})") from None
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise UserError(
                f"--url {self._url}: refuses the key in {self._api_key_env} (HTTP {answer.status_code}); set it to a "
                "key of this server's, or name the variable that holds one with --api-key-env"
            )
        if answer.is_error:
            raise WorldError(f"{self._url}: HTTP {answer.status_code}: {hidden_in(answer.text)[:500]}")
        try:
            return read_json(answer.text)
        except ValueError:
            raise WorldError(f"{self._url}: does not answer in JSON; expected `vllm serve`") from None
