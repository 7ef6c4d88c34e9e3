"""Rollouts over MCP servers, opened and played by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from envs.remote.config import RemoteConfig
from envs.remote.env import RemoteEnv
from envs.remote.world import RemoteWorld
from envs.tools import call_tool, offered_tools
from envs.types import Task, ToolCall, ToolResult


def world_with(*servers: dict[str, Any]) -> RemoteWorld:
    return RemoteWorld(RemoteConfig.model_validate({"type": "remote", "mcp": list(servers)}))


@asynccontextmanager
async def opened(
    task: Task, *servers: dict[str, Any], rollouts: tuple[str, ...] = ("r",)
) -> AsyncIterator[list[RemoteEnv]]:
    """The environments of rollouts of one task, open at once."""
    world = world_with(*servers)
    envs = [world.make_env() for _ in rollouts]
    try:
        for env, rollout_id in zip(envs, rollouts, strict=True):
            await env.open(task, rollout_id)
        yield envs
    finally:
        for env in envs:
            await env.close(None)
        await world.aclose()


async def call(env: RemoteEnv, name: str, **arguments: Any) -> ToolResult:
    tools = offered_tools(Task(task_id="t", messages=()), env.tools)
    return await call_tool(tools, ToolCall(call_id="c", name=name, arguments=json.dumps(arguments)), timeout_s=60)
