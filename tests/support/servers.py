"""Servers that tests ask over HTTP: processes started as their users start them, and a scripted judge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from tests.support import ROOT

if TYPE_CHECKING:
    from tests.support.scripted_engine import Script
    from trainer.templates.chat import Chat

START_S = 600
MOST_S = 300
HANGS = "no answer"
"""What a scripted policy says that says nothing."""
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""An engine's worker lives in the engine's process, which spares the start of an interpreter that imports all of vLLM.

The run of test_quickstart_vllm has processes as its users have them.
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **ONE_PROCESS}
# Not `vllm serve`: the command itself asks for metadata that the package vllm-cpu does not have.
VLLM = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
VLLM_OPTIONS = ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "2048"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], log: Path, *, ready: str) -> Iterator[str]:
    """The address of the server that `command --port PORT` starts, as soon as it answers under the path `ready`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_S
        while not _answers(address + ready):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.3)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # an engine too, which is a process of its own
        process.wait()


@contextlib.contextmanager
def running_vllm(command: list[str], log: Path) -> Iterator[str]:
    """The address of a vLLM server, as small as the tests need it."""
    with running([*command, *VLLM_OPTIONS], log, ready="/health") as address:
        yield address


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def scripted_judge(answer: Callable[[web.Request], Awaitable[web.Response]]) -> Iterator[str]:
    """The base URL under which `answer` takes Chat Completions."""
    with serving({"POST /v1/chat/completions": answer}) as address:
        yield f"{address}/v1"


@contextlib.contextmanager
def serving(routes: Mapping[str, Callable[[web.Request], Awaitable[web.Response]]]) -> Iterator[str]:
    """The address of a server of `METHOD /path`s; in a thread, for what asks it has its own loop."""
    loop, ports, ready = asyncio.new_event_loop(), [], threading.Event()

    async def serve() -> web.AppRunner:
        app = web.Application()
        for route, answer in routes.items():
            method, _, path = route.partition(" ")
            app.router.add_route(method, path, answer)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
        return runner

    def work() -> None:
        runner = loop.run_until_complete(serve())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def scripted_policy(chat: Chat, script: Script, *, key: str = "") -> Iterator[str]:
    """The address of a stand-in for `vllm serve` that writes what the script says, after so long as it waits."""

    def refused(request: web.Request) -> web.Response | None:
        return web.Response(status=401) if key and request.headers.get("Authorization") != f"Bearer {key}" else None

    async def models(request: web.Request) -> web.Response:
        return refused(request) or web.json_response({"data": [{"id": "base"}, {"id": "policy"}]})

    async def complete(request: web.Request) -> web.Response:
        asked = await request.json()
        text = script(chat.decode(asked["prompt"]), asked["seed"])
        if text == HANGS:
            await asyncio.sleep(MOST_S)
        ids = [*chat._encode(text), asked["stop_token_ids"][0]][: asked["max_tokens"]]
        is_whole = ids[-1] in asked["stop_token_ids"]
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}
        choice |= {"finish_reason": "stop" if is_whole else "length"}
        return refused(request) or web.json_response({"choices": [choice]})

    with serving({"GET /v1/models": models, "POST /v1/completions": complete}) as address:
        yield address


def completion(model: str, text: str | None) -> web.Response:
    """A Chat Completions answer of 42 tokens in all."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
    return web.json_response({**body, "choices": [choice], "usage": usage})
