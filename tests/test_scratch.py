"""The scratch folder: it goes with the run, and what a killed run left behind is found at the next start."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from trainer.scratch import Scratch, sweep

OWNER = """
import subprocess, sys, time
from pathlib import Path
from trainer.scratch import Scratch
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
