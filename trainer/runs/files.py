"""The files of a run folder, opened so that nobody who wrote one of them leads elsewhere, holds us up or fills memory.

A run folder may have come from someone else, may lie where others write, and may be torn by a kill or a full disk.

*Covered*: links, hard links, pipes and devices in a file's place; files of other users where a run is taken up; lines
and documents without end; damage to a rollout's line, which carries a digest of itself.
*Not covered*: folders above the run's that others may write to; what root does.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from envs.errors import UserError
from envs.reading.json_text import read_json, write_json

UNFINISHED = ".unfinished-"
MOST_DOCUMENT_BYTES = 64 * 2**20
"""A config and a run.json are read whole."""
MOST_LINE_BYTES = 256 * 2**20
"""A rollout is one line, with every tool output in it."""

_SEAL = re.compile(rb', "sha256": "([0-9a-f]{64})"\}\n')
_SEAL_BYTES = len(', "sha256": ""}\n') + 64
_CHUNK_BYTES = 2**20


# ---- opening


def open_to_read(path: Path, *, ours: bool = False) -> BinaryIO:
    """Raises `OSError` for whatever is not a plain file, and with `ours` for one that another user wrote."""
    return os.fdopen(_open(path, os.O_RDONLY, ours=ours), "rb")


def open_to_append(path: Path) -> int:
    """A file descriptor; the file is made where there is none. Raises `OSError` for a link of either kind."""
    return _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, alone=True)


def open_to_lock(path: Path) -> int:
    """A file descriptor for reading and writing, of a file that only its owner can open: to read is to lock it."""
    fd = _open(path, os.O_RDWR | os.O_CREAT, mode=0o600, alone=True, ours=True)
    with contextlib.suppress(OSError):  # file systems without modes
        os.fchmod(fd, 0o600)
    return fd


def _open(path: Path, flags: int, *, mode: int = 0o666, alone: bool = False, ours: bool = False) -> int:
    try:
        # A pipe would be waited for.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, which is not followed; expected a plain file", str(path)) from None
        raise
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        why = "is not a plain file"
    elif alone and about.st_nlink > 1:
        why = "is a hard link, and what it shares would be overwritten; put a copy in its place"
    elif ours and not is_ours(about.st_uid, path.parent):
        why = f"belongs to user {about.st_uid}; a run is taken up from files of one's own only"
    else:
        return fd
    os.close(fd)
    raise OSError(errno.EPERM, why, str(path))


def is_ours(uid: int, folder: Path) -> bool:
    """Whether a file or folder with this owner, in `folder`, can be nobody else's than ours or root's."""
    return uid in (os.geteuid(), 0) or uid == _uid_of_new_files(folder)


@functools.lru_cache(maxsize=64)
def _uid_of_new_files(folder: Path) -> int | None:
    """File systems that are shared may give all that is written to one user."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def refusal(e: OSError, path: Path) -> UserError:
    """What cannot be opened, as a mistake that names it."""
    return UserError(f"{e.filename or path}: {e.strerror or e}")


def check_place(path: Path, folders: Sequence[str]) -> None:
    """Raise `UserError` where the run folder `path`, or one of its `folders`, is no folder of our own."""
    where = f"output_dir {path}"
    try:
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode):
            if not is_ours(about.st_uid, path.parent):
                raise UserError(f"{where}: is a link that user {about.st_uid} made; choose another output_dir")
            about = path.stat()
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{where}: {e.strerror or e}") from e
    if not stat.S_ISDIR(about.st_mode):
        raise UserError(f"{where}: is a file; expected a folder")
    if not is_ours(about.st_uid, path):
        raise UserError(
            f"{where}: belongs to user {about.st_uid}, who could put anything into it; choose another output_dir, or "
            "make it yours (chown -R) if you know what it holds"
        )
    for name in folders:
        with contextlib.suppress(FileNotFoundError):
            about = (path / name).lstat()
            if not stat.S_ISDIR(about.st_mode):
                raise UserError(f"{path / name}: is a link or a file; expected a folder")
            if not is_ours(about.st_uid, path):
                raise UserError(f"{path / name}: belongs to user {about.st_uid}; delete it")


