"""MCP servers as tools: real servers of the SDK in processes of their own, over stdio and streamable HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from envs.errors import ToolError, UserError, WorldError
from envs.remote.mcp_config import McpServerConfig
from envs.remote.mcp_server import McpServer, McpSession
from tests.support import ROOT

SERVER = ROOT / "tests" / "support" / "mcp_server.py"
TOOLS = ["count", "add", "traces", "refuse", "protest", "slow", "hang", "pid", "picture", "data", "large", "die"]
PATIENT_S = 300.0
"""A busy machine takes long to start a server; no test waits for it where all is well."""


def stdio(how: str = "stdio", **settings: Any) -> McpServerConfig:
    command = {"command": sys.executable, "args": [str(SERVER), how], "start_timeout_s": PATIENT_S}
    return McpServerConfig.model_validate({"name": "drawer", **command, **settings})


class HttpServer:
    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(SERVER), "http", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def config(self, **settings: Any) -> McpServerConfig:
        url = f"http://127.0.0.1:{self.port}/mcp"
        return McpServerConfig.model_validate({"name": "web", "url": url, "start_timeout_s": PATIENT_S, **settings})


@pytest.fixture(scope="module")
def web() -> Iterator[HttpServer]:
    server = HttpServer()
    yield server
    server.stop()


@asynccontextmanager
async def opened(config: McpServerConfig, *rollout_ids: str) -> AsyncIterator[list[McpSession]]:
    server = McpServer(config)
    sessions = [server.session(rollout_id) for rollout_id in rollout_ids]
    try:
        await asyncio.gather(*(session.open() for session in sessions))
        yield sessions
    finally:
        # This way round: the end of the run closes what rollouts have left open.
        await server.aclose()
        await asyncio.gather(*(session.close() for session in sessions))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def gone(pid: int, *, within_s: float = 30) -> bool:
    for _ in range(int(within_s * 10)):
        if not is_alive(pid):
            return True
        await asyncio.sleep(0.1)
    return False


def test_a_server_is_reached_in_one_way() -> None:
    for wrong in ({}, {"command": "x", "url": "http://x"}, {"url": "http://x", "args": ["y"]}, {"url": "ftp://x"}):
        with pytest.raises(ValidationError):
            McpServerConfig.model_validate({"name": "drawer", **wrong})


async def test_tools_over_stdio_become_definitions_even_while_a_loop_runs() -> None:
    definitions = McpServer(stdio()).definitions()
    assert [d["function"]["name"] for d in definitions] == TOOLS
    add = definitions[1]
    assert add["type"] == "function"
    assert add["function"]["description"] == "Add two numbers."
    assert add["function"]["parameters"]["required"] == ["a", "b"]


def test_tools_are_filtered_by_name(web: HttpServer) -> None:
    server = McpServer(web.config(tools=["slow", "add"]))
    assert [d["function"]["name"] for d in server.definitions()] == ["add", "slow"]
    assert server.definitions() is server.definitions()
    with pytest.raises(UserError, match=r"MCP server 'web': tools: no tool named 'ad'; it has count, add, traces, "):
        McpServer(web.config(tools=["add", "ad"])).definitions()


def test_a_server_that_cannot_be_had_is_the_users_to_mend() -> None:
    def fault(config: McpServerConfig) -> str:
        with pytest.raises(UserError) as caught:
            McpServer(config).definitions()
        return str(caught.value)

    assert "no command 'no-such-program'" in fault(stdio(command="no-such-program"))
    said = fault(stdio(args=["-c", "import sys; sys.exit('no licence found')"]))
    assert said.startswith("MCP server 'drawer' can't be reached: ")
    assert said.endswith("it said: no licence found")
    silent = stdio(args=["-c", "import time; time.sleep(60)"], start_timeout_s=1.0)
    assert "no answer within 1 s" in fault(silent)
    assert "can't be reached" in fault(McpServerConfig(name="web", url="http://127.0.0.1:9/mcp"))
    assert "expected tools, it lists none" in fault(stdio("empty"))


async def test_a_stdio_server_keeps_the_state_of_one_rollout_and_ends_with_it() -> None:
    os.environ["SECRET"] = "the trainer's"
    try:
        async with opened(stdio(), "r-1", "r-2") as (one, two):
            assert [await one.call("count", {}) for _ in range(2)] == ["1", "2"]
            assert await two.call("count", {}) == "1"
            assert (await two.call("traces", {})).split("\n") == ["r-2", "r-2", "", ""]
            pids = [int(await session.call("pid", {})) for session in (one, two)]
            assert all(map(is_alive, pids))
            await one.close()
            assert await gone(pids[0])
            assert await two.call("count", {}) == "2"
    finally:
        del os.environ["SECRET"]
    assert await gone(pids[1])


async def test_an_http_server_keeps_the_state_of_one_rollout(web: HttpServer) -> None:
    async with opened(web.config(), "r-1", "r 2/ü") as (one, two):
        assert [await one.call("count", {}) for _ in range(2)] == ["1", "2"]
        assert await two.call("count", {}) == "1"
        assert (await two.call("traces", {})).split("\n") == ["r 2/ü", "", "r%202/%C3%BC", ""]


async def test_what_a_tool_answers_is_text_for_the_model(web: HttpServer) -> None:
    async with opened(web.config(), "r") as (session,):
        assert await session.call("add", {"a": 2, "b": 3}) == "5"
        assert await session.call("picture", {}) == "a dot\n[image]"
        assert await session.call("data", {}) == '{"größe": 2}'
        assert len(await session.call("large", {"num_bytes": 1_000_000})) == 1_000_000


async def test_the_model_sees_what_a_tool_refuses_and_the_world_is_to_blame_for_the_rest(web: HttpServer) -> None:
    async with opened(web.config(), "r") as (session,):
        with pytest.raises(ToolError, match="the drawer is locked"):
            await session.call("refuse", {})
        with pytest.raises(ToolError, match="validation error for addArguments"):
            await session.call("add", {"a": "x", "b": 1})
        with pytest.raises(ToolError, match="Unknown tool: nope"):
            await session.call("nope", {})
        with pytest.raises(ToolError, match="too large: 1,000,001 bytes"):
            await session.call("large", {"num_bytes": 1_000_001})
        with pytest.raises(WorldError, match="MCP server 'web': protest: out of order"):
            await session.call("protest", {})
        assert await session.call("add", {"a": 2, "b": 3}) == "5"


async def test_a_slow_tool_is_given_up_and_the_session_goes_on(web: HttpServer) -> None:
    async with opened(web.config(timeout_s=3.0), "r") as (session,):
        start = time.perf_counter()
        with pytest.raises(WorldError, match="slow: no answer within 3 s"):
            await session.call("slow", {"seconds": 60})
        assert time.perf_counter() - start < 30
        assert await session.call("add", {"a": 2, "b": 3}) == "5"


async def test_calls_of_one_session_run_side_by_side(web: HttpServer) -> None:
    async with opened(web.config(), "r") as (session,):
        await session.call("slow", {"seconds": 0})
        start = time.perf_counter()
        answers = await asyncio.gather(*(session.call("slow", {"seconds": 5}) for _ in range(10)))
        assert answers == ["late"] * 10
        assert time.perf_counter() - start < 40


async def test_a_server_that_dies_in_a_call_loses_the_rollout() -> None:
    async with opened(stdio(), "r") as (session,):
        with pytest.raises(WorldError, match=r"die: .*; it said: I am going down"):
            await session.call("die", {})
        with pytest.raises(WorldError):
            await session.call("count", {})


async def test_a_shared_session_that_breaks_is_opened_again_and_the_call_repeated_once(tmp_path: Path) -> None:
    config = stdio(per_rollout=False, env={"DIED": str(tmp_path / "died")})
    async with opened(config, "r-1", "r-2") as (one, two):
        assert [await one.call("count", {}), await two.call("count", {})] == ["1", "2"]
        assert (await one.call("traces", {})).split("\n")[:2] == ["r-1", ""]
        assert await one.call("die", {}) == "alive"
        await one.close()
        assert await two.call("count", {}) == "1", "closing one rollout's share leaves the others theirs"


async def test_a_shared_session_survives_a_restart_of_the_server_but_not_its_end() -> None:
    web = HttpServer()
    try:
        async with opened(web.config(per_rollout=False), "r") as (session,):
            assert await session.call("add", {"a": 2, "b": 3}) == "5"
            web.stop()
            web.start()
            assert await session.call("add", {"a": 2, "b": 3}) == "5"
            web.stop()
            with pytest.raises(WorldError, match="MCP server 'web'"):
                await session.call("add", {"a": 2, "b": 3})
    finally:
        web.stop()


async def test_a_rollout_cancelled_in_a_call_takes_its_server_with_it() -> None:
    pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def rollout() -> None:
        async with opened(stdio(), "r") as (session,):
            pid.set_result(int(await session.call("pid", {})))
            await session.call("hang", {})

    running = asyncio.create_task(rollout())
    await pid
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await gone(pid.result())


async def test_a_rollout_cancelled_while_its_server_starts_takes_it_with_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    silent = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
    session = McpServer(stdio(args=["-c", silent])).session("r")
    opening = asyncio.create_task(session.open())
    while not (told.exists() and told.read_text().endswith(".")):  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert await gone(int(told.read_text()[:-1]))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the server on Linux only")
def test_a_killed_run_leaves_no_server_behind() -> None:
    run = textwrap.dedent(f"""
        import asyncio, sys
        from envs.remote.mcp_server import McpServer
        from envs.remote.mcp_config import McpServerConfig

        async def main():
            args = [{str(SERVER)!r}, "stdio"]
            server = McpServer(McpServerConfig(name="drawer", command=sys.executable, args=args, start_timeout_s=300))
            session = server.session("r")
            await session.open()
            print(await session.call("pid", {{}}), flush=True)
            await session.call("hang", {{}})

        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(1)
        assert is_alive(pid)
        process.send_signal(signal.SIGKILL)
    assert asyncio.run(gone(pid))
