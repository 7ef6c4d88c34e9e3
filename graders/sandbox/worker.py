"""The worker: Python that is up, behind the walls, and forks once for each grading.

It never reads what the model wrote (the grading's own process parses it), and it kills all that a grading left before
it answers. It ends with the trainer: by PR_SET_PDEATHSIG, and by the end of the pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import linecache
import os
import select
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

from graders.sandbox import grading, kernel, namespaces
from graders.sandbox.limits import Limits
from graders.sandbox.protocol import MAX_RESULT_BYTES, SOURCE_NAME, Settings, frame, read_frame, write_all

_FIRST_CONTROL_FD = 10
_READ_BYTES = 65_536
# So that the kernel, short of memory, ends a grading rather than the trainer.
_OOM_SCORE = 500


def main(raw_settings: dict[str, Any]) -> None:
    settings = Settings(**raw_settings)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    match settings.isolation:
        case "namespaces":
            namespaces.enter(settings)
        case "landlock" | "none":
            namespaces.die_with_parent(settings.parent)
    if settings.isolation != "none":
        kernel.bar_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    Worker(settings).serve()


@dataclasses.dataclass(slots=True)
class _Ended:
    """What one grading's process left."""

    result: bytearray
    output: bytearray
    timed_out: bool = False
    signal: int = 0

    def to_json(self) -> bytes:
        ready = self.result[:1] == grading.READY
        return json.dumps(
            {
                "ready": ready,
                "timed_out": self.timed_out,
                "signal": self.signal,
                "result": self.result[1:].decode(errors="replace"),
                "output": self.output.decode(errors="replace"),
            }
        ).encode()


class Worker:
    """Answers frames on what were its standard input and output."""

    def __init__(self, settings: Settings) -> None:
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

    def serve(self) -> None:
        if (fault := self._try_out()) is not None:
            self._answer({"fault": fault})
            return
        for name in self._settings.imports:
            # The grading itself meets the same error, and reports it.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        # Else the collector would write to every page that the gradings share.
        gc.freeze()
        self._answer({"fault": None, "scratch": self._scratch})
        while (payload := read_frame(self._in)) is not None:
            write_all(self._out, frame(self._grade(payload, self._code).to_json()))

    def _answer(self, message: dict[str, Any]) -> None:
        write_all(self._out, frame(json.dumps(message).encode()))

    def _try_out(self) -> str | None:
        """What keeps a grading from giving up its rights. A scratch folder that can't be mounted is done without."""
        tried = self._grade(b"", None)
        if self._scratch and tried.result[:1] != grading.READY:
            self._scratch = False
            tried = self._grade(b"", None)
        if tried.result[:1] == grading.READY:
            return None
        return tried.result[1:].decode(errors="replace") or f"ended by signal {tried.signal}"

    def _grade(self, payload: bytes, code: types.CodeType | None) -> _Ended:
        result_fd, result_end = os.pipe()
        output_fd, output_end = os.pipe()
        pid = os.fork()
        if not pid:
            grading.run(
                self._settings, code, payload, scratch=self._scratch, result_fd=result_end, output_fd=output_end
            )
        os.close(result_end)
        os.close(output_end)
        pid_fd = os.pidfd_open(pid)
        ended = _Ended(result=bytearray(), output=bytearray())
        try:
            self._watch(ended, result_fd, output_fd, pid_fd)
        finally:
            self._kill_all(pid)
            ended.signal = _signal_of(pid)
            for fd in (result_fd, output_fd, pid_fd):
                os.close(fd)
        return ended

    def _watch(self, ended: _Ended, result_fd: int, output_fd: int, pid_fd: int) -> None:
        """Until the process or its wall time ends. The trainer has nothing to say meanwhile but that it is gone."""
        poll = select.poll()
        for fd in (result_fd, output_fd, pid_fd, self._in):
            poll.register(fd, select.POLLIN)
            if fd in (result_fd, output_fd):
                os.set_blocking(fd, False)
        deadline = time.monotonic() + self._limits.wall_s
        running = True
        while running:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                ended.timed_out = True
                return
            ready = {fd for fd, _ in poll.poll(left_s * 1000 + 1)}
            if self._in in ready:
                return
            running = pid_fd not in ready
            if result_fd in ready and not _drain(result_fd, ended.result, keep_first=MAX_RESULT_BYTES + 2):
                poll.unregister(result_fd)
            if output_fd in ready and not _drain(output_fd, ended.output, keep_last=self._limits.output_bytes):
                poll.unregister(output_fd)

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


def _drain(fd: int, into: bytearray, *, keep_first: int | None = None, keep_last: int | None = None) -> bool:
    """Read what is there. False at the end of the file."""
    try:
        data = os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return True
    into += data
    if keep_first is not None:
        del into[keep_first:]
    if keep_last is not None:
        del into[:-keep_last]
    return bool(data)


def _move_away(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_CONTROL_FD)
