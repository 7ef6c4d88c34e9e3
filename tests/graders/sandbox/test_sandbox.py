"""The sandbox as a service: what works inside, what it survives, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from graders.sandbox import kernel, seccomp, syscalls
from graders.sandbox.isolation import Isolation, command, environment, try_out
from graders.sandbox.pool import Pool
from graders.sandbox.protocol import Limits
from tests.support import ROOT
from tests.support.sandbox_host import WALLS, descendants
from tests.support.sandbox_pool import pool_of, ran

FIRST = next((way for way in WALLS if try_out(way) is None), None)
needs_walls = pytest.mark.skipif(FIRST is None, reason="this machine offers no isolation at all")


@pytest.fixture(params=WALLS)
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[Pool]:
    if (fault := try_out(request.param)) is not None:
        pytest.skip(f"{request.param} does not work here: {fault}")
    made = pool_of(request.param, [("numpy", ())])
    yield made
    await made.aclose()


async def test_the_installed_packages_work_inside(pool):
    code = "import numpy as np\ndef f():\n a = np.eye(400)\n return float((a @ a).sum())"
    assert await ran(pool, code) == {"score": 400.0}


async def test_python_itself_works_inside(pool):
    code = """
import asyncio, collections, ctypes, dataclasses, datetime, decimal, hashlib, random, re, sqlite3, statistics, zoneinfo
@dataclasses.dataclass
class A:
    x: "int"
def f():
    assert asyncio.run(asyncio.sleep(0, A(3))).x == 3
    assert sqlite3.connect(":memory:").execute("select 2").fetchone() == (2,)
    return random.random() < 2
"""
    result = await ran(pool, code.replace("random.random() < 2", "float(random.random() < 2)"))
    assert result == {"score": 1.0}


async def test_threads_and_files_work_within_namespaces(pool):
    if pool.isolation is Isolation.LANDLOCK or (pool.isolation is Isolation.BUBBLEWRAP and os.geteuid() == 0):
        pytest.skip("threads are not counted per sandbox here, so there are none")
    code = """
import concurrent.futures, pathlib, tempfile
def f():
    with concurrent.futures.ThreadPoolExecutor(8) as pool, tempfile.NamedTemporaryFile("w+") as file:
        file.write(str(sum(pool.map(abs, range(5)))))
        file.flush()
        pathlib.Path("sub").mkdir()
        return float(pathlib.Path(file.name).read_text())
