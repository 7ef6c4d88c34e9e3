"""The progress display, run as a person runs it: in a process of its own, on a terminal and on a pipe."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.runs.log_file import LogFile
from trainer.runs.progress import Progress, sparkline

_PRELUDE = """
import logging, os, subprocess, sys, time, warnings
from pathlib import Path
from envs.errors import UserError
from trainer.runs.progress import Progress
log = Path(sys.argv[1])
METRICS = {"train/reward": 0.25, "train/correct": 0.5, "train/tool_calls": 4.0, "train/completion_tokens": 180.0}
def noise():
    print("noise-print")
    logging.warning("noise-logging")
    warnings.warn("noise-warning")
    os.write(1, b"noise-fd\\n")
    subprocess.run(["sh", "-c", "echo noise-child; echo noise-child-err >&2"])
"""
_NOISES = ["noise-print", "noise-logging", "noise-warning", "noise-fd", "noise-child", "noise-child-err"]
_WORK = """
with Progress(log, 2) as progress:
    progress.phase("model")
    noise()
    for step in (1, 2):
        progress.phase("rollouts", total=4)
        for _ in range(4):
            progress.advance(1, tokens=50)
            time.sleep(0.1)
        progress.phase("training")
        progress.step_done(step, METRICS)
    progress.say("adapter exported")
    progress.warn("all groups tied")
print("after-out")
print("after-err", file=sys.stderr)
"""


def _run_on_pipes(tmp_path: Path, script: str) -> tuple[subprocess.CompletedProcess[str], str]:
    log = tmp_path / "logs" / "train.log"
    command = [sys.executable, "-c", _PRELUDE + script, str(log)]
    # Buffered, as Python is unless told otherwise: the order in the log must not hang on it.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    return done, log.read_text() if log.exists() else ""


def _run_on_terminal(tmp_path: Path, script: str) -> tuple[int, str]:
    """Exit code and every byte that the terminal received."""
    controller, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-c", _PRELUDE + script, str(tmp_path / "train.log")]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    received = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # Linux reports the end of a pseudo-terminal so.
            break
        if not chunk:
            break
        received += chunk
    os.close(controller)
    return process.wait(timeout=60), received.decode()


def _screen(received: str) -> list[str]:
    """What stands on the terminal in the end: the lines left by cursor-up, erase-line, return and newline."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", received):
        if token == "\n":
            row += 1
            lines.extend([""] * (row + 1 - len(lines)))
        elif token.endswith("A") and token.startswith("\x1b"):
            row = max(0, row - int(token[2:-1] or 1))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line for line in lines if line.strip()]


