"""The worker: Python that is up, behind the walls, and forks once for each grading.

Gradings are born with all of its memory, so it holds nothing of any: each reads its own payload, after the fork, and
what it leaves passes through memory that is wiped before the next. It kills all that a grading left before it answers.
It ends with the trainer: by PR_SET_PDEATHSIG, and by the end of the pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import linecache
import os
import resource
import select
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from graders.sandbox import grading, kernel, landlock, namespaces, seccomp
from graders.sandbox.protocol import (
    HEADER,
    MARK_BYTES,
    MAX_RESULT_BYTES,
    READY,
    REPLY,
    SOURCE_NAME,
    Limits,
    WorkerSettings,
    frame,
    write_all,
)

_FIRST_CONTROL_FD = 10
_READ_BYTES = 65_536
_MAX_PRINTED_BYTES = 1 << 20
# So that the kernel, short of memory, ends a grading rather than the trainer.
_OOM_SCORE = 500


def main(raw_settings: dict[str, Any]) -> None:
    settings = WorkerSettings(**raw_settings)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    match settings.isolation:
        case "namespaces":
            namespaces.enter(settings)
        case "landlock" | "none":
            namespaces.die_with_parent(settings.parent)
    _confine(settings)
    Worker(settings).serve()


def _confine(settings: WorkerSettings) -> None:
    """What can be given up for ever and gradings still be made: it holds the imports."""
    memory_bytes = settings.limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What is printed meanwhile goes into a file of the trainer's; gradings set limits of their own.
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_PRINTED_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if settings.isolation == "none":
        return
    kernel.bar_capabilities()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    has_mounts = settings.isolation != "landlock"
    if not has_mounts:
        # Elsewhere the scratch folders have still to be mounted, which takes a right and which landlock forbids.
        kernel.drop_capabilities()
        landlock.restrict(readable=grading.readable(settings), writable=[])
    seccomp.install(seccomp.of_worker(scratch=has_mounts, truncation=grading.truncation_is_ruled(settings)))


class _Kept:
    """The first or the last bytes of what one grading wrote, in memory that serves all of them and that nothing is
    copied from but to the trainer's pipe."""

    def __init__(self, size: int, *, last: bool) -> None:
        self._size = size
        self._last = last
        self._view = memoryview(bytearray(size + _READ_BYTES))
        self._zeros = bytes(len(self._view))
        self._filled = 0

    def wipe(self) -> None:
        self._view[:] = self._zeros
        self._filled = 0

    def read_from(self, fd: int) -> bool:
        """Read what is there. False at the end of the file."""
        if self._filled > self._size:
            if self._last:
                self._view[: self._size] = self._view[self._filled - self._size : self._filled]
            self._filled = self._size
        try:
            num_bytes = os.readv(fd, [self._view[self._filled :]])
        except BlockingIOError:
            return True
        self._filled += num_bytes
        return num_bytes > 0

    def bytes(self) -> memoryview:
        start = max(0, self._filled - self._size) if self._last else 0
        return self._view[start : min(self._filled, start + self._size)]


@dataclasses.dataclass(slots=True)
class _Ended:
    """How one grading's process ended."""

    timed_out: bool = False
    signal: int = 0


