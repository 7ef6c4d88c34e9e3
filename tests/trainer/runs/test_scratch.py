"""The scratch folder: it goes with the run, and what a killed run left behind is found at the next start."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from envs.errors import UserError
from trainer.runs.scratch import Scratch, default_roots, sweep, sweep_default_roots

MIB = 2**20
OWNER = """
import subprocess, sys, time
from pathlib import Path
from trainer.runs.scratch import Scratch
with Scratch(Path(sys.argv[1])) as scratch:
    child = subprocess.Popen(["sleep", "600"])
    scratch.note_children()
    (scratch.path / "weights").write_text("w")
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that holds a scratch folder under tmp_path and has one child; and that child."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    yield process, child
    for p in (process, child):
        if p.is_running() if isinstance(p, psutil.Process) else p.poll() is None:
            p.kill()
    process.wait()
    process.stdout.close()


def folders(root: Path) -> list[Path]:
    return list(root.glob("agent-rft-*"))


def test_the_folder_goes_with_the_run(tmp_path):
    with pytest.raises(KeyError), Scratch(tmp_path) as scratch:
        (scratch.path / "weights").write_text("w")
        raise KeyError
    assert folders(tmp_path) == []


def test_a_killed_runs_folder_and_children_are_swept_at_the_next_start(tmp_path, owner):
    process, child = owner
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert child.is_running() and len(folders(tmp_path)) == 1
    with Scratch(tmp_path) as scratch:
        assert folders(tmp_path) == [scratch.path]
    assert psutil.wait_procs([child], timeout=10)[1] == [] or child.status() == psutil.STATUS_ZOMBIE


def test_a_living_runs_folder_and_children_are_left_alone(tmp_path, owner):
    _, child = owner
    sweep(tmp_path)
    assert child.is_running() and len(folders(tmp_path)) == 1


def test_a_process_that_took_over_a_childs_id_is_left_alone(tmp_path):
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        folder = tmp_path / "agent-rft-old"
        folder.mkdir()
        began = psutil.Process(bystander.pid).create_time()
        (folder / "owner.json").write_text(f"[[{bystander.pid}, {began - 100}]]")
        sweep(tmp_path)
        assert not folder.exists() and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("how", ["owner", "link"])
def test_a_folder_of_another_users_ends_and_deletes_nothing_of_ours(tmp_path, monkeypatch, how):
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        folder = tmp_path / "agent-rft-fake"
        target = tmp_path / "target" if how == "link" else folder
        target.mkdir()
        began = psutil.Process(bystander.pid).create_time()
        (target / "owner.json").write_text(f"[[{bystander.pid}, {began}]]")
        if how == "link":
            folder.symlink_to(target)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        sweep(tmp_path)
        assert (target / "owner.json").exists() and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[[1", b"\xff\xfe", b"[1, 2]", b'[["a", 1]]', b"[" * 10_000, b"[[-1, 1e400]]", b"[[4e30, 0]]"],
)
def test_a_torn_record_of_the_children_stops_no_run_and_its_folder_goes(tmp_path, content):
    folder = tmp_path / "agent-rft-torn"
    folder.mkdir(mode=0o700)
    (folder / "owner.json").write_bytes(content)
    with Scratch(tmp_path) as scratch:
        assert folders(tmp_path) == [scratch.path]


@pytest.mark.parametrize("trap", ["others may write", "a link to the record", "a folder"])
def test_a_folder_that_others_could_have_filled_ends_and_deletes_nothing(tmp_path, trap):
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        record = f"[[{bystander.pid}, {psutil.Process(bystander.pid).create_time()}]]"
        folder = tmp_path / "agent-rft-trap"
        folder.mkdir(mode=0o700)
        if trap == "others may write":
            (folder / "owner.json").write_text(record)
            folder.chmod(0o777)
        elif trap == "a link to the record":
            (tmp_path / "record").write_text(record)
            (folder / "owner.json").symlink_to(tmp_path / "record")
        else:
            (folder / "owner.json").mkdir()
        with Scratch(tmp_path):
            assert folder.exists() and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_scratch_folder_that_another_runs_sweep_took_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    taken = []

    def lock_late(file: object, how: int) -> None:
        if not taken:
            taken.extend(folders(tmp_path))
            shutil.rmtree(taken[0])

    monkeypatch.setattr("trainer.runs.scratch.fcntl.lockf", lock_late)
    with Scratch(tmp_path) as scratch:
        assert folders(tmp_path) == [scratch.path] and scratch.path not in taken


# --- room


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with 1 MiB in all: a real tmpfs where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        usage, full = shutil.disk_usage, shutil.disk_usage(folder)._replace(free=MIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full if Path(path) == folder else usage(path))
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_weights_lie_in_shared_memory_only_where_it_has_room_and_else_in_the_temporary_folder(
    tmp_path, small, monkeypatch
):
    large = tmp_path / "large"
    large.mkdir()
    monkeypatch.setattr("trainer.runs.scratch.default_roots", lambda: [small, large])
    with Scratch(need_bytes=MIB // 2) as scratch:
        assert scratch.path.parent == small
    with Scratch(need_bytes=3 * MIB) as scratch:
        assert scratch.path.parent == large
        (scratch.path / "weights").write_bytes(b"w" * 3 * MIB)


def test_no_room_anywhere_is_a_mistake_that_names_folders_need_and_free_space(small, monkeypatch):
    monkeypatch.setattr("trainer.runs.scratch.default_roots", lambda: [small])
    need = f"they take 3 MiB, but {re.escape(str(small))} has 1 MiB free; make room"
    with pytest.raises(UserError, match=need), Scratch(need_bytes=3 * MIB - 5):
        pass
    assert folders(small) == []
    monkeypatch.setattr("trainer.runs.scratch.default_roots", list)
    with pytest.raises(UserError, match="there is no temporary folder that can be written"), Scratch():
        pass


def test_scratch_may_lie_in_shared_memory_or_where_tmpdir_says(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert default_roots() == [*([Path("/dev/shm")] if Path("/dev/shm").is_dir() else []), tmp_path]


def test_an_engine_that_a_killed_run_left_is_gone_when_its_scratch_is_swept(tmp_path, owner, monkeypatch):
    process, child = owner
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr("trainer.runs.scratch.default_roots", lambda: [tmp_path])
    sweep_default_roots()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert folders(tmp_path) == []
