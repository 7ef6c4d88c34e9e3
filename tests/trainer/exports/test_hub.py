"""`scripts/export.py --push` against a stand-in of the hub that speaks its protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.hub import TOKEN, RunningHub


def pushed(run: Path, repo_id: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it. Without hf_xet, whose storage the stand-in does not speak."""
    told = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    command = [sys.executable, "scripts/export.py", str(run), "--push", repo_id, *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | told | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_an_export_is_pushed_whole_into_a_private_repository(run_folder, tmp_path):
    folder = tmp_path / "out"
    with RunningHub() as hub:
        ended = pushed(run_folder, "agent-v1", "--to", str(folder), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert ended.returncode == 0, ended.stderr
        assert hub.repos == {"someone/agent-v1": True}
        kept = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert {path: data for (_, path), data in hub.files.items()} == kept
        assert "adapter_model.safetensors" in kept and "README.md" in kept
        assert f"pushed    {hub.url}/someone/agent-v1/commit/" in ended.stdout


@pytest.mark.parametrize(
    ("repo_id", "environment", "may_write", "said"),
    [
        ("agent", {"HF_TOKEN": "hf_wrong"}, True, "refuses: Invalid username or password.; is HF_TOKEN right?"),
        ("agent", {"HF_TOKEN": TOKEN}, False, "has the token the right to write there?"),
        ("a/b/c", {"HF_TOKEN": TOKEN}, True, "expected NAME or OWNER/NAME"),
        ("agent", {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, True, "HF_HUB_OFFLINE is set"),
        ("agent", {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, True, "can't be reached"),
    ],
)
def test_what_keeps_from_pushing_is_told_before_anything_is_exported(
    run_folder, tmp_path, repo_id, environment, may_write, said
):
    with RunningHub() as hub:
        hub.may_write = may_write
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        ended = pushed(run_folder, repo_id, "--to", str(tmp_path / "out"), **(home | environment))
    assert ended.returncode == 2, ended.stderr
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert said in line and not (tmp_path / "out").exists() and not hub.files
