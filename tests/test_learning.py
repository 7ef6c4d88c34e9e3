"""Slow: the shipped configs learn. `make test-learning` runs it; twenty minutes and up to an hour on two cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.learning, pytest.mark.vllm, pytest.mark.timeout(7200)]
REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("config", "reward", "calls", "tokens"),
    [
        pytest.param("quickstart", 0.30, -0.30, -0.30, id="quickstart"),
        # What the published demo reports.
        pytest.param("finance_cpu", 0.14, -0.39, -0.40, id="full corpus"),
    ],
)
def test_training_raises_the_reward_and_saves_calls_and_tokens_on_held_out_tasks(
    tmp_path: Path, config: str, reward: float, calls: float, tokens: float
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "scripts/train.py", "--config", f"configs/{config}.yaml", f"output_dir={folder}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "mean reward" in result.stdout
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [r for r in records if "eval/reward" in r]
    assert after["eval/reward"] >= before["eval/reward"] + reward
    assert after["eval/tool_calls"] <= (1 + calls) * before["eval/tool_calls"]
    assert after["eval/completion_tokens"] <= (1 + tokens) * before["eval/completion_tokens"]
    assert all(r["canary/applied_since_model"] > 0.9 for r in records if "canary/applied_since_model" in r)
