"""The page of a run that is at work, in a real browser: it loads itself anew and its reader stays where they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.written_runs import HOSTILE, make_rollout, write_run
from tests.trainer.reports.test_transcripts_browser import driver
from trainer.reports import run_report
from trainer.reports.run_report import write_report

pytestmark = pytest.mark.skipif(driver.installed() is None, reason=driver.HOW_TO_INSTALL)
CONFIG = "optim: {num_steps: 3}\n" + "".join(f"# line {i}\n" for i in range(200))


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(run_report, "REFRESH_S", 0.3)
    with driver.browser(width_px=900, height_px=500) as window:
        yield window


def add_step(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "train/reward": step / 4, f"of {HOSTILE}": 1.0}) + "\n")


def test_a_page_follows_its_run_from_a_file_and_is_still_once_the_run_has_finished(tmp_path: Path, window: Any) -> None:
    run = write_run(tmp_path / "run", {"evals/step-000000.jsonl": [make_rollout(f"r {HOSTILE}", output=HOSTILE)]})
    (run / "config.yaml").write_text(CONFIG)
    add_step(run, 1)
    window.open(write_report(run).as_uri())
    window.wait("return document.readyState === 'complete'")
    window.script("document.querySelector('#config').closest('details').open = true; window.scrollTo(0, 700)")
    add_step(run, 2)
    write_report(run)
    window.wait("return document.querySelector('.facts').textContent.includes('2 of 3')")
    window.wait("return document.querySelector('#config').closest('details').open && window.scrollY === 700")

    # Who selects something to copy it keeps it.
    window.script("getSelection().selectAllChildren(document.querySelector('h1')); window.here = true")
    window.script("window.t = performance.now()")
    window.wait("return performance.now() - window.t > 1500")
    assert window.script("return window.here")
    window.script("getSelection().removeAllRanges()")

    add_step(run, 3)
    write_report(run, is_over=True)
    window.wait("return document.querySelector('.facts').textContent.includes('3 of 3')")
    assert window.script("return document.scripts.length") == 0
    window.script("window.here = true; window.t = performance.now()")
    window.wait("return performance.now() - window.t > 1500")
    assert window.script("return window.here && window.scrollY") > 0
    assert window.errors() == [], "the page's policy let its own script run, and no other"
    assert window.script("return window.pwned === undefined")
