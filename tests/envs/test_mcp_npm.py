"""MCP servers that others publish, as they are: their state is in files, and each rollout has its own.

`make test` installs them where there is npm (tests/npm/package-lock.json pins them).
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest

from envs.remote.env import RemoteEnv
from envs.types import Episode, Message, StopReason, Task
from graders.rules.string_check import StringCheckConfig, StringCheckGrader
from tests.support import ROOT
from tests.support.mcp_play import call, opened

PROGRAMS = ROOT / "tests" / "npm" / "node_modules" / ".bin"
TASK = Task(task_id="t", messages=(Message(role="user", content="Remember it."),), item={"who": "Ann"})
EPISODE = Episode(rollout_id="r", task_id="t", messages=(), turns=(), stop_reason=StopReason.MAX_TURNS)

pytestmark = pytest.mark.skipif(
    not (PROGRAMS / "mcp-server-memory").exists(), reason="not installed: `make test` does it, where there is npm"
)


def group(program: str, **settings: Any) -> AbstractAsyncContextManager[list[RemoteEnv]]:
    """The environments of two rollouts of one task, open at once."""
    server = {"name": "own", "command": str(PROGRAMS / program), "start_timeout_s": 300, **settings}
    return opened(TASK, server, rollouts=("r-0", "r-1"))


async def reward(env: RemoteEnv, state: str) -> float:
    """What a grader that knows nothing but the final state gives."""
    config = {"type": "string_check", "name": "s", "operation": "eq", "input": state, "reference": "{{item.who}}"}
    grader = StringCheckGrader(StringCheckConfig.model_validate(config))
    grade = await grader.grade(TASK, replace(EPISODE, state=await env.final_state()))
    return grade.reward


async def test_the_memory_server_remembers_for_one_rollout_alone():
    settings = {"env": {"MEMORY_FILE_PATH": "${ROLLOUT_DIR}/memory.jsonl"}, "state_call": {"tool": "read_graph"}}
    async with group("mcp-server-memory", **settings) as (one, two):
        entity = {"name": "Ann", "entityType": "person", "observations": ["likes tea"]}
        assert (await call(one, "create_entities", entities=[entity])).error is None
        assert "likes tea" in (await call(one, "search_nodes", query="tea")).output
        assert "likes tea" not in (await call(two, "search_nodes", query="tea")).output
        name = "{{ sample.state.own.entities[0].name }}"
        assert [await reward(env, name) for env in (one, two)] == [1.0, 0.0]


async def test_the_filesystem_server_writes_for_one_rollout_alone():
    state = {"tool": "read_text_file", "arguments": {"path": "${ROLLOUT_DIR}/who.txt"}}
    settings = {"args": ["${ROLLOUT_DIR}"], "cwd": "${ROLLOUT_DIR}", "state_call": state}
    async with group("mcp-server-filesystem", **settings) as (one, two):
        assert (await call(one, "write_file", path="who.txt", content="Ann")).error is None
        assert (await call(one, "read_text_file", path="who.txt")).output == "Ann"
        assert (await call(two, "read_text_file", path="who.txt")).output.startswith("Error: ENOENT")
        assert (await call(two, "write_file", path="../who.txt", content="x")).output.startswith("Error: Access denied")
        assert [await reward(env, "{{ sample.state.own }}") for env in (one, two)] == [1.0, 0.0]
