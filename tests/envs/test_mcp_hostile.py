"""MCP servers over HTTP that are broken or hostile: what is read of them is bounded, and goes nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from envs.errors import UserError, WorldError
from envs.remote.mcp_config import McpServerConfig
from envs.remote.mcp_server import McpServer, McpSession

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
HUGE = 40_000_000
TOOL = {"name": "echo", "inputSchema": {"type": "object"}}


def result(asked: dict[str, Any], value: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": asked["id"], "result": value}


def text_of(words: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": words}]}


class Server:
    """Speaks MCP in JSON; `answers` by method, or by `call`, take the place of what it would say."""

    def __init__(self, **answers: Answer) -> None:
        self.answers = answers
        self.headers: list[Any] = []
        self.bytes_written = 0
        self.num_gets = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method != "POST":
            self.num_gets += 1
            return await self.answers["get"](request, {}) if "get" in self.answers else web.Response(status=405)
        asked = await request.json()
        self.headers.append(request.headers)
        method = asked.get("method", "")
        if "id" not in asked:
            return web.Response(status=202)
        name = {"tools/call": "call", "tools/list": "list"}.get(method, method)
        if name in self.answers:
            return await self.answers[name](request, asked)
        if method == "initialize":
            about = {"name": "odd", "version": "1"}
            value: Any = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": about}
        elif method == "tools/list":
            value = {"tools": [TOOL]}
        elif method == "tools/call":
            value = text_of("well")
        else:
            error = {"code": -32601, "message": "not known"}
            return web.json_response({"jsonrpc": "2.0", "id": asked["id"], "error": error})
        return web.json_response(result(asked, value))

    async def pour(self, request: web.Request, head: bytes, content_type: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        await response.write(head)
        with contextlib.suppress(ConnectionError):
            for _ in range(HUGE // 65_536):
                await response.write(b"x" * 65_536)
                self.bytes_written += 65_536
        return response


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    await runner.cleanup()


@asynccontextmanager
async def session_of(server: Server, **settings: Any) -> AsyncIterator[McpSession]:
    async with serving(server) as url:
        config = {"name": "web", "url": url, "start_timeout_s": 300, "timeout_s": 60, **settings}
        mcp = McpServer(McpServerConfig.model_validate(config))
        session = mcp.session("r")
        try:
            await session.open()
            yield session
        finally:
            await mcp.aclose()


async def test_a_server_in_order_is_asked_for_plain_answers_each_on_its_own_connection() -> None:
    server = Server()
    async with session_of(server, headers={"X-Key": "k"}) as session:
        assert await session.call("echo", {}) == "well"
    assert {(h["Accept-Encoding"], h["Connection"], h["X-Key"]) for h in server.headers} == {("identity", "close", "k")}


@pytest.mark.parametrize("form", ["json", "event", "line", "gzip", "error"])
async def test_an_answer_without_a_bound_is_not_read(form: str) -> None:
    async def answer(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        begun = json.dumps(result(asked, text_of("")))[:-5].encode()
        if form == "gzip":
            body = gzip.compress(begun + b"x" * HUGE)
            return web.Response(body=body, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})
        if form == "event":
            return await server.pour(request, b"event: message\ndata: " + begun, "text/event-stream")
        if form == "line":
            return await server.pour(request, b": ", "text/event-stream")
        return await server.pour(request, begun, "application/json")

    server = Server(call=answer)
    async with session_of(server) as session:
        with pytest.raises(WorldError):
            await session.call("echo", {})
    assert server.bytes_written < 30_000_000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_nothing_is_sent_on_to_another_host(status: int) -> None:
    elsewhere = Server()
    async with serving(elsewhere) as url:

        async def move(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
            return web.Response(status=status, headers={"Location": url.replace("127.0.0.1", "localhost")})

        async with session_of(Server(call=move), headers={"Authorization": "Bearer k"}) as session:
            with pytest.raises(WorldError, match="not followed"):
                await session.call("echo", {"secret": 1})
    assert elsewhere.headers == []


async def test_an_answer_under_another_id_answers_nothing() -> None:
    async def other(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(result({"id": asked["id"] + 1}, text_of("another's")))

    async with session_of(Server(call=other), timeout_s=1) as session:
        with pytest.raises(WorldError, match="no answer within 1 s"):
            await session.call("echo", {})


async def test_a_stream_that_ends_at_once_is_not_resumed_without_a_pause() -> None:
    async def ended(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=b"id: 1\nretry: 0\ndata:\n\n", headers={"Content-Type": "text/event-stream"})

    server = Server(call=ended, get=ended)
    async with session_of(server, timeout_s=3) as session:
        with pytest.raises(WorldError, match="no answer within 3 s"):
            await session.call("echo", {})
    assert 0 < server.num_gets < 20


async def test_pages_without_an_end_and_what_a_server_asks_of_us_hold_up_nothing() -> None:
    async def page(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(result(asked, {"tools": [TOOL], "nextCursor": "more"}))

    async def asks(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        sampling = {"jsonrpc": "2.0", "id": 1, "method": "sampling/createMessage", "params": {"messages": []}}
        news = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}}
        events = [sampling, *[news] * 500, result(asked, text_of("at last"))]
        body = "".join(f"event: message\ndata: {json.dumps(event)}\n\n" for event in events)
        return web.Response(body=body.encode(), headers={"Content-Type": "text/event-stream"})

    server = Server(list=page, call=asks)
    async with serving(server) as url:
        config = McpServerConfig.model_validate({"name": "web", "url": url, "start_timeout_s": 300, "timeout_s": 60})
        mcp = McpServer(config)
        assert len(await asyncio.to_thread(mcp.definitions)) == 100
        session = mcp.session("r")
        await session.open()
        assert await session.call("echo", {}) == "at last"
        await mcp.aclose()


@pytest.mark.parametrize("value", ["[" * 100_000, '"text"', '{"content": [], "isError": {}}', "NaN", "1e999"])
async def test_a_result_that_cannot_be_read_is_a_fault_of_the_world(value: str) -> None:
    async def odd(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        text = f'{{"jsonrpc": "2.0", "id": {asked["id"]}, "result": {value}}}'
        return web.Response(body=text.encode(), content_type="application/json")

    async with session_of(Server(call=odd)) as session:
        with pytest.raises(WorldError):
            await session.call("echo", {})


@pytest.mark.parametrize(
    "odd",
    [
        *({"icons": "x.png"}, {"annotations": {"readOnlyHint": "perhaps"}}, {"title": 5}, {"_meta": []}),
        *({"inputSchema": {"properties": [], "required": True}}, {"inputSchema": {"properties": {"a": None}}}),
        *(
            {"execution": {"taskSupport": "odd"}},
            {"inputSchema": {"type": ["object", "null"]}},
            {"description": "\ud83d"},
        ),
    ],
)
async def test_what_is_odd_about_one_tool_costs_the_server_nothing(odd: dict[str, Any]) -> None:
    async def listed(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(result(asked, {"tools": [{**TOOL, "name": "odd", **odd}, TOOL], "_meta": []}))

    async with session_of(Server(list=listed)) as session:
        definitions = await asyncio.to_thread(McpServer(session._server.config).definitions)
    assert [d["function"]["name"] for d in definitions] == ["odd", "echo"]


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        ({"type": "text", "text": "well", "annotations": {"audience": ["all"], "priority": 7}}, "well"),
        ({"type": "text", "text": None}, ""),
        ({"type": "text", "text": "a\ud83d"}, "a?"),
        ({"type": "image", "data": "aa"}, "[image]"),
        ({"type": "resource_link", "uri": "file:///a"}, "[resource file:///a]"),
        ({"type": "resource", "resource": {"uri": "file:///a"}}, "[resource file:///a]"),
    ],
)
async def test_a_content_is_shown_as_far_as_it_can_be_read(block: dict[str, Any], shown: str) -> None:
    async def odd(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        text = {"type": "text", "text": "and more"}
        return web.json_response(result(asked, {"content": [block, text], "isError": None}))

    async with session_of(Server(call=odd)) as session:
        assert await session.call("echo", {}) == f"{shown}\nand more"


async def test_what_a_call_gave_is_kept_where_the_tools_can_be_listed_no_more() -> None:
    async def gone(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=500)

    async with session_of(Server(list=gone)) as session:
        assert await session.call("echo", {}) == "well"


@pytest.mark.parametrize(
    ("kind", "said"), [("text/plain", "no key given"), ("application/json", '{"detail": "no key given"}')]
)
async def test_what_a_server_refuses_a_request_with_is_told(kind: str, said: str) -> None:
    async def refuse(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=401, content_type=kind, text=said)

    async with session_of(Server(call=refuse)) as session:
        with pytest.raises(WorldError, match="echo: HTTP 401 Unauthorized"):
            await session.call("echo", {})
    async with serving(Server(initialize=refuse)) as url:
        with pytest.raises(UserError, match="can't be reached: HTTP 401 Unauthorized"):
            await asyncio.to_thread(McpServer(McpServerConfig(name="web", url=url)).definitions)


async def test_a_session_that_the_server_knows_no_more_is_opened_anew_whatever_the_refusal_says() -> None:
    """As after a restart of a server by TypeScript's SDK, which says so as a JSON-RPC error of its own."""
    begun: list[str] = []

    async def begin(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        begun.append(f"session-{len(begun)}")
        about = {"name": "odd", "version": "1"}
        value = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": about}
        return web.json_response(result(asked, value), headers={"Mcp-Session-Id": begun[-1]})

    async def known(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        if request.headers["Mcp-Session-Id"] == "session-0":
            error = {"code": -32001, "message": "Session not found"}
            return web.json_response({"jsonrpc": "2.0", "id": None, "error": error}, status=404)
        return web.json_response(result(asked, text_of("well")))

    async with session_of(Server(initialize=begin, call=known), per_rollout=False) as session:
        assert await session.call("echo", {}) == "well"
    assert begun == ["session-0", "session-1"]
