"""The rehearsal on a GPU, apart from its pieces: what is kept of each, what is done again, what ends."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from envs.errors import UserError
from tests.support import ROOT


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("rehearse_gpu")


def test_the_pieces_take_twenty_five_minutes_on_a_gpu_and_are_the_same_on_a_cpu(rehearsal: Any, tmp_path: Path) -> None:
    for on_cpu in (True, False):
        pieces = rehearsal.pieces(tmp_path, on_cpu=on_cpu)
        assert sum(piece.limit_s for piece in pieces) == 25 * 60 * (4 if on_cpu else 1)
        assert [p.name for p in pieces] == ["environment", "quickstart", "model", "rollouts", "training", "together"]


def test_every_setting_of_the_pieces_is_one_of_the_configs(rehearsal: Any, tmp_path: Path) -> None:
    from trainer.config import load_config

    for on_cpu in (True, False):
        for piece in rehearsal.pieces(tmp_path, on_cpu=on_cpu):
            overrides = [word for word in piece.command if "=" in word and not word.startswith("output_dir")]
            config = load_config(ROOT / "configs/quickstart.yaml", overrides)
            if piece.name in ("quickstart", "together"):
                assert config.engine.publish == "lora" and config.warmstart is not None


def pieces_of(rehearsal: Any, **programs: str) -> list[Any]:
    return [
        rehearsal.Piece(name=name, limit_s=3, command=["-c", program], figures=lambda: {"made, things": 3.0})
        for name, program in programs.items()
    ]


def test_what_failed_is_done_again_and_what_is_done_is_not(
    rehearsal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    fails = f"import os, sys; sys.exit('no card' if not os.path.exists({str(tmp_path / 'card')!r}) else 0)"
    own = pieces_of(rehearsal, first=count, second=fails)
    monkeypatch.setattr(rehearsal, "pieces", lambda out, on_cpu: own)
    done = rehearsal.rehearse(tmp_path / "out", on_cpu=True)
    assert [piece["ok"] for piece in done] == [True, False]
    assert done[1]["why"] == "exit code 1" and "no card" in Path(done[1]["log"]).read_text()
    table = rehearsal.table(done)
    assert "| first | made, things | 3 |" in table and "| second | failed | exit code 1 |" in table
    (tmp_path / "card").touch()
    (tmp_path / "out" / "pieces" / "second.json").write_text("[]")
    again = rehearsal.rehearse(tmp_path / "out", on_cpu=True)
    assert again[0] == done[0] and again[1]["ok"]
    assert (tmp_path / "count").read_text() == "x", "the first was done once"
    assert json.loads((tmp_path / "out" / "rehearsal.json").read_text())["pieces"] == again
    monkeypatch.setattr(rehearsal, "pieces", lambda out, on_cpu: pieces_of(rehearsal, first="pass"))
    with pytest.raises(UserError, match="holds another rehearsal's first"):
        rehearsal.rehearse(tmp_path / "out", on_cpu=True)


def test_a_folder_of_any_name_is_the_one_that_is_used_and_a_file_in_its_place_is_told(
    rehearsal: Any, tmp_path: Path
) -> None:
    from trainer.config import load_config

    out = tmp_path / "a: b #1"
    for piece in rehearsal.pieces(out, on_cpu=True):
        overrides = [word for word in piece.command if "=" in word]
        config = load_config(ROOT / "configs/quickstart.yaml", overrides)
        if piece.name in ("quickstart", "together"):
            assert config.output_dir == out / piece.name
        if piece.name == "together":
            assert config.model.name == str(out / "model")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file: .* expected a folder"):
        rehearsal.rehearse(tmp_path / "file", on_cpu=True)


def test_a_piece_past_its_limit_ends_with_all_that_it_started(
    rehearsal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child, as an engine would, takes no notice of SIGTERM."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr(rehearsal, "_END_S", 0.5)
    (piece,) = pieces_of(rehearsal, slow=parent)
    (tmp_path / "logs").mkdir()
    done = rehearsal.run_piece(piece, tmp_path, on_cpu=True)
    assert not done["ok"] and done["why"] == "not done after 3 s"
    assert done["memory_gib"] > 0
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child lives"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /dev/shm")
def test_without_a_card_the_environment_names_the_other_form(rehearsal: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="torch sees no GPU; with --cpu"):
        rehearsal.look_at_environment(on_cpu=False)