def test_without_a_terminal_each_finished_phase_and_step_leaves_one_plain_line(tmp_path: Path) -> None:
    done, _ = _run_on_pipes(tmp_path, _WORK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "after-out\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 6, lines
    assert lines[0].startswith("model: ")
    assert lines[1].startswith("step 1/2  reward 0.250  correct 50%  4.0 calls  180 tokens a rollout  ")
    assert re.search(r"\d+ tokens/s", lines[1])
    assert "left about" in lines[1]
    assert lines[3:] == ["adapter exported", "warning: all groups tied", "after-err"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stderr)


def test_without_a_terminal_a_long_phase_is_not_silent(tmp_path: Path) -> None:
    """The warm start of many minutes: how far it is, and that it goes on where nothing can be counted."""
    script = """
with Progress(log, 2, pulse_s=0.2) as progress:
    progress.phase("warm start", total=16)
    progress.advance(3, tokens=300)
    time.sleep(1.5)
    progress.phase("starting the engine")
    time.sleep(1.5)
"""
    done, _ = _run_on_pipes(tmp_path, script)
    lines = done.stderr.splitlines()
    assert any(re.fullmatch(r"warm start: 3/16, [\d,]+ tokens/s, \d+ s so far", line) for line in lines), lines
    assert any(re.fullmatch(r"starting the engine: \d+ s so far", line) for line in lines), lines


def test_the_output_of_libraries_and_child_processes_goes_to_the_log_and_not_to_the_terminal(tmp_path: Path) -> None:
    done, log = _run_on_pipes(tmp_path, _WORK)
    for noise in _NOISES:
        assert noise in log
    assert "noise" not in done.stdout + done.stderr
    assert "after-out" not in log


def test_the_log_tells_phases_and_steps_in_the_order_in_which_they_happened(tmp_path: Path) -> None:
    _, log = _run_on_pipes(tmp_path, _WORK)
    places = [log.index(t) for t in ("phase: model", "noise-print", "noise-fd", "noise-child", "phase: rollouts")]
    assert places == sorted(places)
    assert log.index("step 1/2") < log.index("step 2/2") < log.index("adapter exported")


def test_a_second_run_adds_to_the_log_of_the_first(tmp_path: Path) -> None:
    _run_on_pipes(tmp_path, "with Progress(log, 1): print('first run')")
    _, log = _run_on_pipes(tmp_path, "with Progress(log, 1): print('second run')")
    assert log == "first run\nsecond run\n"


def test_a_terminal_shows_a_live_display_and_is_left_clean(tmp_path: Path) -> None:
    code, received = _run_on_terminal(tmp_path, _WORK)
    assert code == 0
    assert "rollouts" in received
    assert "4/4" in received or "3/4" in received
    assert "time left: unknown before the first step" in received
    assert "step 2 of 2" in received
    assert "reward ▁" in received
    assert "noise" not in received
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l"), "the cursor is shown again"
    model, *rest = _screen(received)
    assert model.startswith("model: ")
    assert rest == ["adapter exported", "warning: all groups tied", "after-out", "after-err"]


def test_the_display_is_refreshed_while_the_main_thread_is_busy(tmp_path: Path) -> None:
    busy = """
with Progress(log, 1) as progress:
    progress.phase("training")
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        pass
"""
    _, received = _run_on_terminal(tmp_path, busy)
    assert {"elapsed 1 s", "elapsed 2 s"} <= set(re.findall(r"elapsed \d s", received))


_FAILS = """
try:
    with Progress(log, 2) as progress:
        progress.phase("engine start")
        print("the-cause-in-the-log")
        raise {error}
except BaseException as e:
    print(type(e).__name__, "passed on", flush=True)
    os.write(2, b"fd 2 is back\\n")
"""


def test_an_exception_restores_the_output_shows_the_end_of_the_log_and_passes_on(tmp_path: Path) -> None:
    done, _ = _run_on_pipes(tmp_path, _FAILS.format(error="RuntimeError('boom')"))
    assert done.stdout == "RuntimeError passed on\n"
    head, *_, last = done.stderr.splitlines()
    assert head == f"the last lines of {tmp_path / 'logs' / 'train.log'}:"
    assert "  the-cause-in-the-log" in done.stderr.splitlines()
    assert last == "fd 2 is back"


@pytest.mark.parametrize("error", ["UserError('wrong key')", "KeyboardInterrupt()"])
def test_after_a_users_error_or_interrupt_the_log_is_not_shown(tmp_path: Path, error: str) -> None:
    done, _ = _run_on_pipes(tmp_path, _FAILS.format(error=error))
    assert "passed on" in done.stdout
    assert done.stderr == "fd 2 is back\n"


@pytest.mark.parametrize("make", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_where_nobody_watches_any_more_the_work_goes_on(tmp_path: Path, make: Callable[[], tuple[int, int]]) -> None:
    watching, shown = make()
    os.close(watching)
    script = _PRELUDE + _WORK.replace('print("after-err", file=sys.stderr)', "")
    env = {**os.environ, "TERM": "xterm-256color"}
    command = [sys.executable, "-c", script, str(log := tmp_path / "train.log")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=shown, text=True, env=env)
    os.close(shown)
    assert (done.returncode, done.stdout) == (0, "after-out\n")
    assert "warning: all groups tied" in log.read_text()


def test_an_exception_on_a_terminal_ends_the_live_display(tmp_path: Path) -> None:
    _, received = _run_on_terminal(tmp_path, _FAILS.format(error="RuntimeError('boom')"))
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
    screen = _screen(received)
    assert "  the-cause-in-the-log" in screen
    assert screen[-2:] == ["RuntimeError passed on", "fd 2 is back"]
    assert not any("elapsed" in line for line in screen)


def test_a_child_that_outlives_the_display_still_writes_to_the_log(tmp_path: Path) -> None:
    script = """
with Progress(log, 1) as progress:
    child = subprocess.Popen(["sh", "-c", "cat; echo late"], stdin=subprocess.PIPE)
child.communicate(b"")
"""
    done, log = _run_on_pipes(tmp_path, script)
    assert "late" in log
    assert done.stdout == done.stderr == ""


def test_a_process_that_is_not_the_main_one_is_silent_but_its_output_is_logged(tmp_path: Path) -> None:
    done, log = _run_on_pipes(tmp_path, _WORK.replace("Progress(log, 2)", "Progress(log, 2, show=False)"))
    assert done.stdout == "after-out\n"
    assert done.stderr == "after-err\n"
    assert "noise-child" in log


def test_silent_progress_neither_shows_nor_redirects(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(None, 0, show=False) as progress:
        progress.phase("rollouts", total=2)
        progress.advance(1, tokens=5)
        progress.step_done(1, {"reward": 1.0})
        progress.say("nobody")
        progress.warn("hears")
        print("still here")
    assert capfd.readouterr() == ("still here\n", "")


def test_control_characters_in_a_line_do_not_reach_the_terminal(tmp_path: Path) -> None:
    script = r"""
with Progress(log, 1) as progress:
    progress.say("red \x1b[31mtext\x1b]0;title\x07 [bold]kept[/bold]\r\x08")
"""
    done, _ = _run_on_pipes(tmp_path, script)
    assert done.stderr == "red text [bold]kept[/bold]\n"


def test_time_left_is_unknown_before_the_first_step_and_then_follows_from_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.runs.progress.time.monotonic", lambda: now)
    with Progress(None, 10, first_step=4, show=False) as progress:
        progress.phase("publishing")
        now += 2
        progress.phase("evaluating before")
        now += 7
        assert progress.left_s() is None
        for step in (5, 6):
            progress.phase("rollouts")
            now += 20
            progress.step_done(step, {})
        assert progress.left_s() == 4 * 20 + 7
        now += 5
        assert progress.left_s() == 4 * 20 + 7 - 5
        for step in (7, 8, 9, 10):
            progress.step_done(step, {})
        progress.phase("evaluating after")
        now += 3
        assert progress.left_s() == 7 - 3


def test_the_tail_of_a_log_shows_of_a_progress_bar_what_it_showed_last(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"first\n 10%\r 50%\r100%\r\n\x1b[31mred\x1b[0m\n")
    assert LogFile(path).tail(5) == ["first", "100%", "red"]
    assert LogFile(tmp_path / "missing.log").tail(5) == []


def test_a_sparkline_has_one_mark_a_value_and_takes_a_constant() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"
    assert sparkline([1e308, 0.0, -1e308]) == "█▅▁"
