"""The run's scratch folder, and what a killed run leaves behind on the machine.

A process killed with SIGKILL can neither delete its scratch folder, which lies in memory, nor end vLLM's processes,
which then spin on. Both are found at the next start of any run: a folder whose lock nobody holds has lost its owner,
and it names the owner's children. The kernel gives the lock back however the owner ends; it is a POSIX lock, which
children do not inherit.

Anyone may write where temporary folders lie. A folder is a run's of ours only if it is no link, belongs to this user
and nobody else may write in it; what it says is not believed beyond that: it can end no process but one of the same id
and start time.

*Not covered:* children of a run in another container that shares this one's memory folder; their scratch is deleted
only when its lock is free, and process ids are compared together with start times.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Self

import psutil
from pydantic import TypeAdapter, ValidationError

from envs.errors import UserError

_PREFIX = "agent-rft-"
_LOCK = "owner.json"
_CHILDREN = TypeAdapter(list[tuple[int, float]])
_MOST_BYTES = 2**20
_MOST_WAIT_S = 30.0
_MIB = 2**20


class Scratch:
    """A folder for weights on their way to the engine; memory-backed where that has room. A context manager.

    `need_bytes` is what will lie in it, by all processes of this machine that have one. Raises `UserError` where no
    folder has so much room. *Not covered:* what others write meanwhile; quotas.
    """

    def __init__(self, root: Path | None = None, *, need_bytes: int = 0) -> None:
        self._root = root
        self._need_bytes = need_bytes
        self.path = Path()
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        roots = [self._root] if self._root else default_roots()
        for root in roots:
            sweep(root)
        root = roomy(roots, self._need_bytes)
        while self._lock is None:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            lock = (self.path / _LOCK).open("x")
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():
                self._lock = lock
            else:
                # Another run's sweep took it for a lost one before it was locked.
                lock.close()
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


def sweep_default_roots() -> None:
    """`sweep` where scratch folders may lie: before a model is loaded beside the engine of a run that was killed."""
    for root in default_roots():
        sweep(root)


def sweep(root: Path) -> None:
    """Delete the scratch folders under `root` that have lost their owner, and end the processes that they name.

    They are gone, with their memory, when it returns.
    """
    for folder in root.glob(f"{_PREFIX}*"):
        # Another run may be sweeping too.
        with contextlib.suppress(OSError), _opened(folder) as fd:
            about = os.fstat(fd)
            if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                continue
            # By way of the open folder: another could be put in its place meanwhile.
            lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
            with os.fdopen(lock, "r+b", buffering=0) as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for pid, create_time in _children_in(file.read(_MOST_BYTES)):
                    _kill(pid, create_time)
                shutil.rmtree(folder)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _children_in(text: bytes | None) -> list[tuple[int, float]]:
    """Process ids with their start times; none of a file that a full disk tore."""
    try:
        read = _CHILDREN.validate_json(text or b"[]")
    except ValidationError:
        return []
    return [(pid, start) for pid, start in read if 1 < pid < 2**31]


def _kill(pid: int, create_time: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(pid)
        # The id may have been given to another process since.
        if abs(process.create_time() - create_time) < 1:
            process.kill()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(_MOST_WAIT_S)


def default_roots() -> list[Path]:
    """Where scratch may lie, the best first: shared memory, the temporary folder (TMPDIR)."""
    roots = [Path("/dev/shm")]
    with contextlib.suppress(FileNotFoundError):
        roots.append(Path(tempfile.gettempdir()))
    return [root for root in roots if root.is_dir() and os.access(root, os.W_OK | os.X_OK)]


def roomy(roots: Sequence[Path], need_bytes: int) -> Path:
    """The first of `roots` with so much free space. Raises `UserError` that names each with what it has."""
    free = {root: shutil.disk_usage(root).free for root in roots}
    for root, free_bytes in free.items():
        if free_bytes >= need_bytes:
            return root
    has = " and ".join(f"{root} has {free_bytes / _MIB:,.0f} MiB free" for root, free_bytes in free.items())
    raise UserError(
        f"no room for the weights on their way to the engine: they take {math.ceil(need_bytes / _MIB):,} MiB, but "
        f"{has or 'there is no temporary folder that can be written'}; make room (a container's /dev/shm: docker run "
        "--shm-size), or name a folder that has it in TMPDIR"
    )
