"""One connection to an MCP server: the SDK's client in a task of its own, and its answers as text or as our errors."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import ssl
import string
import sys
import tempfile
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError

from envs.clients.bounded import PLAIN, bounded
from envs.errors import ToolError, WorldError
from envs.remote.mcp_answers import BOUNDED_LINES, MAX_MESSAGE_BYTES, make_readable, readable, text_of
from envs.remote.mcp_config import ROLLOUT_DIR, TRACE_ID, McpServerConfig
from envs.secrets import not_kept

if TYPE_CHECKING:
    from mcp import Client

_CLOSE_S = 10.0
"""The SDK gives a stdio server about six seconds to end; an HTTP server has as long to answer."""
_MAX_OUTPUT_BYTES = 1_000_000
_MAX_PAGES = 100
_RESUME_PAUSE_S = 1.0
_TAIL_BYTES = 500
# A process of a killed run gets no chance to close its servers: on Linux the kernel does it. execvp keeps the setting.
_LAUNCH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)
_PLAIN = string.ascii_letters + string.digits + string.punctuation.replace("%", "")


class Connection:
    """An entered SDK client, held by a task of its own: its contexts must be left in the task that entered them."""

    def __init__(self, config: McpServerConfig, *, rollout_id: str) -> None:
        """`rollout_id` is empty where the connection is no rollout's: for the list of tools, or for all rollouts."""
        self._config = config
        self._trace_id = urllib.parse.quote(rollout_id, safe=_PLAIN)
        self.folder = ""
        """The rollout's own, where the config asks for one; from `open` to `close`."""
        self._stop = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._client: Client | None = None
        self._errors: TextIO | None = None
        self._is_cut = False

    @property
    def is_broken(self) -> bool:
        return self._is_cut or self._owner is None or self._owner.done()

    async def open(self) -> None:
        ready = asyncio.get_running_loop().create_future()
        if self._config.has_folder:
            self.folder = tempfile.mkdtemp(prefix="agent-rft-mcp-")
        self._config = self._config.resolved({TRACE_ID: self._trace_id or "tools", ROLLOUT_DIR: self.folder})
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed in `close`
        self._owner = asyncio.create_task(self._hold(ready), name=f"mcp {self._config.name}")
        waiting: set[asyncio.Future[Any]] = {self._owner, ready}
        await asyncio.wait(waiting, timeout=self._config.start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return
        cause = self._why_ended() if self._owner.done() else f"no answer within {self._config.start_timeout_s:g} s"
        message = f"MCP server {self._config.name!r} can't be reached: {cause}{self._said()}"
        await self.close()
        raise WorldError(message)

    async def close(self) -> None:
        if self._owner is None:
            return
        self._stop.set()
        if self._client is None:
            self._owner.cancel()
        _, alive = await asyncio.wait({self._owner}, timeout=_CLOSE_S)
        if alive:
            self._owner.cancel()
            await asyncio.wait({self._owner}, timeout=_CLOSE_S)
        if self._owner.done() and not self._owner.cancelled():
            # Asked for, or asyncio logs it as never retrieved. What broke the connection was told where it was used.
            self._owner.exception()
        if self._errors is not None:
            self._errors.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _hold(self, ready: asyncio.Future[None]) -> None:
        async with self._connected() as self._client:
            # Output schemas are not looked at; the SDK would ask for them behind a call, and lose what the call gave
            # where it can't have them.
            self._client.session.validate_tool_result = _taken  # type: ignore[method-assign]
            ready.set_result(None)
            await self._stop.wait()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        import httpx2
        from mcp import Client
        from mcp.client.stdio import StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        config, trace_id = self._config, self._trace_id
        if config.command is not None:
            command, args = _launch(config)
            env = {**config.env, **({"TRACE_ID": trace_id} if trace_id else {})}
            assert self._errors is not None
            parameters = StdioServerParameters(
                command=command,
                args=args,
                env=env,
                cwd=config.cwd,
                encoding=BOUNDED_LINES,
                encoding_error_handler="replace",
            )
            async with Client(readable(stdio_client(parameters, errlog=self._errors))) as client:
                yield client
            return
        assert config.url is not None
        # The SDK takes what comes on a request's connection for its answer, whatever the id: each request has a
        # connection of its own, on which nothing of an earlier one can come late.
        ours = {**PLAIN, "Connection": "close", **({"X-Trace-Id": trace_id} if trace_id else {})}
        hooks = [bounded(MAX_MESSAGE_BYTES, streams=True), make_readable]
        async with httpx2.AsyncClient(
            headers={**config.headers, **ours},
            timeout=httpx2.Timeout(30.0, read=config.timeout_s),
            limits=httpx2.Limits(max_connections=None),
            verify=_ssl_context(),
            event_hooks={"request": [_pause_before_resuming], "response": hooks},
        ) as http:
            transport = streamable_http_client(config.url, http_client=http, max_sse_event_size=MAX_MESSAGE_BYTES)
            # Versions of the protocol from 2026 on know no sessions over HTTP: state per rollout needs the former ones.
            async with Client(readable(transport), mode="legacy" if config.per_rollout else "auto") as client:
                yield client

    async def list_tools(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = await self._ask(self._list_tools(), "tools/list", self._config.start_timeout_s)
        return listed

    async def _list_tools(self) -> list[dict[str, Any]]:
        assert self._client is not None
        listed: list[dict[str, Any]] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await self._client.list_tools(cursor=cursor)
            for tool in page.tools:
                about = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
                listed.append({"type": "function", "function": about})
            cursor = page.next_cursor
            if not cursor:
                break
        return listed

    async def call(self, name: str, arguments: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
        assert self._client is not None
        call = self._client.call_tool(name, _encodable(arguments), meta=_encodable(meta))
        result = await self._ask(call, name, self._config.timeout_s)
        text = not_kept(text_of(result))
        if (size := len(text.encode("utf-8", "replace"))) > _MAX_OUTPUT_BYTES:
            raise ToolError(
                f"the output of {name} is too large: {size:,} bytes, at most {_MAX_OUTPUT_BYTES:,} are read"
            )
        if result.is_error:
            raise ToolError(text or f"{name} failed")
        return text

    async def _ask(self, request: Any, what: str, timeout_s: float) -> Any:
        """The answer to a request; what can go wrong on the way becomes `WorldError` or `ToolError`.

        What a tool refuses is a result with `isError`, and is the model's to read. Of JSON-RPC errors -32602 alone is:
        wrong arguments, or no such tool. The others say that the request was not carried out, for reasons that no
        argument mends: -32603 is the server's own fault as a 5xx is over HTTP, -32601 and -32600 ours or the config's.
        They are the world's, tried again and never scored. By -32000 the SDK tells that a connection is closed, and
        servers that they do not know a session any more: it is opened anew.
        """
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, INVALID_REQUEST

        assert self._owner is not None
        server, asked = f"MCP server {self._config.name!r}", asyncio.ensure_future(request)
        try:
            await asyncio.wait({asked, self._owner}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if self._owner.done():
                raise WorldError(f"{server}: the connection broke during {what}: {self._why_ended()}{self._said()}")
            raise WorldError(f"{server}: {what}: no answer within {timeout_s:g} s")
        except MCPError as e:
            message = not_kept(e.message[:_MAX_OUTPUT_BYTES])
            if e.code == INVALID_PARAMS:
                raise ToolError(message) from e
            self._is_cut |= e.code == CONNECTION_CLOSED or (e.code, e.message) == (
                INVALID_REQUEST,
                "Session terminated",
            )
            raise WorldError(f"{server}: {what}: {message}{self._said()}") from e
        except (RuntimeError, ValidationError) as e:
            # Content that does not fit the tool's own output schema, or no MCP at all.
            raise WorldError(f"{server}: {what}: {e}") from e
        finally:
            if not asked.done():
                asked.cancel()
                await asyncio.wait({asked})
                if not asked.cancelled():
                    asked.exception()

    def _why_ended(self) -> str:
        assert self._owner is not None
        if self._owner.cancelled():
            return "cancelled"
        error = self._owner.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return "closed" if error is None else str(error) or type(error).__name__

    def _said(self) -> str:
        """The end of what a stdio server wrote to its standard error."""
        if self._errors is None or self._errors.closed:
            return ""
        size = os.fstat(self._errors.fileno()).st_size
        tail = os.pread(self._errors.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")
        return f"; it said: {tail.strip()}" if tail.strip() else ""


def _launch(config: McpServerConfig) -> tuple[str, list[str]]:
    """The command and its arguments as they are started."""
    assert config.command is not None
    if shutil.which(config.command, path=config.env.get("PATH")) is None:
        raise FileNotFoundError(f"no command {config.command!r}")
    if sys.platform != "linux":
        return config.command, config.args
    return sys.executable, ["-I", "-S", "-c", _LAUNCH, str(os.getpid()), config.command, *config.args]


async def _taken(name: str, result: Any) -> None:
    pass


async def _pause_before_resuming(request: Any) -> None:
    """The SDK resumes a stream that has ended as often and as quickly as the server says: for ever, without a pause."""
    if request.method == "GET" and "last-event-id" in request.headers:
        await asyncio.sleep(_RESUME_PAUSE_S)


def _encodable(value: Mapping[str, Any]) -> Any:
    """Half of a surrogate pair, which the model may write, would end the connection."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    """One for all sessions: making it reads the certificates from disk."""
    return ssl.create_default_context()
