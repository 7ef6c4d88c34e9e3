"""A real HTTP server whose faults are scripted, request by request."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

HUGE_BYTES = 50_000_000
_PIECE = b"x" * 65_536

Behaviour = Callable[["Call"], Awaitable[web.StreamResponse]]


class Call:
    """One request as the server saw it."""

    def __init__(self, server: FaultyServer, request: web.Request, payload: Any, number: int) -> None:
        self.server = server
        self.request = request
        self.payload = payload
        self.number = number
        """Counted from 0."""

    async def answer(self, value: Any = None, status: int = 200) -> web.StreamResponse:
        """JSON; by default what the server computes for a call that is in order."""
        return web.json_response(self.server.compute(self.payload) if value is None else value, status=status)

    async def error(self, status: int = 503) -> web.StreamResponse:
        self.server.num_faults += 1
        return web.Response(status=status, text="out of order")

    async def garbage(self) -> web.StreamResponse:
        self.server.num_faults += 1
        return web.Response(body=b'\xff\xfe<html>{"output": ', content_type="application/json")

    async def slow(self, seconds: float = 0.3) -> web.StreamResponse:
        self.server.num_faults += 1
        await asyncio.sleep(seconds)
        return await self.answer()

    async def hang(self) -> web.StreamResponse:
        self.server.num_faults += 1
        await asyncio.sleep(3600)
        raise AssertionError("unreachable")

    async def cut(self) -> web.StreamResponse:
        """Closes the connection in the middle of the body; the call has been carried out."""
        self.server.num_faults += 1
        body = json.dumps(self.server.compute(self.payload)).encode()
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(self.request)
        await response.write(body[: len(body) // 2])
        assert self.request.transport is not None
        self.request.transport.close()
        return response

    async def drop(self) -> web.StreamResponse:
        """Closes the connection without a byte."""
        self.server.num_faults += 1
        assert self.request.transport is not None
        self.request.transport.close()
        raise ConnectionResetError

    async def huge(self, form: str = "chunked") -> web.StreamResponse:
        """50 MB, written as fast as the client takes them; `bytes_written` counts."""
        self.server.num_faults += 1
        if form == "gzip":
            body = gzip.compress(b"x" * HUGE_BYTES)
            return web.Response(body=body, headers={"Content-Encoding": "gzip"})
        headers = {"length": {"Content-Length": str(HUGE_BYTES)}, "events": {"Content-Type": "text/event-stream"}}
        response = web.StreamResponse(headers=headers.get(form, {}))
        await response.prepare(self.request)
        for _ in range(HUGE_BYTES // len(_PIECE)):
            await response.write(_PIECE)
            self.server.bytes_written += len(_PIECE)
        return response


class FaultyServer:
    """`behave` answers each request; `compute` gives the sane answer. Used by `async with`."""

    def __init__(
        self,
        behave: Behaviour | Sequence[str] = lambda call: call.answer(),
        compute: Callable[[Any], Any] = lambda payload: {"output": "fine"},
    ) -> None:
        """`behave` may name a method of `Call` for each request in turn."""
        if not callable(behave):
            names = list(behave)

            def behave(call: Call) -> Awaitable[web.StreamResponse]:
                return getattr(call, names[call.number])()

        self.behave = behave
        self.compute = compute
        self.payloads: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.num_faults = 0
        """Answers that were none in order."""
        self.bytes_written = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self.port = 0
        self._arrived = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/call"

    async def received(self, num_requests: int) -> None:
        """Returns when so many have come in."""
        async with self._arrived:
            await asyncio.wait_for(self._arrived.wait_for(lambda: len(self.payloads) >= num_requests), 30)

    async def start(self) -> None:
        """On the port of the last start, if there was one."""
        app = web.Application(client_max_size=10_000_000)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handle_signals=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Closes the port and every connection; requests in work are cut off."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def __aenter__(self) -> FaultyServer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json() if request.can_read_body else None
        self.payloads.append(payload)
        self.headers.append(dict(request.headers))
        async with self._arrived:
            self._arrived.notify_all()
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return await self.behave(Call(self, request, payload, len(self.payloads) - 1))
        finally:
            self._in_flight -= 1
