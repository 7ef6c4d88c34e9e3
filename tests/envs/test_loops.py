"""A loop in a thread of its own: it goes on while nobody waits, and ends what it holds when the caller does."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from envs.limits.loops import LoopThread


def test_tasks_go_on_while_the_caller_computes_and_what_they_give_comes_back():
    done = threading.Event()

    async def later() -> str:
        await asyncio.sleep(0.01)
        done.set()
        return "done"

    async def begin() -> asyncio.Task[str]:
        return asyncio.create_task(later())

    async def result(task: asyncio.Task[str]) -> str:
        return await task

    with LoopThread() as loop:
        task = loop.run(begin())
        assert done.wait(30), "nobody waits for it, and it goes on"
        assert loop.run(result(task)) == "done"


@pytest.mark.parametrize("error", [ValueError, SystemExit, asyncio.CancelledError])
def test_what_a_task_raises_is_raised_where_it_is_waited_for_and_the_loop_goes_on(error):
    async def fail() -> None:
        raise error()

    async def fine() -> int:
        return 1

    with LoopThread() as loop:
        with pytest.raises(error):
            loop.run(fail())
        assert loop.run(fine()) == 1


def test_what_is_interrupted_has_closed_what_it_holds_before_the_caller_goes_on():
    closed = []

    async def hold() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            closed.append(True)

    with LoopThread() as loop:
        with pytest.raises(KeyboardInterrupt):
            loop.run(hold())
        assert closed == [True]


def test_leaving_ends_what_still_goes_on_and_the_thread():
    closed = []

    async def hold() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(hold())

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError), LoopThread() as loop:
        loop.run(begin())
        time.sleep(0.01)
        raise ZeroDivisionError
    assert closed == [True] and time.monotonic() - start < 30
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())