class Worker:
    """Answers frames on what were its standard input and output."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._limits = Limits(**settings.limits)
        self._in, self._out = (_move_away(fd) for fd in (0, 1))
        null_fd = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null_fd, 0)
        os.dup2(2, 1)
        sys.path[:] = settings.sys_path
        self._code = compile(settings.source, SOURCE_NAME, "exec", dont_inherit=True)
        # Tracebacks show the source's lines.
        linecache.cache[SOURCE_NAME] = (len(settings.source), None, settings.source.splitlines(True), SOURCE_NAME)
        self._scratch = settings.isolation in ("namespaces", "bubblewrap")
        self._result = _Kept(len(READY) + 2 * MARK_BYTES + MAX_RESULT_BYTES, last=False)
        self._output = _Kept(self._limits.output_bytes, last=True)

    def serve(self) -> None:
        if (fault := self._try_out()) is not None:
            self._say({"fault": fault})
            return
        if self._settings.isolation != "none":
            # Packages ask for it while they are loaded, and would look for a folder that can be written to now.
            tempfile.tempdir = namespaces.SCRATCH
        for name, attributes in self._settings.imports:
            # Whatever goes wrong, `SystemExit` included: the grading itself meets the same error, and reports it.
            with contextlib.suppress(BaseException):
                importlib.__import__(name, fromlist=attributes)
        gc.collect()
        # Else the collector would write to every page that the gradings share.
        gc.freeze()
        self._say({"fault": None})
        while self._is_asked():
            self._answer(self._grade(self._code))
            if not self._is_ready():
                # It may have left a part of its frame in the pipe.
                return

    def _say(self, message: dict[str, Any]) -> None:
        write_all(self._out, frame(json.dumps(message).encode()))

    def _answer(self, ended: _Ended) -> None:
        result, output = self._result.bytes(), self._output.bytes()
        head = REPLY.pack(ended.timed_out, ended.signal, len(result))
        write_all(self._out, HEADER.pack(len(head) + len(result) + len(output)) + head)
        write_all(self._out, result)
        write_all(self._out, output)

    def _is_asked(self) -> bool:
        """Wait for a frame. False where the trainer is gone."""
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        ((_, event),) = poll.poll()
        return bool(event & select.POLLIN)

    def _is_ready(self) -> bool:
        """Whether the grading's process gave up its rights."""
        return self._result.bytes()[: len(READY)] == READY

    def _try_out(self) -> str | None:
        """What keeps a grading from giving up its rights. A scratch folder that can't be mounted is done without."""
        ended = self._grade(None)
        if self._scratch and not self._is_ready():
            self._scratch = False
            ended = self._grade(None)
        if self._is_ready():
            return None
        said = bytes(self._result.bytes()[1:]).decode(errors="replace")
        return said or f"ended by signal {ended.signal}"

    def _grade(self, code: types.CodeType | None) -> _Ended:
        self._result.wipe()
        self._output.wipe()
        result_fd, result_end = os.pipe()
        output_fd, output_end = os.pipe()
        pid = os.fork()
        if not pid:
            grading.run(
                self._settings,
                code,
                scratch=self._scratch,
                in_fd=self._in,
                result_fd=result_end,
                output_fd=output_end,
            )
        os.close(result_end)
        os.close(output_end)
        pid_fd = os.pidfd_open(pid)
        ended = _Ended()
        try:
            ended.timed_out = self._watch(result_fd, output_fd, pid_fd)
        finally:
            self._kill_all(pid)
            ended.signal = _signal_of(pid)
            for fd in (result_fd, output_fd, pid_fd):
                os.close(fd)
        return ended

    def _watch(self, result_fd: int, output_fd: int, pid_fd: int) -> bool:
        """Until the process ends or its time is over, which is then true, or the trainer is gone.

        Time counts from where the process is ready: what comes before is ours, and bounded by the trainer's patience.
        """
        poll = select.poll()
        for fd in (result_fd, output_fd):
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        poll.register(pid_fd, select.POLLIN)
        # The grading reads there; all that is of interest here is the end, which is always told.
        poll.register(self._in, 0)
        deadline: float | None = None
        running = True
        while running:
            if deadline is None and self._is_ready():
                deadline = time.monotonic() + self._limits.wall_s
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return True
            ready = {fd for fd, _ in poll.poll(None if left_s is None else left_s * 1000 + 1)}
            if self._in in ready:
                return False
            running = pid_fd not in ready
            for fd, kept in ((result_fd, self._result), (output_fd, self._output)):
                if fd in ready and not kept.read_from(fd):
                    poll.unregister(fd)
        return False

    def _kill_all(self, pid: int) -> None:
        """The grading's process with all its threads, and whatever else it managed to start."""
        if self._settings.isolation in ("namespaces", "bubblewrap"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            return
        if self._settings.isolation == "none":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def _signal_of(pid: int) -> int:
    """Reap the process and all others; the signal that ended it, 0 where it ended by itself."""
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _move_away(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_CONTROL_FD)
