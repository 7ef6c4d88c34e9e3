"""Slow: the shipped configs learn. `make test-learning` runs it; twenty minutes and up to an hour on two cores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.learning, pytest.mark.vllm, pytest.mark.timeout(7200)]


def run_script(script: str, *arguments: str) -> str:
    command = [sys.executable, f"scripts/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
    printed = run_script("train.py", "--config", f"configs/{config}.yaml", f"output_dir={folder}")
    assert "mean reward" in printed
    records = metrics(folder)
    before, *_, after = [r for r in records if "eval/reward" in r]
    assert after["eval/reward"] >= before["eval/reward"] + reward
    assert after["eval/tool_calls"] <= (1 + calls) * before["eval/tool_calls"]
    assert after["eval/completion_tokens"] <= (1 + tokens) * before["eval/completion_tokens"]
    assert all(r["canary/applied_since_model"] > 0.9 for r in records if "canary/applied_since_model" in r)


def test_a_model_that_thinks_under_qwen3s_template_calls_tools_and_ends_with_answers(tmp_path: Path) -> None:
    example, folder = tmp_path / "thinking-model", tmp_path / "run"
    run_script("examples/thinking_model.py", "--write", str(example))
    settings = [f"model.name={example}/model", f"warmstart.data={example}/conversations.jsonl", "optim.num_steps=1"]
    run_script("train.py", "--config", "configs/thinking.yaml", f"output_dir={folder}", *settings)
    records = metrics(folder)
    before, after = [r for r in records if "eval/reward" in r]
    for evaluated in (before, after):
        assert evaluated["eval/answered"] > 0.2 and evaluated["eval/tool_calls"] > 1
        assert evaluated["eval/reasoning_tokens"] > 20
    assert records[-1]["canary/applied_since_model"] > 0.9
