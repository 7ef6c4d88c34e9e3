"""Older kernels, whose landlock knows less: simulated by a worker that asks for no more than they have.

What landlock does not rule there must be held by mounts or by the system-call filter. Everything that could change a
file is tried on one that the gradings may read, that the trainer's user owns and that all may write; then one looks
from outside.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from graders.sandbox import isolation, landlock
from graders.sandbox.isolation import Isolation, try_out
from graders.sandbox.pool import Pool
from graders.sandbox.protocol import Limits
from tests.support.sandbox_host import EVERY_ATTEMPT, PACKAGES, Cell, Host, runs_here

KERNELS = [
    *((Isolation.LANDLOCK, abi) for abi in (1, 2, 3, 4, 6)),
    *((way, abi) for way in (Isolation.NAMESPACES, Isolation.BUBBLEWRAP) for abi in (0, 2)),
]
CHANGES = """
import ctypes, itertools, mmap, os, platform, shutil
libc = ctypes.CDLL(None, use_errno=True)
def grade(sample, item):
    path, folder = item["file"], item["folder"]
    raw = (lambda *a: libc.syscall(*a)) if platform.machine() == "x86_64" else lambda *a: None
    name, new = os.fsencode(path), folder + "/new"
    some = [os.O_TRUNC, os.O_CREAT, os.O_APPEND, os.O_EXCL]
    flags = [sum(few) for n in range(4) for few in itertools.combinations(some, n)]
    opened = [
        lambda target=target, f=f | way, **k: os.write(os.open(target, f, **k), b"x")
        for target in (path, new) for way in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, 3) for f in flags
    ]
    fd = os.open(path, os.O_RDONLY)
    folder_fd = os.open(folder, os.O_RDONLY)
    how = (ctypes.c_uint64 * 3)(os.O_TRUNC, 0, 0)
    changes = opened + [
        lambda: os.open("victim", os.O_TRUNC, dir_fd=folder_fd),
        lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
        lambda: raw(2, name, os.O_TRUNC), lambda: raw(257, -100, name, ctypes.c_long(os.O_TRUNC | 1 << 40)),
        lambda: raw(85, name, 0o600), lambda: raw(76, name, 0), lambda: raw(77, fd, 0),
        lambda: raw(437, -100, name, how, 24),
        lambda: raw(90, name, 0), lambda: raw(91, fd, 0), lambda: raw(452, -100, name, 0, 0),
        lambda: raw(285, fd, 3, 0, 1),
        lambda: raw(16, fd, 0x40086602, ctypes.byref(ctypes.c_long(0x20))), lambda: raw(16, fd, 0x40049409, fd),
        lambda: raw(188, name, b"user.x", b"x", 1, 0), lambda: raw(190, fd, b"user.x", b"x", 1, 0),
        lambda: raw(92, name, 1, 1), lambda: raw(72, fd, 1024, 1), lambda: raw(326, fd, None, fd, None, 1, 0),
        lambda: os.truncate(path, 0), lambda: os.truncate(fd, 0), lambda: os.ftruncate(fd, 0),
        lambda: os.pwrite(fd, b"x", 0), lambda: mmap.mmap(fd, 1, mmap.MAP_SHARED, mmap.PROT_WRITE).write(b"x"),
        lambda: mmap.mmap(fd, 1, mmap.MAP_SHARED, mmap.PROT_READ) and libc.mprotect(None, 1, 3),
        lambda: os.rename(path, new), lambda: os.replace(new, path), lambda: os.link(path, new),
        lambda: os.symlink(path, new), lambda: os.unlink(path), lambda: os.rmdir(folder + "/inner"),
        lambda: os.mkdir(new), lambda: os.mkfifo(new), lambda: os.mknod(new), lambda: shutil.rmtree(folder),
        lambda: os.rename(folder + "/inner/deep", new), lambda: os.link(path, folder + "/inner/new"),
        lambda: os.chmod(path, 0o600), lambda: os.fchmod(fd, 0o600), lambda: os.chmod(folder, 0o700),
        lambda: os.utime(path, (1, 1)), lambda: os.utime(fd, (1, 1)), lambda: os.utime(folder, (1, 1)),
        lambda: os.setxattr(path, "user.x", b"x"), lambda: os.removexattr(path, "user.kept"),
        lambda: os.chown(path, 1, 1), lambda: os.posix_fallocate(fd, 0, 100), lambda: os.sendfile(fd, fd, 0, 1),
    ]
    done = 0
    for change in changes:
        try:
            change()
        except (OSError, ValueError):
            continue
        done += 1
    return done
