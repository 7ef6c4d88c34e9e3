"""Frames between the trainer and a worker: four bytes of length, then that many of JSON. Nothing is ever unpickled."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

MAX_RESULT_BYTES = 16_384
"""Of what a grading writes as its result; more is no result."""
MAX_REPLY_BYTES = 262_144
"""Of what a worker answers; more is a fault of the sandbox."""
HEADER = struct.Struct("!I")
SOURCE_NAME = "<grader>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that a worker is told when it starts."""

    isolation: str
    """A value of `isolation.Isolation`."""
    source: str
    imports: list[str]
    """Modules that the source imports; loaded once, before any grading."""
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


def write_all(fd: int, data: bytes) -> None:
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
