"""What stands outside of the sandbox while something tries to get out: bait, listeners, and who looks whether they were
touched. Run as a script it tries the whole table as the user who runs it and prints JSON: `{way: {attempt: problems}}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import signal
import socket
import sys
import sysconfig
import tempfile
from pathlib import Path

from graders.sandbox.isolation import Isolation, try_out
from graders.sandbox.pool import Outcome, Pool
from graders.sandbox.protocol import Limits
from tests.support import ROOT
from tests.support.sandbox_attempts import ATTEMPTS, HONEST, Attempt
from tests.support.sandbox_attempts_deep import DEEP_ATTEMPTS

# What gradings may read, whatever the sandbox shows.
PACKAGES = [
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *(sys.base_prefix, sys.base_exec_prefix, "/usr"),
]
EVERY_ATTEMPT = [*ATTEMPTS, *DEEP_ATTEMPTS]
SECRET = "the trainer's secret"
WALLS = (Isolation.NAMESPACES, Isolation.BUBBLEWRAP, Isolation.LANDLOCK)
_SOURCE = """
def grade(sample, item):
    space = {}
    exec(item["code"], space)
    return space["attempt"](item)
"""
_MIB = 1 << 20
_LIMITS = {"memory_bytes": 384 * _MIB, "scratch_bytes": 16 * _MIB, "scratch_inodes": 500}


def beside(repository: Path, packages: list[str]) -> list[str]:
    """What lies in the repository, and in its folders on the way to the packages."""
    way = {path for kept in packages for path in (Path(kept), *Path(kept).parents)}
    folders = {repository, *(path for path in way if path.is_relative_to(repository) and str(path) not in packages)}
    return sorted(str(path) for folder in folders for path in folder.iterdir() if path not in way)


class Host:
    """The bait. `repository` is the one of these tests, `packages` what gradings may read."""

    def __init__(self, repository: Path = ROOT, packages: list[str] = PACKAGES) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-host-"))
        self.secret = self.folder / "secret"
        self.secret.write_text(SECRET)
        os.environ["SANDBOX_SECRET"] = SECRET
        self._sockets: list[socket.socket] = []
        self.it: dict[str, object] = {
            "secret": str(self.secret),
            "witness": str(self.folder / "witness"),
            "repository": str(repository),
            "packages": packages,
            "beside the packages": beside(repository, packages),
            "trainer": os.getpid(),
            "clone": 56 if platform.machine() == "x86_64" else 220,
        }
        name = self.folder.name
        self._listen("port4", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        if socket.has_ipv6 and Path("/proc/net/if_inet6").exists():
            self._listen("port6", socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0))
        else:
            self.it["port6"] = 1
        self._listen("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self._listen("unix", socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket"))
        self._listen("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}")
        self._listen("abstract_datagrams", socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{name}-datagrams")
        # A signal that got through is to be seen, not to end the tests.
        self.signals: list[int] = []
        self._handler = signal.signal(signal.SIGTERM, lambda number, _: self.signals.append(number))

    def _listen(self, key: str, family: int, kind: int, address: object) -> None:
        listener = socket.socket(family, kind)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        listener.setblocking(False)
        bound = listener.getsockname()
        self.it[key] = bound[1] if family != socket.AF_UNIX else os.fsdecode(bound).lstrip("\0")
        self._sockets.append(listener)

    def touched(self) -> list[str]:
        """What is not as it was."""
        found = [f"signal {number}" for number in self.signals]
        for listener in self._sockets:
            try:
                listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()[0].close()
            except BlockingIOError:
                continue
            found.append(f"something reached {listener.getsockname()}")
        if self.secret.read_text() != SECRET or self.secret.stat().st_mode & 0o777 != 0o644:
            found.append("the secret file changed")
        if Path(str(self.it["witness"])).exists():
            found.append("a pickle was read")
        escaped = [Path("/escaped"), Path("/usr/escaped"), Path(os.__file__).parent / "escaped.py"]
        return found + [f"{path} was written" for path in escaped if path.exists()]

    def close(self) -> None:
        for listener in self._sockets:
            listener.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()
        signal.signal(signal.SIGTERM, self._handler)
        os.environ.pop("SANDBOX_SECRET", None)


class Cell:
    """A sandbox of one kind, with a patient pool and a hasty one for what never ends."""

    def __init__(self, way: Isolation, host: Host) -> None:
        self.way = way
        self._host = host
        patient, hasty = Limits(wall_s=60, cpu_s=30, **_LIMITS), Limits(wall_s=1.5, cpu_s=1, **_LIMITS)
        self._patient, self._hasty = (
            Pool(_SOURCE, [], isolation=way, limits=limits, num_workers=1) for limits in (patient, hasty)
        )

    async def problems(self, attempt: Attempt) -> list[str]:
        """Why this attempt was not contained; empty where it was."""
        pool = self._hasty if attempt.endless else self._patient
        # It starts the worker, whose number the attempt is told.
        await self._grade(pool, HONEST)
        before = pool.pids, descendants(pool.pids[0])
        outcome = await self._grade(pool, attempt.code)
        said = json.dumps(_result(outcome))
        found = [f"escaped: {said}"] if _result(outcome).get("score") == 1.0 else []
        words = _result(outcome).get("error", "") or (signal.Signals(outcome.signal).name if outcome.signal else "")
        if attempt.says and not re.search(attempt.says, words):
            found.append(f"said {words or said!r}, not {attempt.says!r}")
        if attempt.endless and not (outcome.timed_out or outcome.signal in (signal.SIGXCPU, signal.SIGKILL)):
            found.append(f"no limit of time ended it: {outcome}")
        if len(outcome.output) > 4_000 or len(outcome.result) > 17_000:
            found.append("too much came back")
        if (pool.pids, descendants(pool.pids[0])) != before:
            found.append("processes were left behind, or the worker was lost")
        if _result(honest := await self._grade(pool, HONEST)) != {"score": 0.25}:
            found.append(f"the next grading: {honest}")
        return found + self._host.touched()

    async def close(self) -> None:
        await self._patient.aclose()
        await self._hasty.aclose()

    async def _grade(self, pool: Pool, code: str) -> Outcome:
        worker = pool.pids[0] if pool.pids else 0
        item = {**self._host.it, "worker": worker, "code": code}
        return await pool.run(json.dumps({"sample": {}, "item": item}).encode())


def _result(outcome: Outcome) -> dict[str, object]:
    try:
        result = json.loads(outcome.result)
    except ValueError:
        return {}
    return result if isinstance(result, dict) else {}


def descendants(pid: int) -> set[int]:
    """All processes that this one started, and those that they did."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # ended meanwhile
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def runs_here(attempt: Attempt) -> bool:
    """Raw calls are written with the numbers of x86_64."""
    return platform.machine() == "x86_64" or "libc.syscall(" not in attempt.code


async def _whole_table(way: Isolation, host: Host) -> dict[str, list[str]]:
    cell = Cell(way, host)
    try:
        return {attempt.name: await cell.problems(attempt) for attempt in EVERY_ATTEMPT if runs_here(attempt)}
    finally:
        await cell.close()


async def main() -> None:
    host = Host()
    try:
        ways = [way for way in WALLS if try_out(way) is None]
        tables = await asyncio.gather(*(_whole_table(way, host) for way in ways))
        found = dict(zip(ways, tables, strict=True))
    finally:
        host.close()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
