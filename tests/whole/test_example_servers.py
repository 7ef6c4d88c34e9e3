"""The example tool server and endpoint grader as users start them: processes of their own, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from envs.clients.http import HttpCaller, HttpLimits
from envs.errors import WorldError
from envs.remote.config import RemoteConfig
from envs.remote.env import RemoteEnv
from envs.remote.world import RemoteWorld
from envs.tools import call_tool, offered_tools
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolResult, Turn
from graders.user.endpoint import EndpointConfig, EndpointGrader
from tests.support import ROOT
from trainer.config import RunConfig
from trainer.tasks.load import load_tasks

EXAMPLES = ROOT / "scripts" / "examples"
CENTS = {"P-10": 120, "P-11": 135, "N-20": 340, "N-21": 310, "M-30": 790, "L-40": 2450}
START_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(script: str, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """The process and its URL, when it listens."""
    port = free_port()
    command = [sys.executable, str(EXAMPLES / script), "--port", str(port), *arguments]
    process = subprocess.Popen(command)
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"{script} ended with code {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return process, f"http://127.0.0.1:{port}"
    raise AssertionError(f"{script} does not listen after {START_S} s")


@dataclass(frozen=True)
class Servers:
    tools: str
    grader: str


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    processes = []
    try:
        process, tools = started("tool_server.py")
        processes.append(process)
        process, grader = started("endpoint_grader.py", "--tools", tools)
        processes.append(process)
        yield Servers(tools, grader)
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def remote(servers: Servers) -> dict[str, object]:
    tools = [{"name": n, "server_url": f"{servers.tools}/tools"} for n in ("search", "add_to_cart", "view_cart")]
    hooks = {"open_url": f"{servers.tools}/rollouts", "close_url": f"{servers.tools}/rollouts"}
    return {"type": "remote", "tools": tools, **hooks}


@pytest.fixture
async def world(servers: Servers) -> AsyncIterator[RemoteWorld]:
    made = RemoteWorld(RemoteConfig.model_validate(remote(servers)))
    yield made
    assert made.take_metrics()["http/close_failures"] == 0
    await made.aclose()


@pytest.fixture
async def grader(servers: Servers) -> AsyncIterator[EndpointGrader]:
    settings = json.loads((EXAMPLES / "grader.json").read_text())
    made = EndpointGrader(EndpointConfig.model_validate(settings | {"url": f"{servers.grader}/grade"}))
    yield made
    await made.aclose()


@pytest.fixture
def tasks(servers: Servers, tmp_path: Path) -> list[Task]:
    """The example's rows, read as a run reads them."""
    data = str(EXAMPLES / "shop.jsonl")
    config = RunConfig.model_validate(
        {
            "output_dir": str(tmp_path),
            "world": remote(servers),
            "data": {"train": data, "eval": data},
            "grader": str(EXAMPLES / "grader.json"),
        }
    )
    return load_tasks(config, RemoteWorld(RemoteConfig.model_validate(remote(servers))), "train")


async def call(env: RemoteEnv, task: Task, name: str, *, call_id: str, **arguments: object) -> ToolResult:
    made = ToolCall(call_id=call_id, name=name, arguments=json.dumps(arguments))
    return await call_tool(offered_tools(task, env.tools), made, timeout_s=5)


def episode_of(task: Task, rollout_id: str, answer: str) -> Episode:
    message = Message(role="assistant", content=answer)
    return Episode(
        rollout_id=rollout_id,
        task_id=task.task_id,
        messages=(*task.messages, message),
        turns=(Turn(message=message),),
        stop_reason=StopReason.ANSWERED,
    )


async def shop(world: RemoteWorld, task: Task, rollout_id: str, order: dict[str, int]) -> RemoteEnv:
    env = world.make_env()
    await env.open(task, rollout_id)
    for i, (sku, pieces) in enumerate(order.items()):
        result = await call(env, task, "add_to_cart", call_id=f"c{i}", sku=sku, pieces=pieces)
        assert f"{pieces} x " in result.output and result.error is None
    return env


