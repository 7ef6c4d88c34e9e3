"""What ends a run from outside: signals, at every moment."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SIGNALLED = """
import asyncio, os, signal, sys, time
from envs.terminal import run
from envs.terminal import end_on_signals

def signalled(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)

end_on_signals()
"""

CLEARING_UP = """
def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        signalled()
        asyncio.run(in_a_loop())
        print("cleared up", flush=True)

async def in_a_loop():
    signalled()
    await asyncio.sleep(0.01)

run(main)
"""

SWALLOWED_IN_A_LOOP = """
async def grade():
    while True:
        try:
            signalled()
        except:
            print("swallowed", flush=True)
        await asyncio.sleep(60)

with asyncio.Runner() as loop:
    try:
        loop.run(grade())
    finally:
        print("cleared up", flush=True)
"""

SWALLOWED = """
for _ in range(3):
    try:
        signalled()
    except:
        print("swallowed", flush=True)
try:
    signalled()
finally:
    print("cleared up", flush=True)
"""


def started(program: str, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + SIGNALLED + program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_ends_a_run_as_ctrl_c_does_but_not_under_nohup(number: signal.Signals) -> None:
    process = started(CLEARING_UP)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    # Further signals, which it sends itself, do not break the clearing up off.
    assert process.communicate(timeout=60) == ("cleared up\n", "interrupted\n")
    assert process.returncode == 130
    process = started(CLEARING_UP, f"import signal; signal.signal({int(number)}, signal.SIG_IGN)")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.kill()
    process.communicate()


def test_code_that_catches_every_exception_keeps_no_run() -> None:
    process = started(SWALLOWED_IN_A_LOOP)
    assert process.communicate(timeout=30)[0] == "swallowed\ncleared up\n" and process.returncode != 0


def test_outside_of_a_loop_the_next_signal_is_heeded_where_one_was_swallowed() -> None:
    process = started(SWALLOWED)
    assert process.communicate(timeout=30)[0] == "swallowed\n" * 3 + "cleared up\n" and process.returncode != 0
