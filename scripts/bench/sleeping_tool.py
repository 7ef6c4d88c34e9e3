"""A tool server for `tool_calls.py`: by the hosted protocol, each call takes the same time.

    python scripts/bench/sleeping_tool.py --latency-ms 100

Listens on a free port, which is the first line of its output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource

from aiohttp import web


async def serve(latency_s: float) -> None:
    async def handle(request: web.Request) -> web.Response:
        call = await request.json()
        await asyncio.sleep(latency_s)
        return web.json_response({"output": f"the value of {call['arguments']} is 42"})

    app = web.Application()
    app.router.add_post("/call", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def raise_file_limit() -> None:
    """A connection for each rollout in flight; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--latency-ms", type=float, default=100.0)
    raise_file_limit()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.parse_args().latency_ms / 1000))
