"""A program in a real terminal, tmux's: what stands on its screen, what is typed, and how large it is."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.support import ROOT

MOST_S = 120.0


def installed() -> bool:
    return shutil.which("tmux") is not None


@dataclass(frozen=True, slots=True)
class Terminal:
    """One window on a server of its own."""

    server: str

    def tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self.server, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p", "-t", "main")

    def keys(self, *keys: str) -> None:
        """`Enter`, `C-c`, or text."""
        self.tmux("send-keys", "-t", "main", *keys)

    def resize(self, width: int, height: int) -> None:
        self.tmux("resize-window", "-t", "main", "-x", str(width), "-y", str(height))

    def wait(self, is_shown: Callable[[str], object], *, timeout_s: float = MOST_S) -> str:
        """The first screen that is as wanted."""
        end = time.monotonic() + timeout_s
        while not is_shown(screen := self.screen()):
            assert time.monotonic() < end, f"not within {timeout_s:g} s:\n{screen}"
            time.sleep(0.1)
        return screen


@contextlib.contextmanager
def terminal(
    command: Sequence[str], *, width: int = 80, height: int = 24, environment: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """The window stays when the program has ended, with its exit status as `ended: N`."""
    made = Terminal(f"agent-rft-{uuid.uuid4().hex[:8]}")
    given = [f"{name}={value}" for name, value in (environment or {}).items()]
    # Ctrl-C is for the program, and not the end of the shell that tells how it ended.
    shell = f"trap : INT; {shlex.join(['env', *given, *command])}; echo ended: $?; sleep {MOST_S:.0f}"
    size = ["-x", str(width), "-y", str(height)]
    # A server that is started by this one inherits its environment, but for where the shell's own files lie.
    subprocess.run(
        ["tmux", "-L", made.server, "-f", "/dev/null", "new-session", "-d", "-s", "main", *size, "sh", "-c", shell],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"},
        check=True,
        timeout=60,
    )
    try:
        yield made
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            made.tmux("kill-server")
