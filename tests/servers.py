"""Servers that tests start as their users do: processes of their own, asked over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
START_S = 300
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Not `vllm serve`: the command itself asks for metadata that the package vllm-cpu does not have.
VLLM = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
VLLM_OPTIONS = ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "1024"]


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
            cwd=REPOSITORY,
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
