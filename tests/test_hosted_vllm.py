"""A run of the hosted kind on real parts: rows, tools and endpoint grader over HTTP, and a judge served by vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import REPOSITORY, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]
FINANCE = [sys.executable, "scripts/examples/finance_server.py", "--config", "configs/quickstart.yaml"]
DEADLINE_S = 900
SMALL = [
    "warmstart.num_steps=6",
    "warmstart.episodes_per_step=6",
    "optim.num_steps=1",
    "rollout.tasks_per_step=2",
    "rollout.group_size=4",
    "rollout.max_turns=4",
    "eval={num_tasks: 2, samples_per_task: 1}",
    "engine.kv_cache_gib=1",
]


@pytest.fixture(scope="module")
def run_folder(judge_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosted")
    subprocess.run([*FINANCE, "--write", str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    with running(FINANCE, folder / "tools.log", ready="/docs") as url:
        tools = ", ".join(
            f"{{name: {name}, server_url: '{url}/call'}}" for name in ("search", "list", "cat", "calculate")
        )
        train = [sys.executable, "scripts/train.py", "--config", "configs/hosted.yaml", *SMALL]
        train += [f"output_dir={folder / 'run'}", f"world.tools=[{tools}]", f"grader.url={url}/grade"]
        train += [f"data={{train: {folder / 'train.jsonl'}, eval: {folder / 'eval.jsonl'}}}"]
        train += [f"warmstart.data={folder / 'conversations.jsonl'}", f"judge.base_url={judge_url}"]
        result = subprocess.run(train, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def rollouts(run_folder: Path) -> list[dict[str, Any]]:
    files = [*run_folder.glob("rollouts/*.jsonl"), *run_folder.glob("evals/*.jsonl")]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_tools_were_called_over_the_network(run_folder: Path) -> None:
    results = [r for x in rollouts(run_folder) for t in x["episode"]["turns"] for r in t["results"]]
    answered = [r for r in results if r["error"] is None]
    assert answered and all(r["output"] for r in answered)
    (step,) = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines() if "train/" in x]
    (requests,) = [v for k, v in step.items() if k.startswith("http/127.0.0.1_") and k.endswith("/requests")]
    assert requests > 0


def test_the_endpoint_gave_the_scores_and_the_judge_watched(run_folder: Path) -> None:
    found = rollouts(run_folder)
    assert len(found) == 2 + 8 + 2
    for rollout in found:
        assert rollout["grade"]["parts"]["numeric"] in (0.0, 0.5, 1.0)
        assert not rollout["grade"]["errors"]
        # What an untrained judge says is its own affair; that it answered in the format is ours.
        assert 0 <= rollout["watch"]["parts"]["judge"] <= 1
    assert sum(sum(r["watch"]["judge_tokens"].values()) for r in found) > 0
    (step,) = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines() if "train/" in x]
    assert step["judge/requests"] > 0 and "train/watch/divergence" in step
