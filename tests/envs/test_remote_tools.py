"""Remote tools by the hosted protocol: what goes over the wire, what the model is shown, hooks and sessions."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from envs.clients.http import HttpLimits
from envs.errors import UserError, WorldError
from envs.remote.config import RemoteConfig
from envs.remote.env import RemoteEnv
from envs.remote.world import RemoteWorld
from envs.tools import call_tool, offered_tools
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.hosted.view import item_of
from tests.support.faulty_server import Call, FaultyServer
from trainer.config import RunConfig
from trainer.tasks.load import load_tasks

LIMITS = HttpLimits(backoff_s=0.005, breaker_probe_s=0.02, breaker_wait_s=0.5)
STOCK = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "Pieces in store.",
        "parameters": {
            "type": "object",
            "properties": {"sku": {"type": "string"}},
            "required": ["sku"],
            "additionalProperties": False,
        },
    },
}
TASK = Task(
    task_id="t",
    messages=(Message(role="user", content="How many?"),),
    tools=("stock",),
    definitions={"stock": STOCK},
    item={"answer": 3, "shop": {"id": "ü"}},
)
EPISODE = Episode(
    rollout_id="r1",
    task_id="t",
    messages=(*TASK.messages, Message(role="assistant", content="3")),
    turns=(Turn(message=Message(role="assistant", content="3")),),
    stop_reason=StopReason.ANSWERED,
)


@asynccontextmanager
async def world_of(config: dict[str, Any], limits: HttpLimits = LIMITS) -> AsyncIterator[RemoteWorld]:
    world = RemoteWorld(RemoteConfig.model_validate({"type": "remote", **config}), limits=limits)
    try:
        yield world
    finally:
        await world.aclose()


def one_tool(server: FaultyServer, **settings: Any) -> dict[str, Any]:
    return {"tools": [{"name": "stock", "server_url": server.url, **settings}]}


async def opened(world: RemoteWorld, task: Task = TASK, rollout_id: str = "r1") -> RemoteEnv:
    env = world.make_env()
    await env.open(task, rollout_id)
    return env


async def call(env: RemoteEnv, name: str = "stock", arguments: str = '{"sku": "a"}', call_id: str = "c1") -> ToolResult:
    tools = offered_tools(TASK, env.tools) if name == "stock" else env.tools
    return await call_tool(tools, ToolCall(call_id=call_id, name=name, arguments=arguments), timeout_s=5)


async def test_a_call_is_posted_as_the_hosted_service_does():
    arguments = '{ "sku":\t"a" }'
    async with FaultyServer() as server, world_of(one_tool(server, headers={"X-Shop": "7"})) as world:
        result = await call(await opened(world), arguments=arguments, call_id="call_1")
    (sent,) = server.payloads
    assert sent.pop("id").startswith("fc_")
    assert sent == {
        "type": "function_call",
        "call_id": "call_1",
        "name": "stock",
        "arguments": arguments,
        "trace_id": "r1",
        "item": {"answer": 3, "shop": {"id": "ü"}},
    }
    assert server.headers[0]["X-Shop"] == "7"
    assert (result.output, result.error, result.call_id) == ("fine", None, "call_1")


async def test_a_repeated_call_keeps_its_id_and_another_has_its_own():
    async with FaultyServer(["cut", "answer", "answer", "answer"]) as server, world_of(one_tool(server)) as world:
        env = await opened(world)
        await call(env, call_id="c1")
        await call(env, call_id="c2")
        await call(await opened(world, rollout_id="r2"), call_id="c1")
    ids = [sent["id"] for sent in server.payloads]
    assert ids[0] == ids[1] and len(set(ids[1:])) == 3


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"type": "function_call_output", "call_id": "c1", "id": "fc_1", "output": "12 pieces"}, "12 pieces"),
        ({"output": {"n": 1, "unit": "€"}}, '{"n": 1, "unit": "€"}'),
        ({"output": [1]}, "[1]"),
        ({"output": None}, "null"),
        ({"output": ""}, ""),
        ({"output": "half \ud800 pair"}, "half ? pair"),
    ],
)
async def test_the_model_reads_the_output(answer, shown):
    async with FaultyServer(lambda c: c.answer(answer)) as server, world_of(one_tool(server)) as world:
        result = await call(await opened(world))
    assert (result.output, result.error) == (shown, None)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_a_4xx_is_shown_to_the_model(status):
    answers = [{"output": "no such sku"}, {"detail": "sku: unknown"}]
    async with (
        FaultyServer(lambda c: c.answer(answers[c.number], status)) as server,
        world_of(one_tool(server)) as world,
    ):
        env = await opened(world)
        with_output, without = await call(env), await call(env, call_id="c2")
    assert (with_output.output, with_output.error) == ("no such sku", None)
    assert without.output == f'Error: stock: HTTP {status}: {{"detail": "sku: unknown"}}'
    assert without.error is ToolErrorKind.REFUSED
    assert len(server.payloads) == 2


@pytest.mark.parametrize("body", ["", "null", "[]", '"fine"', "{}", '{"result": 1}', "<html>", "[" * 100_000])
async def test_an_answer_without_output_is_the_servers_fault_and_is_retried(body):
    async def behave(c: Call) -> web.StreamResponse:
        return await c.answer() if c.number == 3 else web.Response(text=body)

    async with FaultyServer(behave) as server, world_of(one_tool(server)) as world:
        env = await opened(world)
        assert (await call(env)).output == "fine"
        server.behave = lambda c: web_response(body)
        with pytest.raises(WorldError, match="failed after 4 attempts"):
            await call(env, call_id="c2")
    assert len(server.payloads) == 8


async def web_response(text: str) -> web.StreamResponse:
    return web.Response(text=text)


async def test_too_large_a_request_or_answer_is_shown_as_an_error():
    async with FaultyServer(lambda c: c.huge()) as server, world_of(one_tool(server)) as world:
        env = await opened(world)
        answer = await call(env)
        request = await call(env, arguments=json.dumps({"sku": "x" * 1_000_000}))
    assert answer.error is ToolErrorKind.REFUSED and "the answer is too large" in answer.output
    assert request.error is ToolErrorKind.REFUSED and "at most 1,000,000 are sent" in request.output
    assert len(server.payloads) == 1


async def test_arguments_that_do_not_fit_the_rows_schema_never_reach_the_server():
    async with FaultyServer() as server, world_of(one_tool(server)) as world:
        env = await opened(world)
        for arguments in ("{}", '{"sku": 1}', '{"sku": "a", "more": 1}', "[]", "{"):
            assert (await call(env, arguments=arguments)).error is ToolErrorKind.BAD_ARGUMENTS
    assert not server.payloads


async def test_calls_of_one_turn_run_at_the_same_time():
    async def behave(c: Call) -> web.StreamResponse:
        # Nobody is answered before all four are there.
        await c.server.received(4)
        return await c.answer({"output": c.payload["call_id"]})

    async with FaultyServer(behave) as server, world_of(one_tool(server)) as world:
        env = await opened(world)
        results = await asyncio.gather(*(call(env, call_id=f"c{i}") for i in range(4)))
    assert [r.output for r in results] == ["c0", "c1", "c2", "c3"]


async def test_tools_of_one_url_keep_their_own_limits_and_headers():
    async def behave(c: Call) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return await c.answer()

    async with FaultyServer(behave) as server:
        tools = [
            {"name": "a", "server_url": server.url, "max_concurrency": 1, "headers": {"X-Tool": "a"}},
            {"name": "b", "server_url": server.url, "rate_limit": 20, "headers": {"X-Tool": "b"}},
        ]
        async with world_of({"tools": tools}) as world:
            env = await opened(world)
            await asyncio.gather(*(call(env, "a", "{}", f"a{i}") for i in range(5)))
            assert server.most_in_flight == 1
            loop = asyncio.get_running_loop()
            start = loop.time()
            await asyncio.gather(*(call(env, "b", "{}", f"b{i}") for i in range(5)))
            assert loop.time() - start >= 4 / 20
            metrics = world.take_metrics()
    assert [headers["X-Tool"] for headers in server.headers] == ["a"] * 5 + ["b"] * 5
    assert metrics[f"http/127.0.0.1_{server.port}/requests"] == 10
    assert not any(world.take_metrics().values())


async def test_each_rollout_has_its_own_trace_id_and_item():
    async with FaultyServer() as server, world_of(one_tool(server)) as world:
        envs = [await opened(world, rollout_id=f"r{i}") for i in range(3)]
        await asyncio.gather(*(call(env) for env in envs))
    assert sorted(sent["trace_id"] for sent in server.payloads) == ["r0", "r1", "r2"]


def hooked(server: FaultyServer) -> dict[str, Any]:
    hooks = {"open_url": server.url, "close_url": server.url, "hook_headers": {"X-Hook": "h"}}
    return {**one_tool(server), **hooks}


async def test_the_item_that_a_server_and_its_hooks_are_sent_is_the_whole_row(tmp_path):
    row = {
        "messages": [{"role": "user", "content": "How many?", "name": None}],
        "tools": [STOCK],
        "parallel_tool_calls": False,
        "answer": 3,
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    data = {"data": {"train": rows, "eval": rows}, "output_dir": tmp_path, "grader": {"type": "numeric"}}
    async with FaultyServer() as server, world_of(hooked(server)) as world:
        (task,) = load_tasks(RunConfig.model_validate(data), world, "train")
        env = await opened(world, task)
        await call(env)
        await env.close(EPISODE)
    assert [sent["item"] for sent in server.payloads] == [row] * 3
    assert item_of(task) == row


async def test_hooks_tell_the_server_of_each_rollout():
    async with FaultyServer() as server, world_of(hooked(server)) as world:
        env = await opened(world)
        await call(env)
        await env.close(EPISODE)
    first, _, last = server.payloads
    assert first == {"type": "rollout.open", "trace_id": "r1", "item": TASK.item}
    sample = {
        "stop_reason": "answered",
        "output_text": "3",
        "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}],
    }
    assert last == {"type": "rollout.close", "trace_id": "r1", "item": TASK.item, "sample": sample}
    assert [headers.get("X-Hook") for headers in server.headers] == ["h", None, "h"]


async def test_a_cancelled_rollout_is_closed_without_a_sample():
    async with FaultyServer() as server, world_of(hooked(server)) as world:
        env = await opened(world)
        await env.close(None)
        unopened = world.make_env()
        await unopened.close(None)
    assert [sent["type"] for sent in server.payloads] == ["rollout.open", "rollout.close"]
    assert server.payloads[1]["sample"] is None


@pytest.mark.parametrize("fault", ["error", "garbage_status"])
async def test_an_open_that_fails_masks_the_rollout_and_is_closed_all_the_same(fault):
    async def behave(c: Call) -> web.StreamResponse:
        if c.payload["type"] == "rollout.open":
            return await c.error(503 if fault == "error" else 409)
        return await c.answer()

    async with FaultyServer(behave) as server, world_of(hooked(server)) as world:
        env = world.make_env()
        with pytest.raises(WorldError, match=r"HTTP (503|409): out of order"):
            await env.open(TASK, "r1")
        await env.close(None)
    assert server.payloads[-1]["type"] == "rollout.close"


@pytest.mark.parametrize("fault", ["error", "hang", "drop", "gone", "refused"])
async def test_a_close_that_fails_is_counted_and_never_raised(fault):
    async def behave(c: Call) -> web.StreamResponse:
        if c.payload["type"] == "rollout.open":
            return await c.answer()
        return await (c.error(404) if fault == "refused" else getattr(c, fault)())

    async with FaultyServer(behave) as server, world_of({**hooked(server), "hook_timeout_s": 0.2}) as world:
        env = await opened(world)
        if fault == "gone":
            await server.stop()
        await env.close(EPISODE)
        assert world.take_metrics()["http/close_failures"] == 1
    assert len(server.payloads) == {"gone": 1, "refused": 2}.get(fault, 5)


async def test_a_close_whose_episode_is_too_large_leaves_the_messages_out():
    long = Message(role="tool", content="x" * 1_000_000)
    episode = Episode(rollout_id="r1", task_id="t", messages=(long,), turns=(), stop_reason=StopReason.MAX_TURNS)
    async with FaultyServer() as server, world_of(hooked(server)) as world:
        env = await opened(world)
        await env.close(episode)
        assert world.take_metrics()["http/close_failures"] == 0
    assert server.payloads[-1]["sample"] == {"stop_reason": "max_turns", "output_text": "", "messages": None}


async def test_a_sweep_closes_what_a_killed_run_left_open():
    async with (
        FaultyServer(lambda c: c.error(404) if c.number == 1 else c.answer()) as server,
        world_of(hooked(server)) as world,
    ):
        await world.sweep(["r1", "r2-retry1", "r3"])
        assert world.take_metrics()["http/close_failures"] == 1
    assert sorted(sent["trace_id"] for sent in server.payloads) == ["r1", "r2-retry1", "r3"]
    assert all(sent["type"] == "rollout.close" and sent["sample"] is None for sent in server.payloads)


async def test_without_hooks_nothing_is_sent():
    async with FaultyServer() as server, world_of(one_tool(server)) as world:
        await (await opened(world)).close(EPISODE)
        await world.sweep(["r1"])
    assert not server.payloads


def test_the_world_brings_no_tasks():
    world = RemoteWorld(
        RemoteConfig.model_validate({"type": "remote", "tools": [{"name": "a", "server_url": "http://x"}]})
    )
    with pytest.raises(UserError, match="data: expected a data section"):
        world.tasks("train")
    assert world.expert_episode(TASK, 0) == ()
    assert not world.make_env().tools["a"].parameters


TOOL = {"name": "a", "server_url": "http://localhost:1/x"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tools": [TOOL, TOOL]}, "two tools are named 'a'"),
        ({"tools": [TOOL | {"server_url": "ftp://x"}]}, "tools.0.server_url"),
        ({"tools": [TOOL | {"timeout_s": 0}]}, "tools.0.timeout_s"),
        ({"tools": [TOOL | {"url": "http://x"}]}, "tools.0.url"),
        ({"tools": [TOOL], "open_url": "x"}, "open_url"),
    ],
)
def test_a_config_that_cant_be_meant_is_refused(config, expected):
    with pytest.raises(ValidationError) as e:
        RemoteConfig.model_validate({"type": "remote", **config})
    assert expected in str(e.value)


def test_a_header_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("SHOP_KEY", raising=False)
    tool = TOOL | {"headers": {"Authorization": "Bearer ${SHOP_KEY}"}}
    with pytest.raises(UserError, match=r"world\.tools\.0\.headers: the environment variable SHOP_KEY is not set"):
        RemoteWorld(RemoteConfig.model_validate({"type": "remote", "tools": [tool]}))


MCP_SERVER = '''
from mcp.server import MCPServer

server = MCPServer("notes")
notes = []


@server.tool()
def note(text: str) -> str:
    """Keep a note."""
    notes.append(text)
    return " | ".join(notes)


server.run()
'''


@pytest.fixture
def mcp_server(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The settings of a small MCP server that keeps notes, over stdio."""
    script = tmp_path / "notes.py"
    script.write_text(MCP_SERVER)
    return lambda **settings: {"name": "notes", "command": sys.executable, "args": [str(script)], **settings}


