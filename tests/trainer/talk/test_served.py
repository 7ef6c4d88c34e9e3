"""A server that answers what no turn of the model is, is told from one that serves it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from envs.errors import UserError, WorldError
from tests.support.servers import serving
from trainer.engines.engine import Sampling
from trainer.talk.served import ServedPolicy

SAMPLING = Sampling(max_tokens=3, temperature=1.0, top_p=1.0, seed=1)


def asked(answer: Any, models: str = '{"data": [{"id": "policy"}]}') -> Any:
    """What comes of a turn that the server answers by `answer`, or of looking for its models."""

    async def complete(_: web.Request) -> web.Response:
        return web.Response(text=answer)

    async def listed(_: web.Request) -> web.Response:
        return web.Response(text=models)

    async def ask(url: str) -> Any:
        served = ServedPolicy(url, model=None, api_key_env="NO_KEY")
        try:
            await served.find()
            await served.start([5, 6], stop_token_ids=[2], vocabulary=100)
            return await served.generate([5, 6], SAMPLING)
        finally:
            await served.aclose()

    with serving({"GET /v1/models": listed, "POST /v1/completions": complete}) as url:
        return asyncio.run(ask(url))


def turn(token_ids: str, logprobs: str) -> str:
    return f'{{"choices": [{{"token_ids": {token_ids}, "logprobs": {{"token_logprobs": {logprobs}}}}}]}}'


def test_a_turn_is_taken_as_it_came() -> None:
    assert asked(turn("[7]", "[-0.5]")).token_ids == [7]


@pytest.mark.parametrize(
    "answer",
    [
        turn("[-5]", "[-0.5]"),
        turn("[100]", "[-0.5]"),
        turn("[" + "9" * 30 + "]", "[-0.5]"),
        turn("[7]", "[-1e999]"),
        turn("[7]", "[NaN]"),
        turn("[7, 8]", "[-0.5]"),
        turn("[7, 7, 7, 7]", "[-1, -1, -1, -1]"),
        turn("[7]", "[1" + "0" * 400 + "]"),
        '{"choices": [{"token_ids": ' + "[" * 50_000,
        "{}",
    ],
)
def test_what_is_no_turn_of_the_model_is_said_in_a_line(answer: str) -> None:
    with pytest.raises((UserError, WorldError)) as told:
        asked(answer)
    assert "\n" not in str(told.value) and "http://127.0.0.1:" in str(told.value)


def test_a_server_without_models_is_said_to_have_none() -> None:
    with pytest.raises(UserError, match=r"^--url http://127\.0\.0\.1:\d+: serves no model$"):
        asked("{}", '{"data": []}')
