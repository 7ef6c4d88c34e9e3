"""Nothing gets out of the sandbox: each attempt, behind each kind of wall that this machine has.

For each: it did not get what it wanted, nothing outside was touched, no process stayed, the worker lives, and the next
honest grading is right.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graders.sandbox.isolation import Isolation, try_out
from tests.support import ROOT
from tests.support.sandbox_attempts import Attempt
from tests.support.sandbox_host import EVERY_ATTEMPT, WALLS, Cell, Host, runs_here

NOBODY = 65534


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for the whole file, since workers belong to a loop. Never the current one: that is pytest-asyncio's."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def cell_of(loop: asyncio.AbstractEventLoop) -> Iterator[Callable[[Isolation], Cell]]:
    host = Host()
    cells: dict[Isolation, Cell] = {}

    def cell_of(way: Isolation) -> Cell:
        if (fault := try_out(way)) is not None:
            pytest.skip(f"{way} does not work here: {fault}")
        return cells.setdefault(way, Cell(way, host))

    yield cell_of
    for cell in cells.values():
        loop.run_until_complete(cell.close())
    host.close()


@pytest.mark.parametrize("way", WALLS)
@pytest.mark.parametrize("attempt", EVERY_ATTEMPT, ids=lambda attempt: attempt.name)
def test_an_attempt_is_contained(
    loop: asyncio.AbstractEventLoop, cell_of: Callable[[Isolation], Cell], way: Isolation, attempt: Attempt
) -> None:
    if not runs_here(attempt):
        pytest.skip("written with the call numbers of x86_64")
    assert loop.run_until_complete(cell_of(way).problems(attempt)) == []


def test_the_attempts_succeed_without_walls() -> None:
    """Else the table would prove nothing. Harmless ones only: they run in this process's own child."""
    names = [
        *("connect over IPv4", "connect to an abstract socket", "datagram from a socket pair to an abstract socket"),
        *("read the trainer's files", "read the repository", "read the trainer's /proc/PID/environ"),
        *("read the trainer's environment variables", "run a program", "signals by way of a file descriptor"),
        *("threads with tables of open files of their own", "memory in signals that wait", "memory in locks of files"),
        *("bytes out of band", "descriptors sent through a socket", "leases and notices of files", "splices"),
        *("watches on files", "what others read, by the file cache", "limits of other processes"),
    ]
    names = [name for name in names if runs_here(next(a for a in EVERY_ATTEMPT if a.name == name))]
    host = Host()
    program = "import json, sys; it, code = json.load(sys.stdin); d = {}; exec(code, d); print(d['attempt'](it))"
    try:
        for attempt in EVERY_ATTEMPT:
            if attempt.name in names:
                done = subprocess.run(
                    [sys.executable, "-c", program], input=json.dumps([host.it, attempt.code]), capture_output=True,
                    text=True, check=True,
                )  # fmt: skip
                assert done.stdout.split()[-1] == "1.0", attempt.name
                names.remove(attempt.name)
        assert names == []
        assert len(host.touched()) == 3, "the listeners saw what reached them"
    finally:
        host.close()


def test_an_ordinary_user_is_as_safe(tmp_path: Path) -> None:
    """The whole table again as the user nobody, under the system's own Python."""
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    python = shutil.which("python3", path="/usr/bin")
    if python is None or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("the system has no Python 3.11 or later that another user may run")
    copy = tmp_path / "copy"
    for folder in ("graders", "envs", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "README.md").write_text("a repository")
    for folder in (copy, *tmp_path.parents[:3], tmp_path):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    done = subprocess.run(
        [python, "-m", "tests.support.sandbox_host"],
        capture_output=True,
        text=True,
        cwd="/",
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(copy)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if not found:
        pytest.skip("an ordinary user can be isolated in no way here")
    assert {(way, name): problems for way, table in found.items() for name, problems in table.items() if problems} == {}


def test_the_docs_list_every_attempt_and_what_contains_it() -> None:
    rows = [f"| {attempt.name} | {attempt.contained_by} |" for attempt in EVERY_ATTEMPT]
    text = (ROOT / "docs" / "sandbox.md").read_text()
    assert "\n".join(rows) in text, "write into docs/sandbox.md:\n" + "\n".join(rows)