def total(order: dict[str, int]) -> int:
    return sum(CENTS[sku] * pieces for sku, pieces in order.items())


async def test_every_row_can_be_solved_and_all_rollouts_at_once_keep_apart(world, grader, tasks):
    async def play(i: int, task: Task) -> float:
        order = task.item["order"]
        env = await shop(world, task, f"run-{i}", order)
        found = await call(env, task, "search", call_id="s", query="blue pen")
        assert "P-10: blue pen, 120 cents" in found.output
        episode = episode_of(task, f"run-{i}", f"That makes {total(order):,} cents.")
        grade = await grader.grade(task, episode)
        await env.close(episode)
        return grade.reward

    assert len(tasks) == 8
    assert await asyncio.gather(*(play(i, task) for i, task in enumerate([*tasks, *tasks]))) == [1.0] * 16


@pytest.mark.parametrize(
    ("cart", "answer", "reward"),
    [
        ({"P-10": 3}, "360", 1.0),
        ({"P-10": 3}, "361", 0.5),
        ({"P-10": 3}, "It is 360 or 361.", 0.5),
        ({"P-10": 2}, "360", 0.0),
        ({"P-10": 3, "P-11": 1}, "495", 0.0),
        ({}, "360", 0.0),
    ],
)
async def test_the_grader_joins_cart_and_answer(world, grader, tasks, cart, answer, reward):
    env = await shop(world, tasks[0], "graded", cart)
    episode = episode_of(tasks[0], "graded", answer)
    assert (await grader.grade(tasks[0], episode)).reward == reward
    await env.close(episode)


async def test_state_belongs_to_its_rollout_and_ends_with_it(world, tasks):
    one = await shop(world, tasks[0], "one", {"P-10": 3})
    two = await shop(world, tasks[0], "two", {})
    assert (await call(two, tasks[0], "view_cart", call_id="v")).output == "the cart is empty"
    assert (await call(one, tasks[0], "view_cart", call_id="v")).output == "3 x blue pen at 120 cents"
    await one.close(None)
    again = await shop(world, tasks[0], "one", {})
    assert (await call(again, tasks[0], "view_cart", call_id="v")).output == "the cart is empty"
    await again.close(None)
    await two.close(None)


async def test_a_sweep_releases_what_a_killed_run_left(world, tasks):
    await shop(world, tasks[0], "killed", {"P-10": 3})
    await world.sweep(["killed", "never-opened"])
    env = await shop(world, tasks[0], "killed", {})
    assert (await call(env, tasks[0], "view_cart", call_id="v")).output == "the cart is empty"
    await env.close(None)


async def test_a_call_that_comes_twice_is_carried_out_once(servers):
    caller = HttpCaller(url=f"{servers.tools}/tools", headers={}, limits=HttpLimits())
    request = {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "c1",
        "name": "add_to_cart",
        # An object, which servers may take too.
        "arguments": {"sku": "P-10", "pieces": 1},
        "trace_id": "twice",
        "item": {},
    }
    replies = [(await caller.post(request)).json()["output"] for _ in range(2)]
    other = (await caller.post(request | {"id": "fc_2"})).json()["output"]
    await caller.aclose()
    assert [*replies, other] == ["1 x blue pen at 120 cents"] * 2 + ["2 x blue pen at 120 cents"]


async def test_a_grader_that_has_lost_its_tool_server_gives_no_score(tasks):
    process, url = started("endpoint_grader.py", "--tools", f"http://127.0.0.1:{free_port()}")
    caller = HttpCaller(url=f"{url}/grade", headers={}, limits=HttpLimits(max_retries=0))
    try:
        with pytest.raises(WorldError, match=r"HTTP 503.*the tool server does not answer"):
            await caller.post({"sample": {"output_text": "360"}, "item": tasks[0].item, "trace_id": "x"})
    finally:
        await caller.aclose()
        process.send_signal(signal.SIGINT)
        process.wait(30)
