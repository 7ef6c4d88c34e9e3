"""An export that is ended while it is at work."""

from __future__ import annotations

import signal

import pytest

from tests.support.scripts import script_at_work, wait_for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_ended_by_a_signal_leaves_nothing_behind(finished, tmp_path, number):
    with script_at_work("export", finished, "--form", "merged", "--to", tmp_path / "out") as export:
        wait_for((tmp_path / ".unfinished-out").exists, export)
        export.send_signal(number)
        _, told = export.communicate(timeout=60)
    assert (export.returncode, told.strip()) == (130, "interrupted")
    assert not list(tmp_path.iterdir())
