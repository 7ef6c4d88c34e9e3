"""Lines that a run appends to a file, each read once, while it goes on writing."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.runs.files import open_to_read

_MOST_BYTES = 64 * 2**20
"""Of a file that was there before, its end alone is read."""


class Tail:
    """The complete lines of a file, from where the last call ended; a last one without its end waits for it.

    A file that was put in its place, or has become shorter (a run that goes on cuts its files back), is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begins_late = False
        """What stood before the end that was read is not known."""
        self._file: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> tuple[list[bytes], bool]:
        """The new lines, and whether they begin the file anew. Raises `OSError`; a file that is missing is empty."""
        try:
            file = open_to_read(self.path)
        except FileNotFoundError:
            is_anew, self._file, self._offset = self._file is not None, None, 0
            return [], is_anew
        with file:
            about = os.fstat(file.fileno())
            this = (about.st_dev, about.st_ino)
            is_anew = this != self._file or about.st_size < self._offset
            if is_anew:
                self._file, self._offset = this, max(0, about.st_size - _MOST_BYTES)
                self.begins_late = self._offset > 0
            file.seek(self._offset)
            text = file.read(about.st_size - self._offset)
        end = text.rfind(b"\n") + 1
        self._offset += end
        lines = [line + b"\n" for line in text[:end].split(b"\n")[:-1]]
        return (lines[1:] if is_anew and self.begins_late else lines), is_anew
