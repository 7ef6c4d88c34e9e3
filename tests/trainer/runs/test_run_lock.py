"""A run folder belongs to one run at a time, whichever process or end of it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.errors import UserError
from trainer.runs.lock import LOCK_NAME, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from trainer.runs.lock import RunLock
with RunLock(Path(sys.argv[1]), is_main=sys.argv[2] == "main"):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
time.sleep(60)
"""


class Holder:
    """A process of some run that holds `folder`."""

    def __init__(self, folder: Path, which: str = "main") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), which],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def release(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "released\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        holder.kill()


def test_a_second_run_is_told_the_folder_and_who_holds_it(tmp_path, holders):
    holders.append(Holder(tmp_path))
    with pytest.raises(UserError) as e, RunLock(tmp_path):
        pass
    assert str(e.value).startswith(
        f"output_dir {tmp_path}: is in use by process {holders[0].process.pid} on {os.uname().nodename}, since 20"
    )
    assert "\n" not in str(e.value)
    holders.append(Holder(tmp_path / "other"))


@pytest.mark.parametrize("end", ["release", "kill"])
def test_the_folder_is_free_again_however_the_holder_ends(tmp_path, holders, end):
    holders.append(Holder(tmp_path))
    getattr(holders[0], end)()
    with RunLock(tmp_path):
        pass


def test_the_processes_of_one_run_share_it_and_the_last_one_frees_it(tmp_path, holders):
    holders += [Holder(tmp_path), Holder(tmp_path, "second"), Holder(tmp_path, "third")]
    holders[0].kill()
    for holder in holders[1:]:
        with pytest.raises(UserError, match="is in use by process"), RunLock(tmp_path):
            pass
        holder.process.send_signal(signal.SIGKILL)
        holder.process.wait()
    with RunLock(tmp_path):
        pass


def test_a_holder_that_wrote_junk_is_not_repeated_and_its_lock_counts_all_the_same(tmp_path, holders):
    for junk in (b"", b"[1]", b'{"pid": 1}', b"\xff" * 5000, b'{"pid": "\\u001b[2J1", "host": "a", "since": "b"}'):
        holders.append(Holder(tmp_path))
        (tmp_path / LOCK_NAME).write_bytes(junk)
        with pytest.raises(UserError, match="is in use by") as e, RunLock(tmp_path):
            pass
        assert "\x1b" not in str(e.value) and len(str(e.value)) < 300 + len(str(tmp_path))
        holders[-1].kill()


def test_a_lock_is_closed_to_other_users_who_could_hold_it_by_reading_and_is_no_other_file(tmp_path):
    (tmp_path / LOCK_NAME).touch(0o644)
    with RunLock(tmp_path):
        assert (tmp_path / LOCK_NAME).stat().st_mode & 0o777 == 0o600
    (tmp_path / "diary").write_text("dear diary")
    (tmp_path / LOCK_NAME).unlink()
    for make in (Path.symlink_to, Path.hardlink_to):
        make(tmp_path / LOCK_NAME, tmp_path / "diary")
        with (
            pytest.raises(UserError, match=r"can't be written and locked: run\.lock is a (hard )?link"),
            RunLock(tmp_path),
        ):
            pass
        (tmp_path / LOCK_NAME).unlink()
    assert (tmp_path / "diary").read_text() == "dear diary"
    os.mkfifo(tmp_path / LOCK_NAME)
    with pytest.raises(UserError, match=r"run\.lock is not a plain file"), RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_or_locked_is_a_mistake_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: can't be written and locked: File exists"), RunLock(tmp_path / "file"):
        pass
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="can't be written and locked"), RunLock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()

    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match="can't be written and locked: No locks available"), RunLock(tmp_path / "nfs"):
        pass
