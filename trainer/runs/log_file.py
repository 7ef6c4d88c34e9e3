"""Everything that a process and its children print, sent to a file: a run's log."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from envs.secrets import hidden_in
from envs.terminal import clean
from trainer.runs.files import open_to_append, open_to_read


class LogFile:
    """Leads the file descriptors 1 and 2 to a file, between `open` and `close`.

    Covered: `print`, logging, warnings, native code, and the child processes started in between; what this process logs
    holds no secrets (see `envs.secrets`). *Not covered:* processes started before, or that open the terminal
    themselves; secrets in what is printed without logging, or by child processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._saved_fds: dict[int, int] = {}
        self._was_line_buffered = False
        self._make_record: Callable[..., logging.LogRecord] | None = None

    def open(self) -> None:
        """Raises `OSError` where the file cannot be written; nothing is redirected then."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Append mode: a resumed run and the other processes of `accelerate launch` write to the same file.
        self._fd = open_to_append(self.path)
        _flush_standard_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Into a file Python writes blocks: prints would land in the log long after the lines of child processes.
            self._was_line_buffered = sys.stdout.line_buffering
            sys.stdout.reconfigure(line_buffering=True)
        for fd in (1, 2):
            self._saved_fds[fd] = os.dup(fd)
            os.dup2(self._fd, fd)
        make_record = self._make_record = logging.getLogRecordFactory()
        logging.setLogRecordFactory(lambda *args, **kwargs: _without_secrets(make_record(*args, **kwargs)))

    def close(self) -> None:
        """Leads the descriptors back where they were. Harmless when called twice."""
        _flush_standard_streams()
        if self._make_record is not None:
            logging.setLogRecordFactory(self._make_record)
            self._make_record = None
        if self._saved_fds and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=self._was_line_buffered)
        while self._saved_fds:
            fd, saved = self._saved_fds.popitem()
            os.dup2(saved, fd)
            os.close(saved)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def note(self, text: str) -> None:
        """A line of our own, so that library lines can be told apart by phase and step."""
        if self._fd is not None:
            _flush_standard_streams()
            os.write(self._fd, f"[{time.strftime('%H:%M:%S')} progress] {clean(text)}\n".encode())

    def tail(self, num_lines: int) -> list[str]:
        """The last lines, of a rewritten line (a progress bar) what it showed last."""
        _flush_standard_streams()
        with suppress(OSError), open_to_read(self.path) as log:
            log.seek(max(0, self.path.stat().st_size - 16_384))
            lines = log.read().decode(errors="replace").strip().split("\n")
            return [clean(line.rstrip("\r").rsplit("\r", 1)[-1]) for line in lines[-num_lines:]]
        return []


def _without_secrets(record: logging.LogRecord) -> logging.LogRecord:
    # Arguments that do not fit the message are told by logging itself, later.
    with suppress(TypeError, ValueError, KeyError):
        record.msg, record.args = hidden_in(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = hidden_in(logging.Formatter().formatException(record.exc_info))
    return record


def _flush_standard_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
