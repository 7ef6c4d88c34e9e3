"""The remote world: connections, limits and MCP servers that all rollouts of a run share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from yarl import URL

from envs.base import ExpertTurn
from envs.clients.http import HttpCaller, HttpLimits, HttpServer, resolve_headers
from envs.clients.urls import server_url
from envs.errors import UserError, told_of
from envs.remote.config import RemoteConfig
from envs.remote.env import RemoteEnv
from envs.remote.hooks import Hooks
from envs.remote.mcp_server import McpServer
from envs.tools import Tool, schema_tool
from envs.types import Task, ToolCall

_HOOK_BREAKER_WAIT_S = 15.0
"""Shorter than a call's: a hook holds up a rollout that is over."""


class RemoteWorld:
    """Implements `envs.base.World`. Tools of one URL share connections and circuit breaker, and keep their own limits.

    Raises `UserError` for tools of one name, for a header's environment variable that is not set, and for an MCP server
    that does not answer. `limits` are those that the config leaves open.
    """

    def __init__(self, config: RemoteConfig, *, limits: HttpLimits | None = None) -> None:
        self._limits = limits or HttpLimits()
        self._servers: dict[str, HttpServer] = {}
        self._all_callers: list[tuple[str, HttpCaller]] = []
        self._callers = {
            tool.name: self._caller(
                server_url(tool.server_url, f"world.tools.{i}.server_url"),
                tool.headers,
                f"world.tools.{i}.headers",
                replace(
                    self._limits,
                    timeout_s=tool.timeout_s,
                    rate_limit=tool.rate_limit,
                    max_concurrency=tool.max_concurrency,
                ),
            )
            for i, tool in enumerate(config.tools)
        }
        self._hooks = self._make_hooks(config)
        self._mcp: dict[McpServer, dict[str, Tool]] = {}
        for i, server_config in enumerate(config.mcp):
            with told_of(f"world.mcp.{i}" + (f", {server_config.url}" if server_config.url else "")):
                server = McpServer(server_config)
                self._mcp[server] = {
                    definition["function"]["name"]: schema_tool(definition, _unbound, is_remote=True, is_strict=False)
                    for definition in server.definitions()
                }
        names = Counter([*self._callers, *(name for tools in self._mcp.values() for name in tools)])
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(
                f"world: {twice[0]!r} is offered by two servers; leave it out of one of them by name, or give an MCP "
                "server's tools a prefix"
            )

    def make_env(self) -> RemoteEnv:
        return RemoteEnv(callers=self._callers, mcp=self._mcp, hooks=self._hooks)

    def tasks(self, split: str) -> Sequence[Task]:
        raise UserError(
            "data: expected a data section with train and eval: the remote world, which is also what stands where "
            "`world` is left out, brings no tasks of its own (the demo's is named: world: {type: finance})"
        )

    def check(self, task: Task) -> None:
        """Raise `UserError` for a row without what the MCP servers' own calls are to be given of it."""
        for server in self._mcp:
            server.config.check_row(task.item)

    def expert_episode(self, task: Task, seed: int) -> Sequence[ExpertTurn]:
        return ()

    async def sweep(self, rollout_ids: Sequence[str]) -> None:
        """Close what rollouts of a killed run left open at the server; a failure is counted, not raised."""
        await self._hooks.sweep(rollout_ids)

    def take_metrics(self) -> dict[str, float]:
        """`http/<host>/<count>`, over all callers of the host, and `http/close_failures`, since the last call."""
        taken = {f"http/{name}": value for name, value in self._hooks.take_metrics().items()}
        for host, caller in self._all_callers:
            for name, value in caller.take_metrics().items():
                key = f"http/{host}/{name}"
                taken[key] = taken.get(key, 0.0) + value
        return taken

    async def aclose(self) -> None:
        for http_server in self._servers.values():
            await http_server.aclose()
        for mcp_server in self._mcp:
            await mcp_server.aclose()

    def _make_hooks(self, config: RemoteConfig) -> Hooks:
        limits = replace(
            self._limits,
            timeout_s=config.hook_timeout_s,
            breaker_wait_s=min(self._limits.breaker_wait_s, _HOOK_BREAKER_WAIT_S),
        )

        def caller(key: str, text: str | None) -> HttpCaller | None:
            if text is None:
                return None
            return self._caller(server_url(text, key), config.hook_headers, "world.hook_headers", limits)

        on_open, on_close = caller("world.open_url", config.open_url), caller("world.close_url", config.close_url)
        return Hooks(on_open=on_open, on_close=on_close)

    def _caller(self, url: str, headers: Mapping[str, str], where: str, limits: HttpLimits) -> HttpCaller:
        server = self._servers.setdefault(url, HttpServer(self._limits))
        made = HttpCaller(url=url, headers=resolve_headers(headers, where), limits=limits, server=server)
        self._all_callers.append((_metric_name(url), made))
        return made


def _metric_name(url: str) -> str:
    """Host and port in the characters that metric names may have."""
    parts = URL(url)
    name = f"{parts.host}_{parts.port}" if parts.explicit_port else str(parts.host)
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


async def _unbound(call: ToolCall) -> str:
    raise AssertionError(f"{call.name} was called before its environment was opened")