"""


def as_old_as(monkeypatch: pytest.MonkeyPatch, abi: int) -> None:
    """Workers started from here on find no newer landlock than this; 0: none at all."""
    if abi > landlock.abi():
        pytest.skip("the kernel of this machine is older")
    real = isolation._program_of
    older = f"\n_newest = abi\ndef abi(): return min(_newest(), {abi})\n"
    monkeypatch.setattr(isolation, "_program_of", lambda name: real(name) + (older if name == "landlock" else ""))


def needs(way: Isolation) -> None:
    if (fault := try_out(way)) is not None:
        pytest.skip(f"{way} does not work here: {fault}")


def looks(folder: Path) -> dict[str, object]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", s.st_mode, s.st_mtime_ns, s.st_nlink, s.st_uid)
        for path in (folder, *sorted(folder.rglob("*")))
        if (s := path.stat())
    }


@pytest.mark.parametrize(("way", "abi"), KERNELS)
async def test_no_file_outside_is_changed_whatever_landlock_knows(monkeypatch, tmp_path, way, abi):
    needs(way)
    as_old_as(monkeypatch, abi)
    folder = tmp_path / "packages"
    (folder / "inner").mkdir(parents=True)
    (folder / "victim").write_text("what the trainer needs")
    (folder / "inner" / "deep").write_text("too")
    for path in (folder, *folder.rglob("*")):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o777)
    binds, links = isolation._visible()
    monkeypatch.setattr(isolation, "_visible", lambda: ([*binds, [str(folder), str(folder)]], links))
    before = looks(folder)
    pool = Pool(CHANGES, (), isolation=way, limits=Limits(wall_s=60), num_workers=1)
    try:
        item = {"file": str(folder / "victim"), "folder": str(folder)}
        outcome = await pool.run(json.dumps({"sample": {}, "item": item}).encode())
    finally:
        await pool.aclose()
    assert looks(folder) == before
    assert "score" in json.loads(outcome.result), outcome


def test_the_same_changes_succeed_without_walls(tmp_path):
    """Else the test above would prove nothing."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "victim").write_text("x")
    (tmp_path / "inner" / "deep").write_text("too")
    before = looks(tmp_path)
    space: dict[str, object] = {}
    exec(CHANGES, space)
    assert space["grade"](None, {"file": str(tmp_path / "victim"), "folder": str(tmp_path)}) > 20
    assert looks(tmp_path) != before if tmp_path.exists() else True


@pytest.mark.parametrize(
    ("way", "abi"), [(Isolation.LANDLOCK, 1), (Isolation.NAMESPACES, 0), (Isolation.BUBBLEWRAP, 0)]
)
async def test_every_attempt_is_contained_on_the_oldest_kernel(monkeypatch, way, abi):
    needs(way)
    as_old_as(monkeypatch, abi)
    host = Host()
    cell = Cell(way, host)
    try:
        tried = {a.name: await cell.problems(a) for a in EVERY_ATTEMPT if runs_here(a) and not a.endless}
    finally:
        await cell.close()
        host.close()
    assert {name: problems for name, problems in tried.items() if problems} == {}


@pytest.mark.parametrize(
    ("way", "abi"), [(Isolation.LANDLOCK, 1), (Isolation.NAMESPACES, 0), (Isolation.BUBBLEWRAP, 0)]
)
async def test_packages_in_a_repository_show_nothing_else_of_it(monkeypatch, tmp_path, way, abi):
    """As in a checkout that holds its own `.venv`: by mounts alone, the folders on the way to it are there."""
    needs(way)
    as_old_as(monkeypatch, abi)
    inside = tmp_path / "repository" / ".venv" / "lib" / "packages"
    inside.mkdir(parents=True)
    for folder in (tmp_path / "repository", *inside.parents[:2], inside):
        (folder / "file").write_text("of the project")
    attempt = next(a for a in EVERY_ATTEMPT if a.name == "read the repository")
    paths = isolation.import_paths()
    host = Host(tmp_path / "repository", [*PACKAGES, str(inside)])
    try:
        for shown, escapes in ((inside, False), (inside.parent, True), (tmp_path / "repository", True)):
            monkeypatch.setattr(isolation, "import_paths", lambda shown=shown: [*paths, str(shown)])
            cell = Cell(way, host)
            problems = await cell.problems(attempt)
            await cell.close()
            assert [problem.split(":")[0] for problem in problems] == ["escaped"] * escapes, shown
    finally:
        host.close()


@pytest.mark.parametrize("abi", [1, 2, 3])
async def test_what_is_printed_can_be_thrown_away_without_a_scratch_folder(monkeypatch, abi):
    needs(Isolation.LANDLOCK)
    as_old_as(monkeypatch, abi)
    mode = "w" if abi >= 3 else "a"
    source = f"def grade(sample, item):\n with open('/dev/null', '{mode}') as f: print('x', file=f)\n return 1"
    pool = Pool(source, (), isolation=Isolation.LANDLOCK, limits=Limits(wall_s=60), num_workers=1)
    try:
        assert json.loads((await pool.run(b'{"sample": {}, "item": {}}')).result) == {"score": 1.0}
    finally:
        await pool.aclose()
