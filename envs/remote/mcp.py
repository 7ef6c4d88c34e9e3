"""MCP servers as tools, over stdio or streamable HTTP, by the official SDK.

    server = McpServer(config)
    server.definitions()                    Chat Completions definitions; before any model is loaded
    session = server.session(rollout_id)    one per rollout
    await session.open(); await session.call(name, arguments); await session.close()
    await server.aclose()                   at the end of the run

The server learns the rollout as `trace_id` in every call's `_meta`; with `per_rollout` also in the environment variable
TRACE_ID (stdio) or the header X-Trace-Id (HTTP).

The SDK is imported where it is used: loading a config must stay quick.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.errors import UserError, WorldError
from envs.remote.mcp_connection import Connection


class McpServerConfig(BaseModel):
    """One MCP server: started by `command`, or reached at `url`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="In messages and metrics.")
    command: str | None = Field(default=None, min_length=1, description="Started as a process that speaks over stdio.")
    args: list[str] = []
    env: dict[str, str] = Field(
        default={}, description="Added to HOME, LOGNAME, PATH, SHELL, TERM and USER; the server inherits nothing else."
    )
    url: str | None = Field(default=None, pattern=r"^https?://", description="A streamable HTTP server.")
    headers: dict[str, str] = {}
    tools: list[str] | None = Field(default=None, min_length=1, description="Offered by name; null: all.")
    per_rollout: bool = Field(
        default=True, description="A session, and with stdio a process, for each rollout; false: one for all."
    )
    timeout_s: float = Field(default=600.0, gt=0, description="Of one call.")
    start_timeout_s: float = Field(default=60.0, gt=0, description="From the start of the server to its first answer.")

    @model_validator(mode="after")
    def _is_reached_in_one_way(self) -> McpServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("expected either command (stdio) or url (streamable HTTP)")
        if self.command is None and (self.args or self.env):
            raise ValueError("args and env go with command, not with url")
        if self.url is None and self.headers:
            raise ValueError("headers go with url, not with command")
        return self


class McpServer:
    """One server: what it offers, and its sessions.

    Covered: sessions left open are closed by `aclose`; a stdio server ends with its session, when the session's task is
    cancelled and, on Linux, when this process is killed. Not covered: what a server has forked itself and put into a
    session of its own; elsewhere than on Linux, a server that ignores the end of its input when this process is killed.
    """

    def __init__(self, config: McpServerConfig) -> None:
        self.config = config
        self._definitions: list[dict[str, Any]] | None = None
        self._open: set[Connection] = set()
        self._shared: Connection | None = None
        self._lock = asyncio.Lock()
        # Processes started all at once would slow each other down past `start_timeout_s`.
        self._starts = asyncio.Semaphore(max(4, os.cpu_count() or 4))

    def definitions(self) -> list[dict[str, Any]]:
        """The offered tools, as Chat Completions definitions, in the server's order; asked for once.

        Raises `UserError` where the server can't be reached, offers nothing, or lacks a tool that the config names.
        """
        if self._definitions is None:
            # In a thread of its own: an event loop may be running in this one.
            with ThreadPoolExecutor(1) as thread:
                self._definitions = thread.submit(asyncio.run, self._list()).result()
        return self._definitions

    async def _list(self) -> list[dict[str, Any]]:
        name, wanted = self.config.name, self.config.tools
        connection = Connection(self.config, rollout_id="")
        try:
            await connection.open()
            listed = await connection.list_tools()
        except WorldError as e:
            raise UserError(str(e)) from e
        finally:
            await connection.close()
        if not listed:
            raise UserError(f"MCP server {name!r}: expected tools, it lists none")
        names = [definition["function"]["name"] for definition in listed]
        if unknown := [tool for tool in wanted or () if tool not in names]:
            raise UserError(f"MCP server {name!r}: tools: no tool named {unknown[0]!r}; it has {', '.join(names)}")
        return [d for d in listed if wanted is None or d["function"]["name"] in wanted]

    def session(self, rollout_id: str) -> McpSession:
        """What one rollout holds of this server; not yet open."""
        return McpSession(self, rollout_id)

    async def connect(self, rollout_id: str) -> Connection:
        """A connection for this rollout alone. Raises `WorldError`."""
        async with self._starts:
            connection = Connection(self.config, rollout_id=rollout_id)
            self._open.add(connection)
            try:
                await connection.open()
            except BaseException:
                await self.disconnect(connection)
                raise
        return connection

    async def disconnect(self, connection: Connection) -> None:
        await connection.close()
        self._open.discard(connection)

    async def shared(self) -> Connection:
        """The connection of all rollouts, opened anew where it is broken. Raises `WorldError`."""
        async with self._lock:
            if self._shared is not None and self._shared.is_broken:
                broken, self._shared = self._shared, None
                await self.disconnect(broken)
            if self._shared is None:
                self._shared = await self.connect("")
            return self._shared

    async def aclose(self) -> None:
        """Close every session that is still open."""
        await asyncio.gather(*(self.disconnect(connection) for connection in list(self._open)))
        self._shared = None


class McpSession:
    """A rollout's session with one server; with `per_rollout` false, its share in the one that all use."""

    def __init__(self, server: McpServer, rollout_id: str) -> None:
        self._server = server
        self._rollout_id = rollout_id
        self._own: Connection | None = None

    async def open(self) -> None:
        """Raises `WorldError` when the server can't be had."""
        if self._server.config.per_rollout:
            self._own = await self._server.connect(self._rollout_id)
        else:
            await self._server.shared()

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What the tool answers, as text for the model.

        Raises `ToolError` with what the model should see, and `WorldError` where the server failed: it did not
        answer in time, or the connection broke. A call that broke the shared connection is repeated once on a new one;
        a session that belongs to a rollout has lost its state with the connection, so nothing is repeated there.
        """
        if self._server.config.per_rollout:
            assert self._own is not None, "the session is not open"
            return await self._own.call(name, arguments, self._rollout_id)
        connection = await self._server.shared()
        try:
            return await connection.call(name, arguments, self._rollout_id)
        except WorldError:
            if not connection.is_broken:
                raise
        return await (await self._server.shared()).call(name, arguments, self._rollout_id)

    async def close(self) -> None:
        """Safe to call whether or not `open` succeeded, and again."""
        own, self._own = self._own, None
        if own is not None:
            await self._server.disconnect(own)
