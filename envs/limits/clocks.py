"""Limits on time that count only the time of what they limit.

A tool, an environment or a grader is given so many seconds. What it waits for meanwhile because of us is not its time:
the engine and its queue, a free thread, a free place among the requests in flight, an event loop that is busy with
other episodes. Such waits stand under `stopped_clocks`, or `place_in`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from types import TracebackType

from envs.errors import WorldError

_TICK_S = 0.25
_LATE_S = 0.05
_RESOLUTION_S = 1e-4
"""Less is nothing: added to the loop's time it might not change it, and the end would never come."""
_LONGEST_ALARM_S = 1e8
_clocks: ContextVar[tuple[Clock, ...]] = ContextVar("clocks", default=())


class Clock:
    """What is left of one limit. Made by `time_limit`.

    The loop is looked at in ticks: of a tick that comes late, the time up to when it was due counts and the rest does
    not. An end that comes late, or that an answer may renew, is put off once, so that answers that came in the meantime
    are read first.
    """

    def __init__(self, limit_s: float | None, timeout: asyncio.Timeout, renewals: Callable[[], int] | None) -> None:
        self.loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._limit_s = self._left_s = limit_s
        self._renewals = renewals
        self._num_renewals = renewals() if renewals else 0
        self._num_stops = 0
        self._runs = False
        self._is_put_off = False
        self._is_over = False
        self._counted_s = self._due_s = 0.0
        self._tick: asyncio.TimerHandle | None = None
        self._wind()

    def expired(self) -> bool:
        """Whether it was this limit that ended the work, and not a `TimeoutError` of the work's own."""
        return self._timeout.expired()

    def stop(self) -> None:
        """Stand still until `go_on`; may be called several times, by tasks side by side."""
        self._num_stops += 1
        if self._runs:
            self._count()
            self._runs = False

    def go_on(self) -> None:
        self._num_stops -= 1
        self._wind()

    def end(self) -> None:
        self._is_over = True
        self._runs = False
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None

    def _wind(self) -> None:
        if self._left_s is None or self._num_stops or self._is_over or self._timeout.expired():
            return
        self._runs = True
        self._counted_s = self.loop.time()
        self._due_s = self._counted_s + min(max(self._left_s, 0.0), _TICK_S)
        if self._tick is not None:
            # One of before the clock stood still, which costs less to wait for than to replace: it finds out.
            if self._tick.when() <= self._due_s:
                return
            self._tick.cancel()
        self._tick = self.loop.call_at(self._due_s, self._on_tick)

    def _count(self) -> None:
        assert self._left_s is not None
        self._left_s -= min(self.loop.time(), self._due_s) - self._counted_s
        if self._left_s < _RESOLUTION_S:
            self._left_s = 0.0

    def _on_tick(self) -> None:
        assert self._left_s is not None
        self._tick = None
        if not self._runs:
            return
        late_s = self.loop.time() - self._due_s
        if late_s < -_RESOLUTION_S:
            self._tick = self.loop.call_at(self._due_s, self._on_tick)
            return
        self._count()
        if self._renewals and (num_renewals := self._renewals()) != self._num_renewals:
            assert self._limit_s is not None
            self._num_renewals, self._left_s, self._is_put_off = num_renewals, self._limit_s, False
        if self._left_s <= 0 and (self._renewals or late_s > _LATE_S) and not self._is_put_off:
            self._is_put_off = True
            self._left_s = _LATE_S
        if self._left_s > 0:
            self._wind()
        else:
            self._runs = False
            self._timeout.reschedule(self.loop.time())


class _Limited:
    """The body of `time_limit`. Every tool call and every request to the engine stands in one."""

    def __init__(self, limit_s: float | None, renewals: Callable[[], int] | None) -> None:
        self._limit_s = limit_s
        self._renewals = renewals
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Clock:
        await self._timeout.__aenter__()
        self._clock = Clock(self._limit_s, self._timeout, self._renewals)
        self._token = _clocks.set((*_clocks.get(), self._clock))
        return self._clock

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        _clocks.reset(self._token)
        self._clock.end()
        await self._timeout.__aexit__(kind, error, tb)


def time_limit(
    limit_s: float | None, *, renewals: Callable[[], int] | None = None
) -> AbstractAsyncContextManager[Clock]:
    """Cancel the body after so many seconds of its own and raise `TimeoutError`, as `asyncio.timeout` does.

    Limits may stand within each other. None: no limit. `renewals` is asked now and then: whenever it says another
    number than before, the whole limit is left again.
    """
    return _Limited(limit_s, renewals)


@contextlib.contextmanager
def blocking_limit(limit_s: float, what: str) -> Iterator[None]:
    """Raise `WorldError` in sync code that takes longer, though it holds up the event loop that could end it.

    By an alarm signal, so in the main thread alone; elsewhere there is no limit, nor where another alarm comes first.
    Not covered: code that does not come back from C.
    """

    def give_up(*_: object) -> None:
        raise WorldError(f"{what}: not done within {limit_s:g} s")

    others_s, others_interval_s = signal.getitimer(signal.ITIMER_REAL)
    if threading.current_thread() is not threading.main_thread() or 0 < others_s <= limit_s:
        yield
        return
    start = time.monotonic()
    former = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, min(limit_s, _LONGEST_ALARM_S))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        if others_s:
            left_s = max(others_s - (time.monotonic() - start), _RESOLUTION_S)
            signal.setitimer(signal.ITIMER_REAL, left_s, others_interval_s)


class stopped_clocks:
    """All limits that this task stands under stand still in the body: what is waited for there is ours.

    Not covered: others who wait for this task, such as those who asked a judge the same question; a task that was begun
    under a limit and outlives it, waiting for us: the limit stands still as long.
    """

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        # A tool in a thread may run a loop of its own.
        self._clocks = [clock for clock in _clocks.get() if clock.loop is loop]
        for clock in self._clocks:
            clock.stop()

    def __exit__(self, *_: object) -> None:
        for clock in self._clocks:
            clock.go_on()


@contextlib.asynccontextmanager
async def place_in(slots: asyncio.Semaphore) -> AsyncIterator[None]:
    """One of the slots, for the body; the wait for it is on nobody's clock."""
    with stopped_clocks():
        await slots.acquire()
    try:
        yield
    finally:
        slots.release()
