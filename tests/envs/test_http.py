"""The HTTP client for the user's servers: what it retries, what it refuses, and that it always ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from envs.clients.http import HttpCaller, HttpLimits, HttpReply, HttpServer, RequestTooLarge, resolve_headers
from envs.errors import UserError, WorldError
from tests.support.faulty_server import HUGE_BYTES, Call, FaultyServer

QUICK: dict[str, Any] = {"timeout_s": 5.0, "backoff_s": 0.005, "breaker_probe_s": 0.02, "breaker_wait_s": 2.0}


@pytest.fixture
async def caller() -> AsyncIterator[Callable[..., HttpCaller]]:
    """Makes callers with quick limits; they are closed at the end."""
    made: list[HttpCaller] = []

    def make(server: FaultyServer | str, headers: dict[str, str] | None = None, **limits: Any) -> HttpCaller:
        url = server if isinstance(server, str) else server.url
        made.append(HttpCaller(url=url, headers=headers or {}, limits=HttpLimits(**QUICK | limits)))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


async def test_the_payload_and_headers_arrive_and_the_answer_comes_back(caller):
    async with FaultyServer() as server:
        post = caller(server, {"Authorization": "Bearer k"}).post
        reply = await post({"text": "größer 雪 \ud800", "n": [1, None]})
    assert server.payloads == [{"text": "größer 雪 \ud800", "n": [1, None]}]
    assert server.headers[0]["Authorization"] == "Bearer k"
    assert server.headers[0]["Content-Type"] == "application/json"
    assert (reply.status, reply.json(), reply.too_large) == (200, {"output": "fine"}, False)


async def test_a_4xx_is_an_answer_and_is_not_retried(caller):
    async with FaultyServer(lambda call: call.error(422)) as server:
        reply = await caller(server).post({})
    assert (reply.status, reply.text) == (422, "out of order")
    assert len(server.payloads) == 1


@pytest.mark.parametrize("fault", ["error", "garbage", "cut", "drop", "hang"])
async def test_a_fault_is_retried(caller, fault):
    async with FaultyServer([fault, fault, "answer"]) as server:
        client = caller(server, timeout_s=0.3)
        reply = await client.post({"n": 1}, check=lambda reply: reply.json())
    assert reply.json() == {"output": "fine"}
    assert server.payloads == [{"n": 1}] * 3
    counted = client.take_metrics()
    assert (counted["requests"], counted["retries"], counted["failures"]) == (3, 2, 0)
    assert counted["timeouts"] == (2 if fault == "hang" else 0)
    assert not any(client.take_metrics().values())


async def test_any_sequence_of_faults_ends_in_the_first_sane_answer_or_a_world_error(caller):
    sequences = list(itertools.product(["answer", "error", "cut", "drop"], repeat=3))
    for sequence in sequences:
        async with FaultyServer(sequence) as server:
            client = caller(server, max_retries=2, backoff_s=0.001)
            try:
                outcome = (await client.post({})).json()
            except WorldError:
                outcome = None
        first = sequence.index("answer") if "answer" in sequence else None
        assert outcome == (None if first is None else {"output": "fine"}), sequence
        assert len(server.payloads) == (3 if first is None else first + 1), sequence


@pytest.mark.parametrize("status", [408, 429, 500, 599])
async def test_a_status_that_says_later_is_retried(caller, status):
    async with FaultyServer(lambda call: call.answer() if call.number else call.error(status)) as server:
        assert (await caller(server).post({})).status == 200


async def test_after_the_last_retry_the_error_names_url_attempts_and_cause_but_no_secret(caller):
    async with FaultyServer(lambda call: call.error(503)) as server:
        url = server.url.replace("http://", "http://user:secret@") + "?key=secret"
        with pytest.raises(WorldError, match=r"/call: failed after 3 attempts: HTTP 503: out of order") as e:
            await caller(url, max_retries=2).post({})
        assert "secret" not in str(e.value)
        assert server.url in str(e.value)


async def test_a_hanging_server_ends_in_a_world_error_that_names_the_limit(caller):
    async with FaultyServer(lambda call: call.hang()) as server:
        start = time.perf_counter()
        with pytest.raises(WorldError, match=r"failed after 2 attempts: no answer within 0\.2 s"):
            await caller(server, timeout_s=0.2, max_retries=1).post({})
        assert time.perf_counter() - start < 3


async def test_nobody_listening_is_a_world_error(caller):
    async with FaultyServer() as server:
        pass
    with pytest.raises(WorldError, match=f"{server.port}.*failed after 4 attempts"):
        await caller(server).post({})


async def test_a_request_above_the_limit_is_not_sent(caller):
    async with FaultyServer() as server:
        client = caller(server, max_request_bytes=1000)
        with pytest.raises(RequestTooLarge, match=r"1,\d\d\d bytes; at most 1,000"):
            await client.post({"text": "ü" * 600})
        assert (await client.post({"text": "ü" * 400})).status == 200
    assert len(server.payloads) == 1


@pytest.mark.parametrize("form", ["chunked", "length", "gzip"])
async def test_an_answer_above_the_limit_is_not_read_beyond_it(caller, form):
    def refuse(reply: HttpReply) -> None:
        raise AssertionError("an answer that is too large was checked")

    async with FaultyServer(lambda call: call.huge(form)) as server:
        client = caller(server, max_response_bytes=100_000)
        reply = await client.post({}, check=refuse)
        assert reply.too_large and reply.status == 200 and reply.body == b""
        await asyncio.sleep(0.1)
        # What fits the sockets' buffers may have been written, no more.
        assert server.bytes_written < HUGE_BYTES / 4
        assert client.take_metrics()["too_large"] == 1


async def test_an_answer_at_the_limit_is_read(caller):
    async with FaultyServer(lambda call: call.answer("y" * 998)) as server:
        reply = await caller(server, max_response_bytes=1000).post({})
    assert not reply.too_large and len(reply.body) == 1000


async def test_redirects_to_other_hosts_are_not_followed(caller):
    async with FaultyServer() as other:

        async def redirect(call: Call) -> web.StreamResponse:
            return web.Response(status=307, headers={"Location": other.url})

        async with FaultyServer(redirect) as server:
            with pytest.raises(WorldError, match=r"HTTP 307: redirects to .* which is not followed"):
                await caller(server, {"Authorization": "secret"}, max_retries=0).post({})
    assert not other.payloads


async def test_redirects_within_the_server_are_followed_with_the_payload(caller):
    async def redirect(call: Call) -> web.StreamResponse:
        if call.request.path.endswith("/"):
            return await call.answer()
        return web.Response(status=307, headers={"Location": "/call/"})

    async with FaultyServer(redirect) as server:
        assert (await caller(server).post({"n": 1})).json() == {"output": "fine"}
    assert server.payloads == [{"n": 1}] * 2


async def test_endless_redirects_end(caller):
    async def redirect(call: Call) -> web.StreamResponse:
        return web.Response(status=308, headers={"Location": "/call"})

    async with FaultyServer(redirect) as server:
        with pytest.raises(WorldError, match="more than 3 redirects"):
            await caller(server, max_retries=0).post({})


async def test_cookies_are_not_kept(caller):
    async def set_cookie(call: Call) -> web.StreamResponse:
        return web.json_response({}, headers={"Set-Cookie": "session=1; Path=/"})

    async with FaultyServer(set_cookie) as server:
        client = caller(server)
        await client.post({})
        await client.post({})
    assert "Cookie" not in server.headers[1]


async def test_requests_in_flight_are_bounded(caller):
    async def slow(call: Call) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return await call.answer()

    async with FaultyServer(slow) as server:
        client = caller(server, max_concurrency=3)
        await asyncio.gather(*(client.post({}) for _ in range(20)))
    assert server.most_in_flight == 3


async def test_the_rate_limit_spreads_requests_retries_included(caller):
    async with FaultyServer(lambda call: call.answer() if call.number % 2 else call.error()) as server:
        client = caller(server, rate_limit=50)
        start = time.perf_counter()
        await asyncio.gather(*(client.post({}) for _ in range(6)))
        took_s = time.perf_counter() - start
    assert took_s >= (len(server.payloads) - 1) / 50


async def test_while_a_server_is_down_single_probes_go_out_and_then_everyone(caller):
    up_at = time.perf_counter() + 0.8

    def behave(call: Call) -> Any:
        return call.answer() if time.perf_counter() > up_at else call.error()

    async with FaultyServer(behave) as server:
        client = caller(server, max_concurrency=4, breaker_failures=6, breaker_probe_s=0.1, breaker_wait_s=20)
        replies = await asyncio.gather(*(client.post({}) for _ in range(40)))
    assert [r.status for r in replies] == [200] * 40
    # Without the breaker it would be 40 tries and more: six failures, those in flight beside them, and a few probes.
    assert len(server.payloads) - 40 <= 6 + 3 + 5
    counted = client.take_metrics()
    assert counted["breaker_opened"] == 1 and counted["breaker_wait_s"] > 1 and counted["failures"] == 0


async def test_waiting_for_a_server_that_stays_down_is_bounded(caller):
    async with FaultyServer() as server:
        pass
    client = caller(server, breaker_failures=3, breaker_wait_s=0.5, max_concurrency=4)
    start = time.perf_counter()
    outcomes = await asyncio.gather(*(client.post({}) for _ in range(50)), return_exceptions=True)
    assert time.perf_counter() - start < 5
    assert all(isinstance(outcome, WorldError) for outcome in outcomes)
    assert any("the server is down; waited 0.5 s for it" in str(outcome) for outcome in outcomes)
    counted = client.take_metrics()
    assert counted["failures"] == 50
    assert counted["requests"] < 50


async def test_a_cancelled_probe_leaves_its_place_to_the_next(caller):
    async with FaultyServer(lambda call: call.error() if call.number < 2 else call.hang()) as server:
        client = caller(server, breaker_failures=2, max_retries=1)
        with pytest.raises(WorldError):
            await client.post({})
        probe = asyncio.create_task(client.post({}))
        await server.received(3)
        server.behave = lambda call: call.answer()
        waiting = asyncio.create_task(client.post({}))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        probe.cancel()
        assert (await asyncio.wait_for(waiting, 2)).status == 200


async def test_a_cancelled_call_gives_its_slot_back(caller):
    async with FaultyServer(lambda call: call.hang() if call.number == 0 else call.answer()) as server:
        client = caller(server, max_concurrency=1)
        first = asyncio.create_task(client.post({}))
        await server.received(1)
        first.cancel()
        assert (await asyncio.wait_for(client.post({}), 2)).status == 200


async def test_callers_of_one_server_share_its_connections_and_breaker():
    async with FaultyServer(lambda call: call.error()) as faulty:
        limits = HttpLimits(**QUICK | {"breaker_failures": 2, "max_retries": 1, "breaker_wait_s": 0.1})
        shared = HttpServer(limits)
        one, two = (HttpCaller(url=faulty.url, headers={}, limits=limits, server=shared) for _ in range(2))
        with pytest.raises(WorldError):
            await one.post({})
        with pytest.raises(WorldError):
            await two.post({})
        assert one.take_metrics()["breaker_opened"] == 1 and two.take_metrics()["breaker_opened"] == 0
        faulty.behave = lambda call: call.answer()
        await one.post({})
        await one.aclose()
        assert (await two.post({})).status == 200
        await shared.aclose()


async def test_a_closed_caller_may_be_used_again(caller):
    async with FaultyServer() as server:
        client = caller(server)
        await client.post({})
        await client.aclose()
        assert (await client.post({})).status == 200


def test_a_body_that_is_no_json_is_a_value_error():
    for body in (b"", b"{", b"\xff\xfe", b"[" * 200_000):
        with pytest.raises(ValueError):
            HttpReply(status=200, body=body).json()
    assert HttpReply(status=200, body=b"a\xff").text == "a\ufffd"


def test_headers_take_environment_variables(monkeypatch):
    monkeypatch.setenv("SHOP_KEY", "s3cret")
    headers = {"Authorization": "Bearer ${SHOP_KEY}", "X-Plain": "$SHOP_KEY"}
    assert resolve_headers(headers, "here") == {"Authorization": "Bearer s3cret", "X-Plain": "$SHOP_KEY"}


def test_a_header_that_cant_be_had_is_named(monkeypatch):
    monkeypatch.delenv("SHOP_KEY", raising=False)
    with pytest.raises(UserError, match=r"world\.tools\.0\.headers: the environment variable SHOP_KEY is not set"):
        resolve_headers({"Authorization": "${SHOP_KEY}"}, "world.tools.0.headers")
    with pytest.raises(UserError, match="on one line"):
        resolve_headers({"X": "a\nb"}, "h")


class RawServer:
    """Answers each request with the bytes that `answer` makes of its payload, and again `late_s` later."""

    def __init__(self, answer: Callable[[Any], bytes], late_s: float | None = None) -> None:
        self.answer = answer
        self.late_s = late_s

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split("\r\n")[0])
                answer = self.answer(json.loads(await reader.readexactly(length)))
                writer.write(answer)
                if self.late_s is not None:
                    await asyncio.sleep(self.late_s)
                    writer.write(answer)
                await writer.drain()


def raw(body: Any, status: str = "200 OK") -> bytes:
    text = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


@pytest.mark.parametrize("late_s", [0.0, 0.05, 0.2])
async def test_an_answer_that_comes_again_late_answers_nobody_else(caller, late_s):
    async with RawServer(lambda payload: raw({"output": payload["n"]}), late_s) as url:
        client = caller(url)
        for n in range(4):
            reply = await client.post({"n": n})
            assert reply.json() == {"output": n}
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("status", ["101 Switching Protocols", "000 Nothing", "199 Odd", "600 Beyond", "999 Denied"])
async def test_a_status_that_is_no_answer_is_the_servers_fault(caller, status):
    async with RawServer(lambda payload: raw({"output": "x"}, status)) as url:
        with pytest.raises(WorldError, match="failed after 2 attempts"):
            await caller(url, max_retries=1, timeout_s=1.0).post({})
