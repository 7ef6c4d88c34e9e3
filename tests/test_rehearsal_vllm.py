"""`make rehearse-gpu` in its small form, on real engines: every piece, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from servers import REPOSITORY

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]


def rehearse(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/rehearse_gpu.py", "--cpu", "--out", str(out)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3000, check=False)


def test_the_rehearsal_leaves_a_json_and_a_table_and_does_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "rehearsal"
    first = rehearse(out)
    assert first.returncode == 0, first.stdout + first.stderr
    pieces = {piece["piece"]: piece for piece in json.loads((out / "rehearsal.json").read_text())["pieces"]}
    assert list(pieces) == ["environment", "quickstart", "model", "rollouts", "training", "together"]
    assert all(piece["ok"] and piece["memory_gib"] > 0 for piece in pieces.values())
    assert pieces["rollouts"]["figures"]["loop, tokens/s"] > 0
    assert pieces["training"]["figures"]["ours, tokens/s"] > 0
    for name in ("quickstart", "together"):
        figures = pieces[name]["figures"]
        assert figures["steps"] == 1 and figures["time/publish_s, median of the steps"] > 0
        assert 0 < figures["canary/mismatch, nats, largest"] < 0.15
    assert pieces["together"]["figures"]["throughput/trained_tokens_per_s, median of the steps"] > 0
    assert "| training | ours, tokens/s | " in first.stdout
    written = {path: path.stat().st_mtime_ns for path in (out / "pieces").iterdir()}
    second = rehearse(out)
    assert second.returncode == 0 and second.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "pieces").iterdir()} == written
