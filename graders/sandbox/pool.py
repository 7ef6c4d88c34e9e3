"""The trainer's side: workers that are up and wait, one grading each at a time.

*Covered*: a worker that dies, hangs or answers nonsense is replaced, and its grading tried once more; then it is
`WorldError`. A worker that does not start with the source's imports is started without; gradings then do them. A
cancelled grading takes its worker with it. Workers start when they are first needed and end with `aclose`, or with the
trainer, however that ends. *Not covered*: use from two event loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from typing import IO

from envs.errors import WorldError
from envs.limits.clocks import place_in
from graders.sandbox.isolation import Imports, Isolation, boot_frame, command, environment
from graders.sandbox.protocol import FAILED, HEADER, MARK_BYTES, MAX_REPLY_BYTES, READY, REPLY, Limits, frame

_TRIES = 2
_CLOSE_S = 5.0
_MAX_FAULT_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one grading came to, as far as the sandbox knows."""

    result: str
    """The grading's own word, not to be trusted. Empty where the process did not come to its end: what it wrote before
    a limit, a signal or `os._exit` does not count."""
    output: str
    timed_out: bool
    signal: int
    """That ended it; 0 where it ended by itself or was ended by the sandbox after its result."""


class _SandboxFault(Exception):
    """The sandbox's own failure, not the source's."""


class Pool:
    """Workers for one source."""

    def __init__(
        self,
        source: str,
        imports: Imports,
        *,
        isolation: Isolation,
        limits: Limits,
        num_workers: int | None = None,
    ) -> None:
        self.isolation = isolation
        self._source = source
        self._imports = imports
        self._limits = limits
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._killed: list[_Worker] = []
        self._slots = asyncio.Semaphore(num_workers or len(os.sched_getaffinity(0)))

    async def run(self, payload: bytes) -> Outcome:
        """Grade the payload, JSON `{"sample": …, "item": …}`. Raises `WorldError` when the sandbox failed twice."""
        fault = ""
        async with place_in(self._slots):
            for _ in range(_TRIES):
                try:
                    return await self._run_once(payload)
                except (_SandboxFault, OSError, EOFError, TimeoutError) as e:
                    fault = str(e) or type(e).__name__
        raise WorldError(f"the sandbox of the python grader failed {_TRIES} times, at last: {fault}")

    async def aclose(self) -> None:
        await asyncio.gather(*(worker.close() for worker in (*self._workers, *self._killed)))
        self._workers.clear()
        self._killed.clear()
        self._idle.clear()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers' outermost processes."""
        return tuple(worker.pid for worker in self._workers)

    async def _run_once(self, payload: bytes) -> Outcome:
        worker = self._idle.pop() if self._idle else await self._start_worker()
        try:
            outcome = await worker.run(payload, timeout_s=self._limits.wall_s + self._limits.start_s)
        except BaseException:
            self._give_up(worker)
            raise
        self._idle.append(worker)
        return outcome

    def _give_up(self, worker: _Worker) -> None:
        """Kill it now; its end is awaited in `aclose`, so that a cancelled grading does not wait."""
        worker.kill()
        self._workers.discard(worker)
        self._killed.append(worker)

    async def _start_worker(self) -> _Worker:
        try:
            return await self._try_to_start(self._imports)
        except _SandboxFault:
            if not self._imports:
                raise
        # A module that ends or stops the process which imports it is the source's own fault: its gradings will meet it.
        worker = await self._try_to_start(())
        self._imports = ()
        return worker

    async def _try_to_start(self, imports: Imports) -> _Worker:
        with tempfile.TemporaryFile() as errors:
            process = await asyncio.create_subprocess_exec(
                *command(self.isolation),
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                env=environment(self.isolation),
                cwd=tempfile.gettempdir() if self.isolation is Isolation.NONE else "/",
                start_new_session=True,
                limit=MAX_REPLY_BYTES,
            )
            worker = _Worker(process)
            self._workers.add(worker)
            try:
                boot = boot_frame(self.isolation, self._source, imports, self._limits)
                await worker.start(boot, timeout_s=self._limits.start_s)
            except BaseException as e:
                self._give_up(worker)
                if isinstance(e, EOFError | OSError):
                    raise _SandboxFault(f"a worker did not start: {_tail(errors) or e}") from e
                raise
        return worker


class _Worker:
    """One worker process and its two pipes."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._in, self._out = process.stdin, process.stdout
        self.pid = process.pid

    async def start(self, boot: bytes, *, timeout_s: float) -> None:
        answer = await self._ask(boot, timeout_s)
        try:
            fault = json.loads(answer)["fault"]
        except (ValueError, RecursionError, LookupError, TypeError) as e:
            raise _SandboxFault("a worker did not answer with JSON") from e
        if fault is not None:
            raise _SandboxFault(f"a worker did not start: {fault}")

    async def run(self, payload: bytes, *, timeout_s: float) -> Outcome:
        reply = await self._ask(frame(payload), timeout_s)
        if len(reply) < REPLY.size:
            raise _SandboxFault(f"a worker answered with {len(reply)} bytes")
        timed_out, number, size = REPLY.unpack_from(reply)
        written, output = reply[REPLY.size : REPLY.size + size], reply[REPLY.size + size :]
        if not written.startswith(READY):
            why = written.removeprefix(FAILED).decode(errors="replace") or f"signal {number}"
            raise _SandboxFault(f"a grading did not start: {why}")
        result = b"" if timed_out or number else _marked(written.removeprefix(READY))
        return Outcome(
            result=result.decode(errors="replace"),
            output=output.decode(errors="replace"),
            timed_out=timed_out,
            signal=number,
        )

    async def close(self) -> None:
        """Let it end by itself: the end of the pipe tells it to."""
        self._in.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _CLOSE_S)
        self.kill()
        await self._process.wait()

    def kill(self) -> None:
        """With all that it started: those within its namespaces die with it, the others share its session."""
        self._in.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _ask(self, message: bytes, timeout_s: float) -> bytes:
        async with asyncio.timeout(timeout_s):
            self._in.write(message)
            await self._in.drain()
            (size,) = HEADER.unpack(await self._out.readexactly(HEADER.size))
            if size > MAX_REPLY_BYTES:
                raise _SandboxFault(f"a worker answered with {size} bytes")
            return await self._out.readexactly(size)


def _marked(written: bytes) -> bytes:
    """The result, if nothing but it followed the mark that the grading named before the source ran."""
    mark, rest = written[:MARK_BYTES], written[MARK_BYTES:]
    return rest.removeprefix(mark) if mark and rest.startswith(mark) else b""


def _tail(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()[-_MAX_FAULT_CHARS:]
