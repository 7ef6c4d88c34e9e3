"""The run's scratch folder, and what a killed run leaves behind on the machine.

A process killed with SIGKILL can neither delete its scratch folder, which lies in memory, nor end vLLM's processes,
which then spin on. Both are found at the next start of any run: a folder whose lock nobody holds has lost its owner,
and it names the owner's children. The kernel gives the lock back however the owner ends; it is a POSIX lock, which
children do not inherit.

*Not covered:* children of a run in another container that shares this one's memory folder; their scratch is deleted
only when its lock is free, and process ids are compared together with start times.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
from pathlib import Path
from typing import IO, Self

import psutil

_PREFIX = "agent-rft-"
_LOCK = "owner.json"


class Scratch:
    """A folder for weights on their way to the engine; memory-backed where there is any. A context manager."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or _default_root()
        self.path = Path()
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        sweep(self._root)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._root))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        assert self._lock is not None
        self._lock.close()

    def note_children(self) -> None:
        """Write down the processes that this one has started."""
        assert self._lock is not None
        children = psutil.Process().children(recursive=True)
        # Into the locked file itself: opening it anew and closing it would give the lock back.
        self._lock.seek(0)
        json.dump([[child.pid, child.create_time()] for child in children], self._lock)
        self._lock.flush()


def sweep(root: Path) -> None:
    """Delete the scratch folders under `root` that have lost their owner, and end the processes that they name."""
    for folder in root.glob(f"{_PREFIX}*"):
        # Another run may be sweeping too, or the folder may belong to another user.
        with contextlib.suppress(OSError), (folder / _LOCK).open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = lock.read()
            for pid, create_time in json.loads(text) if text else []:
                _kill(pid, create_time)
            shutil.rmtree(folder)


def _kill(pid: int, create_time: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(pid)
        # The id may have been given to another process since.
        if abs(process.create_time() - create_time) < 1:
            process.kill()


def _default_root() -> Path:
    shared_memory = Path("/dev/shm")
    return shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())