"""
    assert await ran(pool, code) == {"score": 10.0}


async def test_each_grading_draws_its_own_random_numbers(pool):
    code = "import random\ndef f(): return random.random()"
    assert len({(await ran(pool, code))["score"] for _ in range(4)}) == 4


@needs_walls
async def test_gradings_run_side_by_side_and_no_more_than_there_are_workers():
    pool = pool_of(FIRST, num_workers=2)
    try:
        scores = await asyncio.gather(*(ran(pool, f"def f(): return {n}") for n in range(20)))
        assert [score["score"] for score in scores] == list(range(20)) and len(pool.pids) == 2
    finally:
        await pool.aclose()


@needs_walls
async def test_workers_start_when_they_are_needed_and_end_when_closed():
    pool = pool_of(FIRST)
    assert pool.pids == ()
    assert await ran(pool, "def f(): return 1") == {"score": 1.0}
    family = {*pool.pids, *descendants(pool.pids[0])}
    await pool.aclose()
    assert pool.pids == () and not any(Path(f"/proc/{pid}").exists() for pid in family)


@pytest.mark.parametrize("way", WALLS)
async def test_a_dead_worker_is_replaced_and_its_grading_done_again(way):
    if (fault := try_out(way)) is not None:
        pytest.skip(f"{way} does not work here: {fault}")
    pool = pool_of(way)
    try:
        await ran(pool, "def f(): return 1")
        (first,) = pool.pids
        grading = asyncio.create_task(ran(pool, "import time\ndef f():\n time.sleep(1)\n return 0.5"))
        await asyncio.sleep(0.3)
        # The worker first: a grading that dies alone is taken for its own fault.
        for pid in (first, *descendants(first)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert await grading == {"score": 0.5}
        assert pool.pids and pool.pids != (first,)
    finally:
        await pool.aclose()


@needs_walls
async def test_a_worker_that_hangs_is_replaced():
    pool = pool_of(FIRST)
    try:
        await ran(pool, "def f(): return 1")
        first = pool.pids
        for pid in (*first, *descendants(first[0])):
            os.kill(pid, signal.SIGSTOP)
        pool._limits = Limits(wall_s=4, start_s=4)
        assert await ran(pool, "def f(): return 0.5") == {"score": 0.5}
        assert pool.pids != first
    finally:
        await pool.aclose()


@needs_walls
async def test_a_cancelled_grading_takes_its_worker_with_it():
    pool = pool_of(FIRST)
    try:
        grading = asyncio.create_task(ran(pool, "import time\ndef f(): time.sleep(60)"))
        # Whether the worker is starting or grading by then, it must go.
        await asyncio.sleep(1)
        family = {*pool.pids, *descendants(pool.pids[0])}
        grading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await grading
        assert await ran(pool, "def f(): return 1") == {"score": 1.0}
        assert gone(family)
    finally:
        await pool.aclose()


@pytest.mark.parametrize("way", WALLS)
def test_nothing_outlives_a_trainer_that_is_killed(way):
    if (fault := try_out(way)) is not None:
        pytest.skip(f"{way} does not work here: {fault}")
    program = f"""
import asyncio, json
from graders.sandbox.isolation import Isolation
from tests.support.sandbox_host import descendants
from tests.support.sandbox_pool import pool_of, ran
import os
async def main():
    pool = pool_of(Isolation("{way}"))
    task = asyncio.create_task(ran(pool, "import time\\ndef f():\\n while True: time.sleep(1)"))
    while not (pool.pids and len(descendants(pool.pids[0])) >= {1 if way is Isolation.LANDLOCK else 2}):
        await asyncio.sleep(0.05)
    print(json.dumps(sorted(descendants(os.getpid()))), flush=True)
    await task
asyncio.run(main())
"""
    paths = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=paths) as trainer:
        assert trainer.stdout is not None
        family = set(json.loads(trainer.stdout.readline()))
        trainer.kill()
    assert len(family) >= 2 and gone(family)


def gone(pids: set[int], within_s: float = 20) -> bool:
    """Whether all have ended, zombies of this container's first process aside."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(_is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_is_given_no_variable_of_the_trainers(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert all("OPENAI_API_KEY" not in environment(way) for way in Isolation)
    assert not any("secret" in part for way in Isolation for part in command(way))


@pytest.mark.parametrize("machine", kernel.MACHINES)
def test_the_filters_can_be_written_for_every_machine(monkeypatch, machine):
    monkeypatch.setattr(kernel, "MACHINE", machine)
    whole = seccomp.of_grading(threads=True, scratch=True, truncation=True, pid=7)
    worker = seccomp.of_worker(scratch=True, truncation=True)
    # Eight bytes an instruction; the kernel takes 4096 of them.
    assert all(len(code) % 8 == 0 and len(code) // 8 < 4096 for code in (whole, worker))
    assert len(seccomp.of_grading(threads=False, scratch=False, truncation=False, pid=7)) < len(whole)


@pytest.mark.parametrize("column", [0, 1])
def test_no_call_number_stands_twice(column):
    tables = (
        *(syscalls.ALWAYS, syscalls.WITH_SCRATCH, syscalls.BY_ARGUMENT),
        *(syscalls.GRANTED, syscalls.WORKER, syscalls.ABSENT),
    )
    numbers = [row[column] for table in tables for row in table.values() if row[column] is not None]
    assert len(numbers) == len(set(numbers))
