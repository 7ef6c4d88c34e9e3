"""`make rehearse-gpu` in its small form, on real engines.

With all tests its pieces with an engine or an update count as done before: runs like them are those of
test_quickstart_vllm and, under adapters, of test_hosted_vllm. `make test-learning` does every piece.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]


def rehearse(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/rehearse_gpu.py", "--cpu", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)


@pytest.mark.parametrize(
    "done_before",
    [
        pytest.param(("quickstart", "rollouts", "training", "together"), id="runs"),
        pytest.param((), marks=pytest.mark.learning, id="nothing"),
    ],
)
def test_the_rehearsal_leaves_a_json_and_a_table_and_does_nothing_twice(
    done_before: tuple[str, ...], one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path.resolve() / "rehearsal"
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    in_order = importlib.import_module("rehearse_gpu").pieces(out, on_cpu=True)
    kept = {"ok": True, "seconds": 1.0, "memory_gib": 1.0, "figures": {"steps": 1.0}}
    (out / "pieces").mkdir(parents=True)
    for piece in in_order:
        if piece.name in done_before:
            text = json.dumps({"piece": piece.name, **kept, "command": list(piece.command)})
            (out / "pieces" / f"{piece.name}.json").write_text(text)
    first = rehearse(out)
    assert first.returncode == 0, first.stdout + first.stderr
    pieces = {piece["piece"]: piece for piece in json.loads((out / "rehearsal.json").read_text())["pieces"]}
    assert list(pieces) == ["environment", "quickstart", "model", "rollouts", "training", "together"]
    assert all(piece["ok"] and piece["memory_gib"] > 0 for piece in pieces.values())
    assert "rollouts" in done_before or pieces["rollouts"]["figures"]["loop, tokens/s"] > 0
    assert "training" in done_before or pieces["training"]["figures"]["ours, tokens/s"] > 0
    for name in {"quickstart", "together"} - set(done_before):
        figures = pieces[name]["figures"]
        assert figures["steps"] == 1 and figures["time/publish_s, median of the steps"] > 0
        assert 0 < figures["canary/mismatch, nats, largest"] < 0.15
        assert name == "quickstart" or figures["throughput/trained_tokens_per_s, median of the steps"] > 0
    assert "training" in done_before or "| training | ours, tokens/s | " in first.stdout
    written = {path: path.stat().st_mtime_ns for path in (out / "pieces").iterdir()}
    second = rehearse(out)
    assert second.returncode == 0 and second.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "pieces").iterdir()} == written
