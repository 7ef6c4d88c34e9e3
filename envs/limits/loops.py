"""The event loop of a run: the caller's own, or one in a thread that goes on while the caller computes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Protocol, TypeVar

from envs.limits.threads import let_loop_end

T = TypeVar("T")


class Loop(Protocol):
    """What runs coroutines to their end, `asyncio.Runner` say. Tasks that one leaves go on with the next."""

    def run(self, coro: Coroutine[Any, Any, T], /) -> T: ...


class LoopThread:
    """A loop in a thread of its own, from entering to leaving: tasks go on while nobody waits for them.

    *Covered:* `run` from one thread, which hears signals meanwhile: what it waits for is then cancelled and has closed
    what it holds before the exception passes on; `sys.exit` in a task, which ends the caller and not the loop.
    *Not covered:* limits that need an alarm signal (`envs.limits.clocks.blocking_limit`), which only a main thread
    hears.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._go_on, name="rollouts", daemon=True)
        self._is_over = False

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.run(_end())
        finally:
            self._is_over = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, coro: Coroutine[Any, Any, T], /) -> T:
        """What it returns or raises, in the caller's thread."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(coro))
            tasks[0].add_done_callback(lambda task: _hand_over(task, outcome))

        def end() -> None:
            # The loop keeps the order: what has not begun by then was interrupted before it was asked for.
            if tasks:
                tasks[0].cancel()
            else:
                coro.close()
                outcome.cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            return outcome.result()
        except BaseException:
            if not outcome.done():
                self._loop.call_soon_threadsafe(end)
                concurrent.futures.wait([outcome])
            raise

    def _go_on(self) -> None:
        while not self._is_over:
            try:
                self._loop.run_forever()
            except (KeyboardInterrupt, SystemExit):
                # A task's, which asyncio raises here too: who waits for the task hears of it.
                continue


async def _end() -> None:
    """As `asyncio.Runner` closes: what still goes on is cancelled and waited for."""
    let_loop_end()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _hand_over(task: asyncio.Task[T], outcome: concurrent.futures.Future[T]) -> None:
    if task.cancelled():
        outcome.set_exception(asyncio.CancelledError())
    elif error := task.exception():
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())
