"""Slow: the quickstart learns. `make test-learning` runs it; some twenty minutes on two cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.learning, pytest.mark.vllm, pytest.mark.timeout(5400)]
REPOSITORY = Path(__file__).parent.parent


def test_the_quickstart_raises_the_reward_and_saves_calls_and_tokens_on_held_out_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "scripts/train.py", "--config", "configs/quickstart.yaml", f"output_dir={folder}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "mean reward" in result.stdout
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [r for r in records if "eval/reward" in r]
    assert after["eval/reward"] >= before["eval/reward"] + 0.30
    assert after["eval/tool_calls"] <= 0.70 * before["eval/tool_calls"]
    assert after["eval/completion_tokens"] <= 0.70 * before["eval/completion_tokens"]
    assert all(r["canary/applied_since_model"] > 0.9 for r in records if "canary/applied_since_model" in r)
