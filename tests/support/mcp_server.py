"""A real MCP server for the tests: `mcp_server.py stdio`, `mcp_server.py http [PORT]`, `mcp_server.py empty`.

Over HTTP it prints its port first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, CallToolResult

server = MCPServer("test", log_level="CRITICAL")
counts: Counter[str] = Counter()


@server.tool()
def count(ctx: Context) -> str:
    """Count the calls of this session; over stdio a process is a session."""
    session = (ctx.headers or {}).get("mcp-session-id", "")
    counts[session] += 1
    return str(counts[session])


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool(structured_output=False)
def traces(ctx: Context) -> list[str]:
    """What the server knows of the rollout: from the call, the environment, the header."""
    meta = ctx.request_context.meta or {}
    header = (ctx.headers or {}).get("x-trace-id", "")
    return [str(meta.get("trace_id")), os.environ.get("TRACE_ID", ""), header, os.environ.get("SECRET", "")]


@server.tool()
def refuse() -> str:
    """Fail as a tool fails."""
    raise ToolError("the drawer is locked")


@server.tool()
def protest() -> str:
    """Fail as a protocol fails."""
    raise MCPError(INTERNAL_ERROR, "out of order")


@server.tool()
async def slow(seconds: float) -> str:
    """Answer late."""
    await asyncio.sleep(seconds)
    return "late"


@server.tool()
def hang() -> str:
    """Never answer, and hear no signal that asks."""
    time.sleep(600)
    return "never"


@server.tool()
def pid() -> str:
    """The process."""
    return str(os.getpid())


@server.tool(structured_output=False)
def picture() -> list[str | Image]:
    """A caption and an image."""
    return ["a dot", Image(data=b"\x89PNG", format="png")]


@server.tool(structured_output=False)
def data() -> CallToolResult:
    """Structured content alone."""
    return CallToolResult(content=[], structured_content={"größe": 2})


@server.tool(structured_output=False)
def large(num_bytes: int) -> str:
    """A long text."""
    return "x" * num_bytes


@server.tool()
def die() -> str:
    """End the process in the middle of a call; once, where the environment names a file to remember it by."""
    if "DIED" in os.environ:
        died = Path(os.environ["DIED"])
        if died.exists():
            return "alive"
        died.touch()
    print("I am going down", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    how = sys.argv[1]
    if how == "stdio":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.run("stdio")
    elif how == "empty":
        MCPServer("empty", log_level="CRITICAL").run("stdio")
    else:
        import uvicorn

        port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        bound = socket.create_server(("127.0.0.1", port))
        print(bound.getsockname()[1], flush=True)
        app = server.streamable_http_app()
        uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[bound])


if __name__ == "__main__":
    main()
