"""What a person sees while a run works: phase, step, reward, tokens/s, time left. The libraries' output goes to a log.

On a terminal this is one live display of a few lines; elsewhere (CI, a file) one plain line per finished phase or step,
and one every half minute in which there was none.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from envs.errors import UserError
from envs.terminal import clean
from trainer.measures.catalogue import CATALOGUE
from trainer.runs.log_file import LogFile
from trainer.types import Phase

STEP_PHASES = frozenset({Phase.ROLLOUTS, Phase.TRAINING, Phase.PUBLISHING})
"""Phases that every step repeats: they leave no line of their own, the step leaves one."""
_RECENT_STEPS = 5
"""Time left is estimated from so many of the last steps: episodes get shorter as the policy learns."""
_TAIL_LINES = 15
_PULSE_S = 30.0
"""The longest silence where there is no live display."""
_BARS = "▁▂▃▄▅▆▇█"


class _Unheeded(io.TextIOWrapper):
    """Where nobody reads any more, behind a pipe or on a terminal that was closed, the run goes on all the same."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Progress:
    """Context manager: the display on the terminal (standard error), everything else that is printed in the log.

    On leaving, the output leads back to where it led, whatever happened. After an exception that is no `UserError` the
    end of the log is shown; the exception itself passes on. Single use, not nested. *Not covered:* SIGKILL, after
    which a terminal may lack its cursor (`tput cnorm`); what `LogFile` does not cover.
    """

    def __init__(
        self,
        log_path: Path | None,
        total_steps: int,
        *,
        first_step: int = 0,
        show: bool = True,
        pulse_s: float = _PULSE_S,
    ) -> None:
        """`first_step`: steps already done, in a resumed run. `log_path` None: nothing is redirected.

        `show` False displays nothing: for all but the main process of `accelerate launch`. Without a terminal no
        silence is longer than `pulse_s` seconds.
        """
        self._log = LogFile(log_path) if log_path else None
        self._total_steps = total_steps
        self._last_step = first_step
        self._show = show
        self._start = self._phase_start = time.monotonic()
        self._phase = ""
        self._phase_total: int | None = None
        self._phase_done = self._phase_tokens = 0
        self._rollouts_speed = ""
        self._step_start: float | None = None
        self._evaluation_s = 0.0
        self._step_times_s: list[float] = []
        self._rewards: list[float] = []
        self._metrics: Mapping[str, float] = {}
        self._stream: io.TextIOWrapper | None = None
        self._live: Live | None = None
        self._pulse_s = pulse_s
        self._is_over = threading.Event()
        self._pulse: threading.Thread | None = None
        self._last_line = time.monotonic()
        self._spinner = Spinner("dots")

    def __enter__(self) -> Progress:
        self._start = self._phase_start = time.monotonic()
        if self._show:
            self._open_display()
        if self._log:
            try:
                self._log.open()
            except OSError as e:
                raise UserError(f"{self._log.path}: can't be written: {e.strerror or e}") from e
        if self._live:
            self._live.start()
        elif self._stream:
            self._last_line = time.monotonic()
            self._pulse = threading.Thread(target=self._keep_talking, name="progress", daemon=True)
            self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self._pulse:
                self._is_over.set()
                self._pulse.join()
            if kind is None:
                self._finish_phase()
            if self._live:
                self._live.stop()
            if self._log and kind and not issubclass(kind, UserError | KeyboardInterrupt | SystemExit):
                self._line(f"the last lines of {self._log.path}:", style="bold")
                for line in self._log.tail(_TAIL_LINES):
                    self._line(f"  {line}", style="dim")
        finally:
            if self._log:
                self._log.close()
            if self._stream:
                self._stream.close()
            self._stream = self._live = None

    @property
    def current_phase(self) -> str:
        """Empty between two."""
        return self._phase

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase, which ends the one before it. `total`: how many `advance(1)` are to come, where known."""
        self._finish_phase()
        self._phase_total, self._phase_done, self._phase_tokens = total, 0, 0
        self._phase, self._phase_start = name, time.monotonic()
        # Weights are published before the first step too, and then evaluated: that is no part of it.
        if name == Phase.ROLLOUTS and self._step_start is None:
            self._step_start = self._phase_start
        self._note(f"phase: {name}")

    def advance(self, n: int = 1, *, tokens: int = 0) -> None:
        """`n` more units of the phase are done, in which `tokens` tokens were generated or trained on."""
        self._phase_done += n
        self._phase_tokens += tokens

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (the first is 1) is finished. Reads `reward`, `correct`, … with or without `train/` before."""
        self._finish_phase()
        now = time.monotonic()
        step_s = now - (self._start if self._step_start is None else self._step_start)
        self._step_times_s.append(step_s)
        self._step_start, self._last_step = now, step
        self._metrics = {k.removeprefix("train/"): v for k, v in metrics.items()}
        if math.isfinite(reward := self._metrics.get("reward", math.nan)):
            self._rewards.append(reward)
        parts = [f"step {step}/{self._total_steps}", _figures(self._metrics), self._rollouts_speed, clock(step_s)]
        line = "  ".join(filter(None, parts))
        self._note(line)
        if not self._live:
            self._line(f"{line}  left about {clock(self.left_s())}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._note(text)
        self._line(text)

    def warn(self, text: str) -> None:
        """A line that stays and is marked as a warning."""
        self._note(f"warning: {text}")
        self._line(f"warning: {text}", style="yellow")

    def left_s(self) -> float | None:
        """Seconds to the end, from the last steps and the evaluation before training; None before the first step."""
        recent = self._step_times_s[-_RECENT_STEPS:]
        if not recent or self._step_start is None:
            return None
        mean_s = sum(recent) / len(recent)
        into_step_s = min(time.monotonic() - self._step_start, mean_s)
        steps_left = max(0, self._total_steps - self._last_step)
        if not steps_left:
            into_phase_s = time.monotonic() - self._phase_start if self._phase == "evaluating after" else 0.0
            return max(0.0, self._evaluation_s - into_phase_s)
        return max(0.0, steps_left * mean_s - into_step_s) + self._evaluation_s

    def _open_display(self) -> None:
        fd = os.dup(2)
        live = os.isatty(fd) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        self._stream = _Unheeded(os.fdopen(fd, "wb"), encoding=encoding, errors="replace", line_buffering=True)
        if live:
            # rich would otherwise put proxies in place of sys.stdout and sys.stderr, and print the log on the terminal.
            self._live = Live(
                get_renderable=self._render,
                console=Console(file=self._stream, force_terminal=True, highlight=False, markup=False, emoji=False),
                refresh_per_second=8,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def _finish_phase(self) -> None:
        phase_s = time.monotonic() - self._phase_start
        if self._phase == Phase.EVALUATING_BEFORE:
            self._evaluation_s = phase_s
        if self._phase == Phase.ROLLOUTS:
            self._rollouts_speed = self._speed()
        elif self._phase and self._phase not in STEP_PHASES:
            self._line(", ".join(filter(None, [f"{self._phase}: {clock(phase_s)}", self._speed()])), style="green")
        self._phase, self._phase_start = "", time.monotonic()
        self._phase_total, self._phase_done, self._phase_tokens = None, 0, 0

    def _keep_talking(self) -> None:
        """How far the phase is, wherever nothing else was said for a while."""
        wait_s = self._pulse_s
        while not self._is_over.wait(wait_s):
            silent_s = time.monotonic() - self._last_line
            wait_s = self._pulse_s if silent_s >= self._pulse_s else self._pulse_s - silent_s
            if silent_s >= self._pulse_s and (phase := self._phase):
                done = f"{self._phase_done}/{self._phase_total}" if self._phase_total else ""
                so_far = f"{clock(time.monotonic() - self._phase_start)} so far"
                self._line(f"{phase}: " + ", ".join(filter(None, [done, self._speed(), so_far])), style="dim")

    def _line(self, text: str, *, style: str = "") -> None:
        self._last_line = time.monotonic()
        if self._live:
            self._live.console.print(Text(clean(text), style=style))
        elif self._stream:
            # Not through rich: it would fold the line at the width it believes the file to have.
            print(clean(text), file=self._stream, flush=True)

    def _note(self, text: str) -> None:
        if self._log:
            self._log.note(text)

    def _speed(self) -> str:
        seconds = time.monotonic() - self._phase_start
        return f"{self._phase_tokens / seconds:,.0f} tokens/s" if self._phase_tokens and seconds > 0 else ""

    def _render(self) -> Group:
        now = time.monotonic()
        total, bar = "", None
        if self._phase_total:
            total = f"{self._phase_done}/{self._phase_total}"
            bar = ProgressBar(total=self._phase_total, completed=self._phase_done, width=24)
        head = Table.grid(padding=(0, 2))
        phase = Text(self._phase or "working", style="bold")
        cells: list[RenderableType | None] = [self._spinner, phase, bar, total, self._speed()]
        head.add_row(*[c for c in cells if c], clock(now - self._phase_start))
        left = (
            f"left about {clock(self.left_s())}" if self._step_times_s else "time left: unknown before the first step"
        )
        log = f" · log: {self._log.path}" if self._log else ""
        foot = Text(f"elapsed {clock(now - self._start)} · {left}{log}", style="dim")
        return Group(head, *self._step_lines(), foot)

    def _step_lines(self) -> list[Text]:
        if self._total_steps <= 0:
            return []
        step = f"step {min(self._last_step + 1, self._total_steps)} of {self._total_steps}"
        if not self._step_times_s:
            return [Text(step)]
        lines = [Text(f"{step} · last: {_figures(self._metrics)}")]
        if self._rewards and self._stream and self._stream.encoding.lower().startswith("utf"):
            change = self._rewards[-1] - self._rewards[0]
            lines.append(Text(f"reward {sparkline(self._rewards[-32:])} {change:+.3f} since the first step"))
        return lines


def sparkline(values: list[float]) -> str:
    """One block character a value, from the lowest to the highest."""
    # Of halves: the largest floats lie further apart than a float reaches.
    low, span = min(values) / 2, max(values) / 2 - min(values) / 2
    return "".join(_BARS[round((v / 2 - low) / span * (len(_BARS) - 1)) if span else 0] for v in values)


def _figures(metrics: Mapping[str, float]) -> str:
    shown = [m.on_screen.format(metrics[m.key]) for m in CATALOGUE if m.on_screen and m.key in metrics]
    return "  ".join(shown) or "no rollout was graded"


def clock(seconds: float | None) -> str:
    """12 s, 3:04 or 1:02:03."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