async def test_tools_of_mcp_servers_are_offered_beside_those_over_http(mcp_server):
    async with (
        FaultyServer() as server,
        world_of({**one_tool(server), "mcp": [mcp_server(per_rollout=True)]}) as world,
    ):
        env, other = await opened(world), await opened(world, rollout_id="r2")
        assert list(env.tools) == ["stock", "note"]
        assert env.tools["note"].schema()["function"]["description"] == "Keep a note."
        assert (await call(env)).output == "fine"
        assert (await call(env, "note", '{"text": "one"}')).output == "one"
        assert (await call(env, "note", '{"text": "two"}')).output == "one | two"
        assert (await call(other, "note", '{"text": "three"}')).output == "three"
        assert (await call(env, "note", '{"text": 1}')).error is ToolErrorKind.BAD_ARGUMENTS
        await env.close(EPISODE)
        await other.close(None)


async def test_a_name_that_two_servers_offer_is_refused(mcp_server):
    config = {"type": "remote", "tools": [TOOL | {"name": "note"}], "mcp": [mcp_server()]}
    with pytest.raises(UserError, match="'note' is offered by two servers"):
        RemoteWorld(RemoteConfig.model_validate(config))


@pytest.mark.parametrize("answered", ["c2", "C1", 7, ["c1"]])
async def test_an_answer_to_another_call_answers_none(answered):
    wrong = {"output": "another's", "call_id": answered}
    async with FaultyServer(lambda c: c.answer(wrong)) as server, world_of(one_tool(server)) as world:
        with pytest.raises(WorldError, match="instead of 'c1'"):
            await call(await opened(world))


@pytest.mark.parametrize("more", [{}, {"call_id": None}, {"call_id": ""}, {"call_id": "c1"}])
async def test_an_answer_need_not_say_which_call_it_answers(more):
    mine = {"output": "mine", **more}
    async with FaultyServer(lambda c: c.answer(mine)) as server, world_of(one_tool(server)) as world:
        assert (await call(await opened(world))).output == "mine"


@pytest.mark.parametrize(("status", "key"), [(200, "output"), (400, "output"), (400, "detail")])
async def test_a_key_that_a_server_sends_back_is_no_models_to_learn(monkeypatch, status, key):
    monkeypatch.setenv("STORE_KEY", "open sesame 7")

    async def echo(c: Call) -> web.StreamResponse:
        return web.json_response({key: f"you sent {c.request.headers['X-Store']}"}, status=status)

    keyed = {"headers": {"X-Store": "${STORE_KEY}"}}
    async with FaultyServer(echo) as server, world_of(one_tool(server, **keyed)) as world:
        shown = (await call(await opened(world))).output
    assert "you sent ${" in shown and "sesame" not in shown
