"""An export that is ended while it is at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_ended_by_a_signal_leaves_nothing_behind(finished, tmp_path, number):
    command = [sys.executable, "scripts/export.py", str(finished), "--form", "merged", "--to", str(tmp_path / "out")]
    export = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Under nohup it is ignored, as it should be.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while not (tmp_path / ".unfinished-out").exists():
        assert export.poll() is None
        time.sleep(0.01)
    export.send_signal(number)
    _, told = export.communicate(timeout=60)
    assert (export.returncode, told.decode().strip()) == (130, "interrupted")
    assert not list(tmp_path.iterdir())
