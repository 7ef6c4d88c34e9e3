"""What one grading may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The hosted service's limits, and ours where it names none."""

    wall_s: float = 120.0
    cpu_s: int = 240
    """Of all threads together: two cores for the whole wall time."""
    memory_bytes: int = 2 << 30
    """Address space, what the libraries map included; the scratch folder counts apart."""
    scratch_bytes: int = 1 << 30
    """Of all files together, and of one."""
    scratch_inodes: int = 16_384
    threads: int = 64
    open_files: int = 256
    output_bytes: int = 4_000
    """How much of the end of what it printed is kept."""
    start_s: float = 60.0
    """For a worker to come up, and to answer beyond a grading's wall time, on a busy machine."""
