"""MCP servers as tools, over stdio or streamable HTTP, by the official SDK.

    server = McpServer(config)
    server.definitions()                    Chat Completions definitions; before any model is loaded
    session = server.session(rollout_id, item)    one per rollout
    await session.open(); await session.call(name, arguments); await session.close()
    await server.aclose()                   at the end of the run

The server learns the rollout as `trace_id`, and the row as `item`, in every call's `_meta`; with `per_rollout` the
rollout also in the environment variable TRACE_ID (stdio) or the header X-Trace-Id (HTTP).

The SDK is imported where it is used: loading a config must stay quick.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from envs.errors import ToolError, UserError, WorldError
from envs.limits.clocks import place_in
from envs.reading.variables import fill
from envs.remote.mcp_config import ROLLOUT_DIR, TRACE_ID, McpServerConfig
from envs.remote.mcp_connection import Connection


class McpServer:
    """One server: what it offers, and its sessions.

    Covered: sessions left open are closed by `aclose`; a stdio server ends with its session, when the session's task is
    cancelled and, on Linux, when this process is killed. Not covered: what a server has forked itself and put into a
    session of its own; elsewhere than on Linux, a server that ignores the end of its input when this process is killed.
    """

    def __init__(self, config: McpServerConfig) -> None:
        """Raises `UserError` for an environment variable that is not set."""
        config.resolved({TRACE_ID: "", ROLLOUT_DIR: ""})
        self.config = config
        self._bound: dict[str, set[str]] = {}
        self._definitions: list[dict[str, Any]] | None = None
        self._open: set[Connection] = set()
        self._shared: Connection | None = None
        self._lock = asyncio.Lock()
        # Processes started all at once would slow each other down past `start_timeout_s`.
        self._starts = asyncio.Semaphore(max(4, os.cpu_count() or 4))

    def definitions(self) -> list[dict[str, Any]]:
        """The offered tools, as Chat Completions definitions, in the server's order; asked for once.

        Under the names that the model calls them by, and without the arguments that are bound. Raises `UserError` where
        the server can't be reached, offers nothing, or lacks a tool or an argument that the config names.
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
        calls = {"open_call": self.config.open_call, "state_call": self.config.state_call}
        asked = [("tools", tool) for tool in wanted or ()] + [(key, call.tool) for key, call in calls.items() if call]
        for key, tool in asked:
            if tool not in names:
                raise UserError(f"MCP server {name!r}: {key}: no tool named {tool!r}; it has {', '.join(names)}")
        for definition in listed:
            self._bind(definition["function"])
        for argument in self.config.bind:
            if not any(argument in bound for bound in self._bound.values()):
                raise UserError(f"MCP server {name!r}: bind: no tool of it has an argument named {argument!r}")
        offered = [d for d in listed if wanted is None or d["function"]["name"] in wanted]
        for definition in offered:
            definition["function"]["name"] = self.config.prefix + definition["function"]["name"]
        return offered

    def _bind(self, about: dict[str, Any]) -> None:
        """Takes what the config gives out of a tool's schema."""
        parameters = dict(about["parameters"])
        properties = known if isinstance(known := parameters.get("properties"), dict) else {}
        bound = set(self.config.bind).intersection(properties)
        self._bound[about["name"]] = bound
        if bound:
            parameters["properties"] = {key: value for key, value in properties.items() if key not in bound}
            if isinstance(required := parameters.get("required"), list):
                parameters["required"] = [key for key in required if key not in bound]
            about["parameters"] = parameters

    def bound(self, tool: str) -> dict[str, Any]:
        """The arguments that the config gives to a tool, by the server's own name; known once it has been listed."""
        return {key: value for key, value in self.config.bind.items() if key in self._bound.get(tool, ())}

    def session(self, rollout_id: str, item: Mapping[str, Any] | None = None) -> McpSession:
        """What one rollout of a row holds of this server; not yet open."""
        return McpSession(self, rollout_id, item or {})

    async def connect(self, rollout_id: str) -> Connection:
        """A connection for this rollout alone. Raises `WorldError`."""
        async with place_in(self._starts):
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

    def __init__(self, server: McpServer, rollout_id: str, item: Mapping[str, Any]) -> None:
        self._server = server
        self._rollout_id = rollout_id
        self._item = item
        self._own: Connection | None = None

    async def open(self) -> None:
        """Raises `WorldError` when the server can't be had, or refuses its `open_call`."""
        config = self._server.config
        if config.per_rollout:
            self._own = await self._server.connect(self._rollout_id)
        else:
            await self._server.shared()
        if (call := config.open_call) is None:
            return
        try:
            await self._call(call.tool, self._filled(call.arguments, "open_call.arguments"))
        except ToolError as e:
            raise WorldError(f"MCP server {config.name!r}: open_call: {call.tool}: {e}") from None

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What the tool answers, as text for the model, who calls it by its prefixed name.

        Raises `ToolError` with what the model should see, and `WorldError` where the server failed: it did not
        answer in time, or the connection broke. A call that broke the shared connection is repeated once on a new one;
        a session that belongs to a rollout has lost its state with the connection, so nothing is repeated there.
        """
        name = name.removeprefix(self._server.config.prefix)
        return await self._call(name, {**arguments, **self._filled(self._server.bound(name), "bind")})

    async def state(self) -> Any:
        """What `state_call` answers: the value where it is JSON, else the text. Raises `WorldError`.

        What the server refuses is a state too, as `{"error": text}`: what the model was to write is not there.
        """
        call = self._server.config.state_call
        assert call is not None, "the server has no state_call"
        try:
            text = await self._call(call.tool, self._filled(call.arguments, "state_call.arguments"))
        except ToolError as e:
            return {"error": str(e)}
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    async def close(self) -> None:
        """Safe to call whether or not `open` succeeded, and again."""
        own, self._own = self._own, None
        if own is not None:
            await self._server.disconnect(own)

    def _filled(self, arguments: dict[str, Any], key: str) -> dict[str, Any]:
        own = {TRACE_ID: self._rollout_id, ROLLOUT_DIR: self._own.folder if self._own else ""}
        where = f"MCP server {self._server.config.name!r}: {key}"
        filled: dict[str, Any] = fill(arguments, where, item=self._item, own=own)
        return filled

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        meta = {"trace_id": self._rollout_id, "item": self._item}
        if self._server.config.per_rollout:
            assert self._own is not None, "the session is not open"
            return await self._own.call(name, arguments, meta)
        connection = await self._server.shared()
        try:
            return await connection.call(name, arguments, meta)
        except WorldError:
            if not connection.is_broken:
                raise
        return await (await self._server.shared()).call(name, arguments, meta)
