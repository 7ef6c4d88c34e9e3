"""A run on a terminal: one picture, or one after the other until the run has finished."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from envs.terminal import console
from trainer.reports.watch.screen import screen
from trainer.reports.watch.snapshot import RunWatch, Snapshot, State

_TICK_S = 0.25
"""A terminal that has another size shows it no later."""
_PRINTED_LINES = 200


def show_once(folder: Path) -> None:
    """Print what there is now. Raises `UserError` where there is no run."""
    _print(_console(), RunWatch(folder).look())


def show_on(folder: Path, *, every_s: float) -> bool:
    """Show the run until it has finished, and print the last picture then; False at once where there is no terminal.

    Raises `UserError` where there is no run, or none any more.
    """
    shown = _console()
    if not shown.is_terminal or shown.is_dumb_terminal:
        return False
    watch = RunWatch(folder)
    page = _Page(watch.look())
    with Live(
        page, console=shown, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    ) as live:
        next_look = time.monotonic() + every_s
        while page.snapshot.state is not State.FINISHED:
            time.sleep(_TICK_S)
            if time.monotonic() >= next_look:
                page.snapshot = watch.look()
                next_look = time.monotonic() + every_s
            live.refresh()
    _print(shown, page.snapshot)
    return True


class _Page:
    """The newest snapshot, as large as the terminal is when it is drawn."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = console.size
        lines = screen(self.snapshot, width=width, height=height, pictures=_draws(console))
        yield Text("\n").join(lines)


def _print(shown: Console, snapshot: Snapshot) -> None:
    height = shown.size.height if shown.is_terminal else _PRINTED_LINES
    for line in screen(snapshot, width=shown.size.width, height=height, pictures=_draws(shown)):
        shown.print(line, highlight=False)


def _console() -> Console:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return console()


def _draws(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
