"""What is shown on a terminal, or kept in a log: no text of a model, a server, a row or a library acts on it.

One rule, for every script: `say` in place of `print`, `console()` for tables, `run` for what ends in a traceback. The
errors of `envs.errors` are clean by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from envs.secrets import hidden_in

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable
    from rich.segment import Segment

_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Sequences that begin with an escape, all other control characters, and those that turn the direction of writing,
break lines, take no room or are half of a character. Tab, newline and what joins letters stay."""


def clean(text: str) -> str:
    """What may be shown and kept of a text of a model, a server or a library: neither secrets nor control characters.

    Tab and newline stay.
    """
    return hidden_in(without_control(text))


def without_control(text: str) -> str:
    return _CONTROL.sub("", text)


def shown_json(value: Any, **options: Any) -> str:
    """JSON to be read: letters as they are, and escapes where there are control characters."""
    text = json.dumps(value, ensure_ascii=False, **options)
    return text if without_control(text) == text else json.dumps(value, **options)


def say(*texts: object, file: TextIO | None = None) -> None:
    """A clean line, at once."""
    print(*(clean(str(text)) for text in texts), file=file, flush=True)


def console() -> Console:
    """rich's, whose tables and texts are shown without control characters but rich's own, and without markup."""
    from rich.console import Console, RenderHook

    class Clean(RenderHook):
        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            return [_Cleaned(renderable) for renderable in renderables]

    made = Console(markup=False, emoji=False)
    made.push_render_hook(Clean())
    return made


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main`, or with 130 after Ctrl-C and what ends a program likewise.

    Where nobody reads what it prints any more (`| head`) it ends without a word, with 1 as rich ends it. What else it
    raises is told as Python tells it, but clean.
    """
    sys.excepthook = _tell
    end_on_signals()
    try:
        code = main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as e:
        if not was_interrupted(e):
            if not (isinstance(e, BrokenPipeError) and _reader_is_gone()):
                raise
            sys.exit(1)
        code = 130
        # A terminal that was closed takes no more words.
        with contextlib.suppress(OSError):
            say("interrupted", file=sys.stderr)
    if code == 130:
        # A second signal does not break off the interpreter's own clearing up.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """By SIGTERM or SIGHUP: the end of the program, also where a first Ctrl-C ends less than that."""


def end_on_signals() -> None:
    """From here on SIGTERM, and SIGHUP unless it is ignored as under nohup, end the program as Ctrl-C ends it.

    An engine's processes would otherwise outlive it and keep their memory, and half-written files would stay. A second
    such signal does not interrupt the clearing up; Ctrl-C does. Code that catches every exception, a user's grader say,
    does not keep the program: within an event loop the loop raises it again, elsewhere a second signal does.
    """

    def end(*_: object) -> None:
        if was_interrupted(sys.exception()):
            return
        # Programs that only read and print have no loop, nor its module.
        if (loops := sys.modules.get("asyncio")) is not None:
            # It lacks the function while it is being imported.
            with contextlib.suppress(RuntimeError, AttributeError):
                loops.get_running_loop().call_soon_threadsafe(end)
        raise Terminated

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that was closed at its other end; what it still holds then goes nowhere."""
    asked, stdout = select.poll(), sys.stdout.fileno()
    asked.register(stdout, select.POLLOUT)
    is_gone = any(event & select.POLLERR for _, event in asked.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return is_gone


def was_interrupted(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C's, or went wrong while that was dealt with, such as a loop that closes half-way."""
    told: BaseException | None = error
    while told is not None and not isinstance(told, KeyboardInterrupt):
        told = told.__context__
    return told is not None


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), file=sys.stderr)


class _Cleaned:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else segment._replace(text=without_control(segment.text))
