"""Between gradings: what one knows of another, what counts of one that was ended, and what imports do before any."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from envs.types import Episode, Message, StopReason, Task, Turn
from graders.sandbox import isolation, worker
from graders.sandbox.isolation import Isolation, try_out
from graders.sandbox.pool import Outcome, Pool
from graders.sandbox.protocol import Limits
from graders.types import GraderErrorKind
from graders.user.python import PythonConfig, PythonGrader
from tests.support.sandbox_host import WALLS
from tests.support.sandbox_pool import pool_of

ALL_WAYS = (*WALLS, Isolation.NONE)
# All memory that lies near to what a process has: pages that are not there are refused by `write`, without a crash.
SCAN = r"""
import ctypes, os, re
def f():
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = ctypes.c_void_p
    read_end, write_end = os.pipe()
    found = set()
    mapped = ctypes.create_string_buffer(4 << 20)
    for anchor in (libc.sbrk(0), id(found), ctypes.addressof(mapped), id(os)):
        for page in range((anchor >> 12) - 8000, (anchor >> 12) + 8000):
            if libc.write(write_end, ctypes.c_void_p(page << 12), 4096) == 4096:
                found.update(re.findall(rb"ANSWER-\d{8}", os.read(read_end, 4096)))
    raise ValueError(sorted(found))
"""


async def ended(pool: Pool, code: str, **item: object) -> Outcome:
    return await pool.run(json.dumps({"sample": {}, "item": {"code": code, **item}}).encode())


@pytest.fixture(params=ALL_WAYS)
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    if (fault := try_out(request.param)) is not None:
        pytest.skip(f"{request.param} does not work here: {fault}")
    made = pool_of(request.param)
    yield made
    await made.aclose()


async def test_a_grading_finds_nothing_of_those_before_it_in_its_memory(pool):
    for number, size in ((11111111, 10), (22222222, 5_000), (33333333, 2_000_000)):
        fails = f"def f():\n print('ANSWER-{number}')\n raise ValueError('ANSWER-{number}')"
        earlier = await ended(pool, fails, gold=f"ANSWER-{number} " + "x" * size, more=[f"ANSWER-{number}"] * 50)
        assert f"ANSWER-{number}" in earlier.result and f"ANSWER-{number}" in earlier.output
    own = "ANSWER-44444444"
    assert json.loads((await ended(pool, SCAN, gold=own)).result)["error"].endswith(f"ValueError: [b'{own}']")


async def test_a_frame_larger_than_every_buffer_arrives_whole(pool):
    code = "def f(): return len(IT['more'])".replace(
        "def f", "import sys\nIT = sys._getframe(1).f_locals['item']\ndef f"
    )
    outcome = await ended(pool, code, more="é" * 3_000_000)
    assert outcome.result == '{"score": 3000000.0}'


@pytest.mark.parametrize(
    "then",
    [
        "os._exit(0)",
        "os.kill(os.getpid(), 11)",
        "os.kill(os.getpid(), 9)",
        "ctypes.string_at(8)",
        "while True: pass",
        "time.sleep(1000)",
        "raise ValueError",
        "return 0.5",
        "sys.exit(0)",
    ],
)
async def test_what_a_source_writes_before_its_end_is_no_score(then):
    way = next((way for way in ALL_WAYS if try_out(way) is None), Isolation.NONE)
    pool = pool_of(way, wall_s=4, cpu_s=1)
    early = f"import ctypes, os, sys, time\ndef f():\n os.write(3, b'{{\"score\": 1.0}}')\n {then}"
    try:
        assert (await ended(pool, early)).result == ""
        assert (await ended(pool, "def f(): return 0.25")).result == '{"score": 0.25}'
    finally:
        await pool.aclose()


async def test_a_lock_is_granted_and_keeps_nobody_out(tmp_path, monkeypatch):
    way = next((way for way in WALLS if try_out(way) is None), None)
    if way is None:
        pytest.skip("this machine offers no isolation at all")
    file = tmp_path / "library"
    file.write_text("of the host")
    tmp_path.chmod(0o755)
    binds, links = isolation._visible()
    monkeypatch.setattr(isolation, "_visible", lambda: ([*binds, [str(tmp_path), str(tmp_path)]], links))
    pool = pool_of(way)
    holds = """
import fcntl, struct, time
def f():
    with open(FILE) as file, open(FILE) as again:
        whole = struct.pack("hhqqi", fcntl.F_RDLCK, 0, 0, 0, 0)
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for start in range(1000):
            fcntl.lockf(file, fcntl.LOCK_SH, 1, 2 * start)
        for of_open_file in (37, 38):
            fcntl.fcntl(file, of_open_file, whole)
        print("holds", flush=True)
        time.sleep(6)
    return 1
""".replace("FILE", repr(str(file)))
    try:
        await ended(pool, "def f(): return 1")
        grading = asyncio.create_task(ended(pool, holds))
        locked = 0
        with file.open("r+") as mine:
            while not grading.done():
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(mine, fcntl.LOCK_UN)
                fcntl.lockf(mine, fcntl.LOCK_UN)
                locked += 1
                await asyncio.sleep(0.05)
        assert locked > 20 and (await grading).result == '{"score": 1.0}'
    finally:
        await pool.aclose()


async def test_a_database_in_the_scratch_folder_works_without_locks(pool):
    if pool.isolation not in (Isolation.NAMESPACES, Isolation.BUBBLEWRAP):
        pytest.skip("there is no scratch folder here")
    code = """
import sqlite3
def f():
    one, two = (sqlite3.connect("file.db", timeout=0) for _ in range(2))
    one.execute("create table t (x)")
    one.execute("insert into t values (2)")
    one.commit()
    return two.execute("select sum(x) from t").fetchone()[0]
