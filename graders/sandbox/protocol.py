"""What trainer and worker tell each other, in frames: four bytes of length, then that many more.

Nothing is ever unpickled. What a worker is told, and whether it could start, is JSON. What it answers to a grading's
frame is `REPLY`, what the grading wrote as its result, and the end of what it printed: bytes that the worker passes on
and never looks into.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

MAX_RESULT_BYTES = 16_384
"""What a grading may write as its result; more is no result."""
MAX_REPLY_BYTES = 262_144
"""What a worker may answer; more is a fault of the sandbox."""
HEADER = struct.Struct("!I")
REPLY = struct.Struct("!?BI")
"""Whether the grading ran out of time, the signal that ended it (0: none), how many bytes of result follow."""
READY = b"R"
"""What a grading writes as soon as it has given up its rights, a mark of `MARK_BYTES` after it; the same mark stands
before the result. Who writes to the result's descriptor before `grade` is done does not know it."""
FAILED = b"E"
"""What it writes instead where it could not give them up, why after it."""
MARK_BYTES = 16
SOURCE_NAME = "<grader>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one grading may use: the hosted service's limits, and ours where it names none."""

    wall_s: float = 120.0
    cpu_s: int = 240
    """For all threads together: two cores for the whole wall time."""
    memory_bytes: int = 2 << 30
    """Address space, what the libraries map included; the scratch folder counts apart."""
    scratch_bytes: int = 1 << 30
    """For all files together, and for one."""
    scratch_inodes: int = 16_384
    threads: int = 64
    open_files: int = 256
    output_bytes: int = 4_000
    """How much of the end of what it printed is kept."""
    start_s: float = 60.0
    """For a worker to come up, and to answer beyond a grading's wall time, on a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """All that a worker is told when it starts."""

    isolation: str
    """A value of `isolation.Isolation`."""
    source: str
    imports: list[tuple[str, list[str]]]
    """Modules that each grading would import, and the names it would take from them: loaded once, before any."""
    sys_path: list[str]
    binds: list[list[str]]
    """Folders and files that gradings may read: where it is, where they see it."""
    links: list[list[str]]
    """Symbolic links beside them: where it points, its path."""
    devices: list[str]
    nobody: bool
    """Gradings run as the user 65534: the trainer is root."""
    threads: bool
    parent: int
    """Process id of the trainer."""
    limits: dict[str, Any]


def frame(payload: bytes) -> bytes:
    return HEADER.pack(len(payload)) + payload


def read_frame(fd: int) -> bytes | None:
    """The next frame; None where the other side is gone."""
    header = _read_exactly(fd, HEADER.size)
    return None if header is None else _read_exactly(fd, HEADER.unpack(header)[0])


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read_exactly(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)