def names_in(folder: Path) -> set[str]:
    """Of a folder that may not exist. Raises `UserError`."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as e:
        raise refusal(e, folder) from e


# ---- reading


def read_document(path: Path, *, ours: bool = False) -> bytes:
    """The whole file. Raises `OSError`, also where it holds more than any document."""
    with open_to_read(path, ours=ours) as file:
        if len(data := file.read(MOST_DOCUMENT_BYTES + 1)) > MOST_DOCUMENT_BYTES:
            raise OSError(errno.EFBIG, f"holds more than {MOST_DOCUMENT_BYTES >> 20} MiB", str(path))
        return data


def lines_in(path: Path, *, ours: bool = False) -> Iterator[bytes]:
    """Line by line, each with its newline but for a last one that a kill cut off. Raises `OSError`.

    It ends behind a line that is longer than any of ours.
    """
    with open_to_read(path, ours=ours) as file:
        while line := file.readline(MOST_LINE_BYTES):
            yield line
            if not line.endswith(b"\n"):
                return


def object_in(text: bytes) -> dict[str, Any] | None:
    """The JSON object; None where the text is none."""
    try:
        value = read_json(text.decode("utf-8", errors="replace"), finite=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object of a run that is taken up; None where there is no such file. Raises `UserError` that names it."""
    try:
        value = object_in(read_document(path, ours=True))
    except FileNotFoundError:
        return None
    except OSError as e:
        raise refusal(e, path) from e
    if value is None:
        raise UserError(f"{path}: is damaged: holds no JSON object")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file that may not exist; a last line cut off by a kill is left out.

    Raises `UserError` that names file and line where one is no object, or the file another user's.
    """
    records = []
    try:
        for number, line in enumerate(lines_in(path, ours=True), start=1):
            if not line.endswith(b"\n"):
                break
            if (record := object_in(line)) is None:
                raise UserError(f"{path}, line {number}: is damaged: holds no JSON object")
            records.append(record)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise refusal(e, path) from e
    return records


# ---- writing


def write_atomically(path: Path, text: str | bytes) -> None:
    """The file has its old content or the new, whenever the process is killed. A link in its place is replaced.

    What has no UTF-8 (lone surrogates) is written as a question mark.
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    clear(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(fd, "wb") as file:
        file.write(text.encode("utf-8", errors="replace") if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path}: is a folder, where the run has to write a file; move it away")
    temporary.replace(path)


def append_line(path: Path, record: dict[str, Any]) -> None:
    append_text(path, write_json(record))


def append_text(path: Path, line: str) -> None:
    with os.fdopen(open_to_append(path), "ab") as file:
        file.write(f"{line}\n".encode())


def keep_beginning(path: Path, num_bytes: int) -> None:
    """Leave its first `num_bytes`; a file that is not there stays away."""
    try:
        with open_to_read(path, ours=True) as file:
            write_atomically(path, file.read(num_bytes))
    except FileNotFoundError:
        return


def clear(path: Path) -> None:
    """Delete what has this name in a run folder: a file, a folder, or a link, of which what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_unfinished(run: Path, folders: Sequence[str]) -> None:
    """Delete what a kill left half written in the run folder and in its `folders`."""
    for path in [path for folder in (run, *(run / name for name in folders)) for path in folder.glob(f"{UNFINISHED}*")]:
        clear(path)


# ---- lines of the steps


def step_files(folder: Path, step: int | None = None) -> list[Path]:
    """All processes' files of a step, or of every step."""
    which = r"\d{6,15}" if step is None else f"{step:06d}"
    return [
        path for path in folder.glob("step-*.jsonl") if re.fullmatch(rf"step-{which}(\.rank\d+)?\.jsonl", path.name)
    ]


def whole_lines(path: Path) -> Iterator[bytes]:
    """Lines of our own file that may not exist. Raises `UserError` that names it."""
    try:
        yield from lines_in(path, ours=True)
    except FileNotFoundError:
        return
    except OSError as e:
        raise refusal(e, path) from e


def drop_damaged(path: Path, *, intact: Callable[[bytes], bool]) -> int:
    """Leave the lines that are intact; how many complete ones were not."""
    lines = list(whole_lines(path))
    kept = [line for line in lines if intact(line)]
    # Lines will be appended: what else shares the file must not get them.
    if len(kept) < len(lines) or (path.exists() and path.stat().st_nlink > 1):
        write_atomically(path, b"".join(kept))
    return sum(line.endswith(b"\n") for line in lines) - len(kept)


# ---- digests


def sealed(record: dict[str, Any]) -> str:
    """The record as a JSON object whose last key is the digest of what stands before it."""
    text = write_json(record)
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text[:-1].encode()).hexdigest()}"}}'


def is_intact(line: bytes) -> bool | None:
    """Whether a complete line is as `sealed` wrote it; None where it has no digest, as in older versions."""
    if (seal := _SEAL.fullmatch(line[-_SEAL_BYTES:])) is None:
        return None
    return hashlib.sha256(line[:-_SEAL_BYTES]).hexdigest().encode() == seal[1]


def digest(path: Path, *, num_bytes: int | None = None, sync: bool = False) -> tuple[int, str]:
    """Length and SHA-256 of a file of ours, or of its first `num_bytes`; (0, that of nothing) where it is missing.

    With `sync` it is on the disk when this returns. Raises `OSError`.
    """
    sha, length = hashlib.sha256(), 0
    try:
        file = open_to_read(path, ours=True)
    except FileNotFoundError:
        return 0, sha.hexdigest()
    with file:
        while num_bytes is None or length < num_bytes:
            wanted = _CHUNK_BYTES if num_bytes is None else min(_CHUNK_BYTES, num_bytes - length)
            if not (chunk := file.read(wanted)):
                break
            sha.update(chunk)
            length += len(chunk)
        if sync:
            os.fsync(file.fileno())
    return length, sha.hexdigest()
