"""One run at a time in a run folder.

The kernel gives the lock back however its holder ends. It is a POSIX lock: it works between machines on NFS (version 4)
and Lustre, and children do not inherit it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import struct
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from envs.errors import UserError
from envs.terminal import clean
from trainer.runs.files import open_to_lock, open_to_read

LOCK_NAME = "run.lock"
_MOST_BYTES = 1000
_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux: type, whence, start, length, process."""


class RunLock:
    """A context manager: while any process of a run is in it, no process of another gets in.

    The run's main process enters first and keeps other runs out, its other processes enter after it (`is_main` False).
    Raises `UserError` that names the holder; what another run has in its folder is then untouched. Other users can't
    hold it: who may read the file may lock it, so that its owner alone may.
    *Not covered:* a second run in the same process; a folder that is deleted or renamed while it is held; file systems
    that lock within one machine only.
    """

    def __init__(self, folder: Path, *, is_main: bool = True) -> None:
        self._folder = folder
        self._is_main = is_main
        self._fd: int | None = None

    def __enter__(self) -> Self:
        try:
            if self._is_main:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._fd = open_to_lock(self._folder / LOCK_NAME)
            if self._is_main:
                # Alone for a moment, which fails while another run has it; then shared with the run's other processes.
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._note_holder()
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            holder = self._holder()
            self._close()
            if e.errno in (errno.EACCES, errno.EAGAIN) and holder is not None:
                raise UserError(
                    f"output_dir {self._folder}: is in use by {holder}; let it end, or choose another output_dir"
                ) from e
            which = f"{LOCK_NAME} " if str(e.filename).endswith(LOCK_NAME) else ""
            raise UserError(f"output_dir {self._folder}: can't be written and locked: {which}{e.strerror or e}") from e
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _note_holder(self) -> None:
        assert self._fd is not None
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.truncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}).encode(), 0)

    def _holder(self) -> str | None:
        """Who holds the open file, in words; None where it could not be opened."""
        if self._fd is None:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            # Through the open file: to open and close it once more would give this process's own locks back.
            about = json.loads(os.pread(self._fd, _MOST_BYTES, 0))
            return clean(f"process {about['pid']} on {about['host']}, since {about['since']}")
        return "another run, which does not say who it is"


def is_held(folder: Path) -> bool | None:
    """Whether a run has the folder, which is asked of the kernel and changes nothing; None where that can't be known.

    Of a folder that a run on another machine has taken up, only a lock that is seen is believed: it may be a copy, or
    lie on a file system that does not tell. *Not covered:* this process's own lock, which it does not see and would
    lose by asking.
    """
    try:
        with open_to_read(folder / LOCK_NAME) as file:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                return True
            about = json.loads(file.read(_MOST_BYTES) or b"{}")
            return False if about.get("host", platform.node()) == platform.node() else None
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError):
        return None
