"""A trained adapter into a vLLM server that runs, and the proof that the server answers as the trained policy.

The server has been started with `--enable-lora`, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 where it does not have the
adapter yet; it reads the adapter's folder itself, from its own disk or one that both see. Whatever it was given and
does not prove to be is taken out again. What it had under the name before stays as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from envs.clients.urls import check_url
from envs.errors import UserError
from envs.reading.json_text import read_json
from trainer.exports.proof import Proof, check_base, prove
from trainer.exports.trained import Trained
from trainer.runs.canary_record import read_canary

_TIMEOUT_S = 600.0
"""Of one request: a large adapter is read from a network's disk."""
_LIST_S = 30.0
"""Of asking which models there are."""
_MOST_BYTES = 64 << 20
"""Of one answer."""


def deploy(
    trained: Trained, url: str, adapter: str, *, name: str, api_key: str | None = None, timeout_s: float = _TIMEOUT_S
) -> Proof:
    """Have the server at `url` serve the folder `adapter`, as the server sees it, as the model `name`; prove it.

    A server that has a model of this name already is only proved. Raises `UserError` for all that stands against it.
    """
    record = read_canary(trained.run, trained.step)
    tolerance = trained.config.engine.canary_mean_tolerance
    with _Server(url, api_key, timeout_s) as server:
        models = server.models()
        base = next((m["id"] for m in models if not m.get("parent")), None)
        if base is None or base == name:
            raise UserError(f"{url}: serves no base model beside {name!r}; start it with --enable-lora on the base")
        of_base = server.score(base, record.token_ids)
        check_base(record, of_base, name=f"{url}: {base!r}", tolerance=tolerance)
        is_new = name not in [m["id"] for m in models]
        if is_new:
            server.load(name, adapter)
        try:
            served = server.score(name, record.token_ids)
            told = f"{url}: {name!r}"
            return prove(record, served, of_base, step=trained.step, name=told, tolerance=tolerance)
        except UserError as e:
            if not is_new:
                raise UserError(f"{e}. Unload it there, or choose another --name") from e
            try:
                server.unload(name)
            except UserError as left:
                raise UserError(f"{e}. It is still loaded there, since it could not be unloaded: {left}") from e
            raise UserError(f"{e}. It has been unloaded again") from e


class _Server:
    """vLLM's own API. Every method raises `UserError` in one line."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        check_url("--deploy", url)
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout_s)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        data = self._ask("GET", "/v1/models").get("data")
        if not isinstance(data, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in data):
            raise UserError(f"{self._url}/v1/models: lists no models; expected a vLLM server")
        return data

    def score(self, model: str, token_ids: Sequence[Sequence[int]]) -> list[float]:
        """Log-probabilities of every token but the first of each sequence, one request after the other."""
        scores: list[float] = []
        for ids in token_ids:
            asked = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
            answer = self._ask("POST", "/v1/completions", asked)
            try:
                told = answer["choices"][0]["prompt_logprobs"][1:]
                scores += [_finite(entry[str(i)]["logprob"]) for i, entry in zip(ids[1:], told, strict=True)]
            except (KeyError, IndexError, TypeError, ValueError, OverflowError):
                raise UserError(f"{self._url}: gives no prompt_logprobs; expected a vLLM server") from None
        return scores

    def load(self, name: str, adapter: str) -> None:
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": adapter})

    def unload(self, name: str) -> None:
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        """The whole of it within the time of one request, however slowly it comes."""
        end = time.monotonic() + (self._timeout_s if body is not None else min(self._timeout_s, _LIST_S))
        with self._http.stream(method, path, json=body, timeout=end - time.monotonic()) as answer:
            read = bytearray()
            for part in answer.iter_bytes():
                read += part
                if len(read) > _MOST_BYTES:
                    raise UserError(f"{self._url}{path}: answers more than {_MOST_BYTES >> 20} MiB; expected vLLM")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("its answer does not end", request=answer.request)
        return httpx.Response(answer.status_code, content=bytes(read), request=answer.request)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        where = f"{self._url}{path}"
        try:
            answer = self._answer(method, path, body)
        except httpx.HTTPError as e:
            raise UserError(f"{where}: no answer ({e or type(e).__name__}); is the server running there?") from e
        if answer.status_code in (401, 403):
            raise UserError(
                f"{where}: refuses the key ({answer.status_code}); --api-key-env names the variable with it"
            )
        said = _said(answer)
        if answer.status_code == 404 and path.endswith("_lora_adapter") and said in (None, "Not Found"):
            raise UserError(
                f"{where}: this server takes no adapters while it runs; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        if answer.is_error:
            raise UserError(f"{where}: {answer.status_code}: {said or ' '.join(answer.text.split())[:500]}")
        if path.endswith("_lora_adapter"):
            return {}
        try:
            value = read_json(answer.text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{where}: answers no JSON object; expected a vLLM server")
        return value


def _finite(logprob: Any) -> float:
    """Raises `ValueError` for what is no log-probability."""
    if not math.isfinite(value := float(logprob)):
        raise ValueError("not finite")
    return value


def _said(answer: httpx.Response) -> str | None:
    """What vLLM says of an error, in one line; None where it is not vLLM that says it."""
    try:
        message = read_json(answer.text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return " ".join(str(message).split())[:500]
