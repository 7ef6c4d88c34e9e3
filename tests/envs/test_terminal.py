"""What scripts show on a terminal: no text of others acts on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from envs.errors import PublishError, ToolError, UserError, WorldError
from envs.terminal import clean, console, end_on_signals, run, say
from tests.support import ROOT

EVIL = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\x08\r\u202eb\ud800c"


def is_harmless(text: str) -> bool:
    return all(char.isprintable() or char in "\n\t" for char in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, "ared2Jbc"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq\x1b\\", "Pq\\"),
        ("\x1b[" + "0" * 100_000, "[" + "0" * 100_000),
        ("a\u200eb\u2028c\u200bd\U000e0041 \u200d", "abcd \u200d"),
        ("tab\tand\nline, größer 雪 שלום", "tab\tand\nline, größer 雪 שלום"),
        ("key sk-abcdefghijklmnop1234", "key ${SECRET}"),
    ],
)
def test_what_is_shown_holds_no_control_characters(text: str, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize("kind", [UserError, WorldError, PublishError])
def test_errors_are_clean_by_themselves_and_what_a_model_reads_is_untouched(kind: type[Exception]) -> None:
    assert is_harmless(str(kind(EVIL)))
    assert str(ToolError(EVIL)) == EVIL


def test_an_error_is_cut_where_nobody_reads_on_and_not_within_a_secret() -> None:
    error = WorldError("the server said: " + "x " * 4_990 + "https://me:pa55word@" + "y" * 16_000_000)
    assert len(str(error)) < 11_000 and str(error).endswith("more characters]")
    assert "pa55" not in str(error) and "https" not in str(error)
    assert str(WorldError("a " * 5_000)) == "a " * 5_000


def test_a_line_and_a_table_are_shown_clean(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("[bold]head[/bold]", EVIL)
    table.add_row(Text(EVIL), "[/no markup]")
    say(EVIL, 3)
    say(EVIL, file=sys.stderr)
    console().print(table)
    out, err = capsys.readouterr()
    assert is_harmless(out) and is_harmless(err)
    assert "ared2Jbc 3" in out and "[bold]head[/bold]" in out and "[/no markup]" in out


@pytest.mark.parametrize("script", ["train", "preflight", "grade", "compare", "report", "sweep", "rehearse_gpu"])
def test_every_script_prints_by_the_one_rule(script: str) -> None:
    text = (ROOT / "scripts" / f"{script}.py").read_text()
    assert "Console()" not in text and "    run(main)" in text
    # JSON for other programs, whose texts are escaped.
    assert text.count("print(") - text.count(".print(") == (script == "grade")


def test_what_goes_wrong_while_an_interrupt_is_dealt_with_is_no_other_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    # Whatever this process starts later would ignore them too.
    heeded: list[tuple[object, object]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: heeded.append((number, handler)))

    def ends(first: BaseException, then: str) -> int:
        try:
            raise first
        finally:
            raise RuntimeError(then)

    with pytest.raises(SystemExit) as ended:
        run(lambda: ends(KeyboardInterrupt(), "Event loop stopped before Future completed."))
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert heeded[-2:] == [(signal.SIGTERM, signal.SIG_IGN), (signal.SIGHUP, signal.SIG_IGN)]
    with pytest.raises(RuntimeError, match="no interrupt"):
        run(lambda: ends(ValueError(), "no interrupt"))


@pytest.mark.parametrize(
    "prints",
    ["[say(i) for i in range(20_000)]", "print(1)", "console().print('a ' * 20_000, highlight=False)"],
    ids=["at once", "at the end", "by rich"],
)
def test_a_program_whose_output_nobody_reads_ends_without_a_word(prints: str) -> None:
    code = f"from envs.terminal import console, run, say\ndef main():\n    {prints}\n    return 0\nrun(main)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_broken_pipe_to_anything_else_is_told() -> None:
    code = "from envs.terminal import run\ndef main(): raise BrokenPipeError('to the server')\nrun(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "BrokenPipeError: to the server" in done.stderr


def test_a_signal_that_comes_while_asyncio_is_being_imported_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    heeded: dict[int, Callable[[], None]] = {}
    monkeypatch.setattr(signal, "signal", heeded.__setitem__)
    end_on_signals()
    monkeypatch.setitem(sys.modules, "asyncio", ModuleType("asyncio"))
    with pytest.raises(KeyboardInterrupt):
        heeded[signal.SIGTERM]()


def test_a_traceback_of_a_script_is_clean() -> None:
    code = (
        f"from envs.terminal import run\ndef main(): raise ValueError({EVIL!r} + ' https://me:hunter2@x.y/')\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and is_harmless(done.stderr)
    assert "ValueError: ared2Jb" in done.stderr and "hunter2" not in done.stderr


def test_a_grader_is_shown_as_json_that_reads_back_and_acts_on_no_terminal(tmp_path: Path) -> None:
    grader = {"type": "string_check", "name": "c", "input": "\x9b2J\x1b[1m é", "reference": "b", "operation": "eq"}
    path = tmp_path / "grader.json"
    path.write_text(json.dumps(grader))
    command = [sys.executable, "scripts/grade.py", "validate", "--grader", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert is_harmless(done.stdout) and json.loads(done.stdout)["grader"]["input"] == grader["input"]
