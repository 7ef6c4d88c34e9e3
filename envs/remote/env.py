"""The environment of one rollout whose tools live in other processes."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from envs.clients.http import HttpCaller
from envs.errors import WorldError
from envs.remote.hooks import Hooks
from envs.remote.mcp_server import McpServer, McpSession
from envs.remote.tools import call_remote, remote_tool
from envs.tools import Tool
from envs.types import Episode, Task, ToolCall


class RemoteEnv:
    """Implements `envs.base.Env`. The tools are the same before and after `open`; they can be called only after it."""

    def __init__(
        self,
        *,
        callers: Mapping[str, HttpCaller],
        mcp: Mapping[McpServer, Mapping[str, Tool]],
        hooks: Hooks,
    ) -> None:
        """`callers` by tool; the tools of each MCP server by name, whose functions are replaced here."""
        self._callers = callers
        self._hooks = hooks
        self._servers = tuple(mcp)
        self._sessions: list[tuple[McpServer, McpSession]] = []
        self._task: Task | None = None
        self._rollout_id = ""
        self._tools = {name: remote_tool(name, self._call) for name in callers}
        for server, tools in mcp.items():
            for name, tool in tools.items():
                self._tools[name] = replace(tool, function=functools.partial(self._call_mcp, server))

    @property
    def tools(self) -> Mapping[str, Tool]:
        return self._tools

    async def open(self, task: Task, rollout_id: str) -> None:
        assert self._task is None, f"environment of {self._rollout_id} opened again for {rollout_id}"
        # Before anything is sent: what fails half-way is closed too.
        self._task, self._rollout_id = task, rollout_id
        await self._hooks.opened(rollout_id, task.item)
        for server in self._servers:
            session = server.session(rollout_id, task.item)
            self._sessions.append((server, session))
            await session.open()

    async def close(self, episode: Episode | None) -> None:
        if self._task is None:
            return
        try:
            for _, session in reversed(self._sessions):
                with contextlib.suppress(WorldError):
                    await session.close()
        finally:
            await self._hooks.closed(self._rollout_id, self._task.item, episode)

    async def final_state(self) -> Mapping[str, Any]:
        """What the MCP servers' `state_call`s answer, by the servers' names."""
        asked = [(server.config.name, session) for server, session in self._sessions if server.config.state_call]
        return {name: await session.state() for name, session in asked}

    async def _call(self, call: ToolCall) -> str:
        assert self._task is not None, "a tool was called before its environment was opened"
        return await call_remote(self._callers[call.name], call, trace_id=self._rollout_id, item=self._task.item)

    async def _call_mcp(self, server: McpServer, call: ToolCall) -> str:
        session = next(session for owner, session in self._sessions if owner is server)
        return await session.call(call.name, json.loads(call.arguments))
