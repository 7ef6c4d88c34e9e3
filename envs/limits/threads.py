"""Threads for sync code of the user's: tools, environments, graders.

Python's own executor joins its threads when the interpreter ends, so that one call that hangs keeps the process for
ever, and a call that was given up keeps its place in the pool. These threads are daemons, and a call that is given up
makes room for another.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from envs.errors import WorldError
from envs.limits.clocks import stopped_clocks


def _uncancellable() -> Future[Any]:
    """Who waits for it may be cancelled; the thread behind it goes on all the same."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, eq=False)
class _Call:
    name: str
    work: Callable[[], Any]
    started: Future[None] = field(default_factory=_uncancellable)
    result: Future[Any] = field(default_factory=_uncancellable)
    is_done: bool = False


class Threads:
    """Runs functions in threads that start on demand and are used again.

    Covered: as many calls at once as `most`, others wait their turn, on nobody's clock; a call whose caller has gone
    (a time-out) counts as hung until it returns, and its place is free at once; when `most` calls hang, or the system
    gives no more threads, `WorldError` names what hangs. Works from several event loops. Not covered: a call that hangs
    is not stopped; one that holds Python's lock holds up everything.
    """

    def __init__(self, *, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._num_running = 0
        self._waiting: deque[_Call] = deque()
        self._idle: list[SimpleQueue[_Call]] = []
        self._hung: set[_Call] = set()

    async def run(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What the function gives or raises. `name` is what a call that hangs is known by."""
        call = _Call(name, functools.partial(contextvars.copy_context().run, function, *args, **kwargs))
        with self._lock:
            if len(self._hung) >= self._most:
                raise self._none_left()
            if self._num_running < self._most:
                self._start(call)
            else:
                self._waiting.append(call)
        try:
            if not call.started.done():
                with stopped_clocks():
                    await asyncio.wrap_future(call.started)
            return await asyncio.wrap_future(call.result)
        except asyncio.CancelledError:
            self._give_up(call)
            raise

    @property
    def num_hung(self) -> int:
        """Calls that nobody waits for any more and that have not returned."""
        return len(self._hung)

    async def wait_for_hung(self, name: str) -> None:
        """Return when every call of this name that was given up has come to its end after all."""
        with self._lock:
            left = [call.result for call in self._hung if call.name == name]
        await asyncio.gather(*map(asyncio.wrap_future, left), return_exceptions=True)

    def _start(self, call: _Call) -> None:
        """With the lock held. Raises `WorldError` where the system gives no thread."""
        if self._idle:
            self._idle.pop().put(call)
        else:
            # A run with many rollouts in a container with few processes: the thread can't be had.
            try:
                threading.Thread(target=self._work, args=(call,), name=f"call {call.name}", daemon=True).start()
            except RuntimeError as e:
                raise self._none_left(str(e)) from e
        self._num_running += 1

    def _none_left(self, cause: str = "") -> WorldError:
        hung = Counter(call.name for call in self._hung).most_common(3)
        told = ", ".join(f"{count} of {name}" for name, count in hung) or "none"
        return WorldError(f"no thread is left{cause and f' ({cause})'}; calls that do not return: {told}")

    def _work(self, call: _Call) -> None:
        """The life of one thread."""
        mine: SimpleQueue[_Call] = SimpleQueue()
        while True:
            call.started.set_result(None)
            tell = _outcome(call)
            is_wanted = self._finish(call, mine)
            tell()
            del call, tell
            if not is_wanted:
                return
            call = mine.get()

    def _finish(self, call: _Call, mine: SimpleQueue[_Call]) -> bool:
        """Whether the thread goes on, with what comes in `mine`: the place of one that hung has been filled."""
        with self._lock:
            call.is_done = True
            if call in self._hung:
                self._hung.discard(call)
                return False
            self._num_running -= 1
            self._idle.append(mine)
            self._start_next()
            return True

    def _give_up(self, call: _Call) -> None:
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            elif not call.is_done:
                self._hung.add(call)
                self._num_running -= 1
                self._start_next()

    def _start_next(self) -> None:
        """With the lock held."""
        while self._waiting and self._num_running < self._most:
            call = self._waiting.popleft()
            try:
                if len(self._hung) >= self._most:
                    raise self._none_left()
                self._start(call)
            except WorldError as e:
                call.is_done = True
                call.started.set_exception(e)


def _outcome(call: _Call) -> Callable[[], None]:
    """Do the work; what is given back tells the one who waits."""
    try:
        return functools.partial(call.result.set_result, call.work())
    except StopIteration as e:
        # asyncio can't hand it on: whoever waits would wait for ever.
        error = RuntimeError(f"{call.name} raised StopIteration")
        error.__cause__ = e
        return functools.partial(call.result.set_exception, error)
    except BaseException as e:
        return functools.partial(call.result.set_exception, e)


THREADS = Threads()
"""One for the whole process, as its memory is."""


def thread_metrics() -> dict[str, float]:
    """How many calls hang; empty where none does."""
    return {"hung_threads": float(THREADS.num_hung)} if THREADS.num_hung else {}


class _Daemons(ThreadPoolExecutor):
    """asyncio takes no other kind of executor. Nothing of it is joined, and a call that hangs keeps its thread."""

    def __init__(self, *, most: int) -> None:
        super().__init__(max_workers=1)
        self._most = most
        self._num_threads = 0
        self._num_idle = threading.Semaphore(0)
        self._calls: SimpleQueue[_Call] = SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        call = _Call("", functools.partial(fn, *args, **kwargs))
        self._calls.put(call)
        if not self._num_idle.acquire(blocking=False) and self._num_threads < self._most:
            self._num_threads += 1
            threading.Thread(target=self._work, daemon=True).start()
        return call.result

    def _work(self) -> None:
        while True:
            _outcome(self._calls.get())()
            self._num_idle.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...


_DAEMONS = _Daemons(most=256)


def within(limit_s: float, ask: Callable[..., bool], *args: str) -> bool:
    """What it says; False where it has not after that time: a socket's limit is one of each byte, a name has none."""
    answer: SimpleQueue[bool] = SimpleQueue()
    threading.Thread(target=lambda: answer.put(ask(*args)), daemon=True).start()
    try:
        return answer.get(timeout=limit_s)
    except Empty:
        return False


def let_loop_end() -> None:
    """What async code hands to the running loop's own threads (`asyncio.to_thread`) must not keep the process."""
    asyncio.get_running_loop().set_default_executor(_DAEMONS)