"""
    assert (await ended(pool, code)).result == '{"score": 2.0}'


MODULES = {
    "exits": "raise SystemExit(3)",
    "exits_hard": "import os\nos._exit(3)",
    "crashes": "import ctypes\nctypes.string_at(8)",
    "interrupts": "raise KeyboardInterrupt",
    "fails": "raise ImportError('as it always does')",
    "eats": "x = b'x' * (3 << 30)",
    "hangs": "import time\nwhile True: time.sleep(1)",
    "prints": "while True: print('x' * 10_000)",
    "writes": "import os\nopen(os.path.join(os.path.dirname(__file__), 'written'), 'w').write('x')",
    "connects": "import socket\nsocket.socket()",
    "runs": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "asks": "import tempfile\nFOLDER = tempfile.gettempdir()",
    "two_names/__init__": "def both(): return 1.0",
    "two_names/both": "",
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of modules beside the installed ones; all may write to it."""
    for name, text in MODULES.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    tmp_path.chmod(0o777)
    paths = [*isolation.import_paths(), str(tmp_path)]
    monkeypatch.setattr(isolation, "import_paths", lambda: paths)
    monkeypatch.setattr("graders.user.python.import_paths", lambda: paths)
    return tmp_path


async def grade_of(source: str, way: Isolation, monkeypatch: pytest.MonkeyPatch, **limits: float):
    if (fault := try_out(way)) is not None:
        pytest.skip(f"{way} does not work here: {fault}")
    monkeypatch.setattr("graders.user.python.choose", lambda or_none: way)
    config = PythonConfig.model_validate({"type": "python", "name": "g", "source": source})
    grader = PythonGrader(config, limits=Limits(**{"wall_s": 30, **limits}), num_workers=1)
    task = Task(task_id="t", messages=(Message(role="user", content="?"),), item={})
    answer = Message(role="assistant", content="42")
    episode = Episode(
        rollout_id="r",
        task_id="t",
        messages=(*task.messages, answer),
        turns=(Turn(message=answer),),
        stop_reason=StopReason.ANSWERED,
    )
    try:
        return await grader.grade(task, episode)
    finally:
        await grader.aclose()


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("exits", "SystemExit: 3"),
        ("exits_hard", "ended without a valid result"),
        ("crashes", "ended by SIGSEGV"),
        ("interrupts", "KeyboardInterrupt"),
        ("fails", "ImportError: as it always does"),
        ("eats", "MemoryError"),
        ("hangs", "ran longer than 3 s"),
        # What it prints is bounded, so that no patience is needed as with the one before.
        ("prints", "ran longer than 3 s"),
    ],
)
async def test_an_import_that_fails_is_the_sources_own_fault(packages, monkeypatch, module, says):
    way = next((way for way in ALL_WAYS if try_out(way) is None), Isolation.NONE)
    source = f"import {module}\ndef grade(sample, item): return 1"
    hasty = {"hangs": {"wall_s": 3, "start_s": 12}, "prints": {"wall_s": 3}}.get(module, {})
    grade = await grade_of(source, way, monkeypatch, **hasty)
    assert grade.reward == 0 and grade.errors == (GraderErrorKind.PYTHON_GRADER_RUNTIME,)
    assert says in grade.explanation, grade.explanation


async def test_an_import_that_the_source_never_comes_to_does_nothing(packages, monkeypatch):
    way = next((way for way in ALL_WAYS if try_out(way) is None), Isolation.NONE)
    source = "def grade(sample, item):\n if item is None:\n  import exits_hard\n return 1\ndef other():\n import hangs"
    assert (await grade_of(source, way, monkeypatch, start_s=12)).reward == 1


async def test_a_name_that_is_also_a_modules_is_taken_as_python_takes_it(packages, monkeypatch):
    way = next((way for way in ALL_WAYS if try_out(way) is None), Isolation.NONE)
    source = "from two_names import both\ndef grade(sample, item): return both()"
    assert (await grade_of(source, way, monkeypatch)).reward == 1


@pytest.mark.parametrize("way", WALLS)
async def test_imports_before_the_first_grading_are_held(packages, monkeypatch, way):
    done = """
import sys
def grade(sample, item):
    return sum(name in sys.modules for name in ("writes", "connects", "runs"))
"""
    names = "\n".join(f"try: import {name}\nexcept Exception: pass" for name in ("writes", "connects", "runs"))
    assert (await grade_of(names + done, way, monkeypatch)).reward == 0
    assert not (packages / "written").exists()


@pytest.mark.parametrize("way", WALLS)
async def test_a_package_may_ask_for_the_temporary_folder_while_it_is_loaded(packages, monkeypatch, way):
    source = "import asks\ndef grade(sample, item): return asks.FOLDER == '/scratch'"
    assert (await grade_of(source, way, monkeypatch)).reward == 1


def test_no_more_is_kept_of_what_a_grading_writes_than_its_first_or_last_bytes():
    for last in (False, True):
        kept = worker._Kept(100, last=last)
        for _ in range(2):
            written = b""
            read_end, write_end = os.pipe()
            os.set_blocking(read_end, False)
            for size in (1, 60, 60, 65_536, 3, 99, 65_536, 0, 65_536, 7):
                part = bytes((len(written) + n) % 251 for n in range(size))
                os.write(write_end, part)
                written += part
                assert kept.read_from(read_end)
                assert kept.bytes() == (written[-100:] if last else written[:100])
            os.close(write_end)
            assert not kept.read_from(read_end)
            os.close(read_end)
            kept.wipe()
            assert kept.bytes() == b"" and not any(kept._view)
