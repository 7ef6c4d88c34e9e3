"""Whatever can be read of a run folder, for people; what can't be is named.

A run may be young, interrupted or damaged, of an older version, or still at work: every piece is optional. Each process
of a run writes a file of its own, and all of them are read.

*Covered*: lines cut off by a kill, damaged ones (by their digest), missing files, links and pipes in a file's place.
*Not covered*: rollouts that were deleted together with their lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainer.run_files import is_intact, lines_in, object_in, read_document, step_files

METRICS = "metrics.jsonl"
_UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    RecursionError,
)
T = TypeVar("T")


def read_text(path: Path, notes: list[str]) -> str:
    """The whole file; empty where it can't be read, which `notes` then says."""
    try:
        return read_document(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except OSError as e:
        notes.append(f"{path.name}: {e.strerror or e}")
    return ""


def records_in(path: Path, notes: list[str], of: Callable[[dict[str, Any]], T], *, what: str) -> Iterator[T]:
    """What `of` makes of each line's object, line by line: files of rollouts are large.

    A line that holds no object, is not as it was written, or of which `of` makes nothing but an error is passed over;
    `notes` then says so, and that it holds no `what` ("rollout").
    """
    name = path.name if path.name == METRICS else f"{path.parent.name}/{path.name}"
    unreadable, is_cut = [], False
    try:
        for number, line in enumerate(lines_in(path), start=1):
            if not line.strip():
                continue
            try:
                record = object_in(line) if is_intact(line) is not False else None
                if record is None:
                    raise ValueError("no object, or a damaged one")
                value = of(record)
            except _UNREADABLE:
                unreadable.append(number)
                is_cut = not line.endswith(b"\n")
                continue
            yield value
    except FileNotFoundError:
        notes.append(f"{name} is missing")
    except OSError as e:
        notes.append(f"{name}: {e.strerror or e}")
    if is_cut:
        notes.append(f"{name}, line {unreadable.pop()}: cut off, passed over")
    if unreadable:
        others = f" ({len(unreadable)} such lines)" if len(unreadable) > 1 else ""
        notes.append(f"{name}, line {unreadable[0]}: not a {what} of this project, passed over{others}")


def records_of_step(
    folder: Path, step: int, notes: list[str], of: Callable[[dict[str, Any]], T], *, what: str
) -> Iterator[T]:
    """`records_in` the files of all processes; `notes` says so where there is none."""
    files = sorted(step_files(folder, step), key=_rank)
    for path in files or [folder / f"step-{step:06d}.jsonl"]:
        yield from records_in(path, notes, of, what=what)


def steps_in(folder: Path) -> list[int]:
    """The steps that there are files of, in their order."""
    return sorted({int(path.name[5:].partition(".")[0]) for path in step_files(folder)})


def _rank(path: Path) -> int:
    found = re.search(r"\.rank(\d+)\.", path.name)
    return int(found[1]) if found else 0
