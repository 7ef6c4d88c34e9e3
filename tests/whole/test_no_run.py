"""What every program says of a place that holds no run, or of a run that has come to nothing yet: one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.configs import scripted_config
from tests.support.scripts import run_script
from trainer.config import validate_config
from trainer.runs.folder import RunFolder

OPTIONS = {"compare": ["other", "--out", "page"], "watch": ["--once"], "serve": ["--", "--headless"]}


def told(name: str, run: Path, *more: str) -> str:
    """What the program says of it on its standard error, the place left out."""
    ended = run_script(name, run, *more, *(run.parent / o if o[0] != "-" else o for o in OPTIONS.get(name, [])))
    *before, last = ended.stderr.splitlines()
    assert ended.returncode == 2 and ended.stdout == "", ended
    assert before in ([], [f"getting {run} ready, which takes half a minute or more"])
    return last.replace(str(run), "RUN")


@pytest.mark.parametrize("name", ["export", "chat", "report", "watch", "serve", "compare"])
def test_a_place_that_is_no_run_is_told_for_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    none, file, empty = (told(name, tmp_path / what) for what in ("none", "file", "empty"))
    if name == "compare":
        assert none == "error: RUN: there is no folder RUN; expected [NAME=]FOLDER[@STEP]"
        assert file == "error: RUN: RUN is a file; expected [NAME=]FOLDER[@STEP]"
        return
    assert none == "error: RUN: there is no such folder; expected the folder of a run"
    assert file == "error: RUN: is a file; expected the folder of a run"
    assert empty.startswith("error: RUN: holds no ")
    assert empty.endswith("; expected the folder of a run, its output_dir")


def test_a_run_that_has_come_to_nothing_yet_is_told_for_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder.create(validate_config(scripted_config(run, tmp_path / "model"), source="test"))
    (tmp_path / "other").mkdir()
    assert told("compare", run).endswith("expected the folder of a run that has come to one, or of a preflight")
    assert told("chat", run) == "error: RUN: holds neither a final adapter nor a checkpoint yet"
    unfinished = "error: RUN: has not ended, so there is no final adapter yet; it keeps no checkpoint yet either"
    assert told("export", run) == told("serve", run) == unfinished
    assert told("export", run, "--step", "2") == "error: --step 2: RUN keeps no checkpoint of this step, nor any yet"
    (run / "run.json").unlink()
    assert told("export", run) == "error: RUN/run.json: is missing; the command that made the run makes it anew"
