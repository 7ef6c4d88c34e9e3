"""A run of the hosted kind on real parts: rows, tools and endpoint grader over HTTP, and a judge served by vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.servers import running
from trainer.config import load_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]
FINANCE = [sys.executable, "scripts/examples/finance_server.py", "--config", "configs/quickstart.yaml"]
DEADLINE_S = 900
SMALL = [
    "model.dtype=float32",
    "warmstart.num_steps=1",
    "warmstart.episodes_per_step=3",
    "optim.num_steps=1",
    "rollout.max_turns=4",
    "rollout.max_episode_tokens=1500",
    "eval.num_tasks=2",
    "engine.kv_cache_gib=1",
]


def write_job(folder: Path, url: str) -> Path:
    """The job's JSON as the hosted service had it; the files lie next to it under their ids."""
    for name, file_id in (("train", "file-Train1"), ("eval", "file-Eval1")):
        (folder / f"{name}.jsonl").rename(folder / f"{file_id}.jsonl")
    reinforcement = {
        "grader": {"type": "endpoint", "name": "numeric", "url": f"{url}/grade", "pass_threshold": 0.6},
        "tools": [{"name": n, "server_url": f"{url}/call"} for n in ("search", "list", "cat", "calculate")],
        "max_episode_steps": 7,
        "hyperparameters": {"batch_size": 2, "compute_multiplier": 0.5, "eval_samples": 1},
    }
    job = {
        "object": "fine_tuning.job",
        "id": "ftjob-1",
        "model": "o4-mini-2025-04-16",
        "training_file": "file-Train1",
        "validation_file": "file-Eval1",
        "seed": 0,
        "method": {"type": "reinforcement", "reinforcement": reinforcement},
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


def write_base(folder: Path) -> Path:
    """What no job says: the hosted config without what a job brings."""
    base = yaml.safe_load((ROOT / "configs" / "hosted.yaml").read_text())
    for key in ("world", "data", "grader"):
        del base[key]
    for key in ("tasks_per_step", "group_size", "max_turns", "max_tool_calls"):
        del base["rollout"][key]
    (folder / "base.yaml").write_text(yaml.safe_dump(base | {"eval": {}}))
    return folder / "base.yaml"


@pytest.fixture(scope="module")
def run_folder(judge_url: str, taught_model: Path, one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosted")
    subprocess.run([*FINANCE, "--write", str(folder)], cwd=ROOT, check=True, capture_output=True)
    with running(FINANCE, folder / "tools.log", ready="/docs") as url:
        train = [sys.executable, "scripts/train.py", "--hosted-job", str(write_job(folder, url))]
        train += ["--config", str(write_base(folder)), *SMALL, f"output_dir={folder / 'run'}"]
        train += [f"model.name={taught_model}", f"warmstart.data={folder / 'conversations.jsonl'}"]
        train += [f"judge.base_url={judge_url}"]
        result = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 0, result.stderr
    assert "job.json: model: 'o4-mini-2025-04-16' is the hosted service's" in result.stdout
    return folder / "run"


def test_the_config_that_the_job_made_lies_in_the_run_folder(run_folder: Path) -> None:
    made = load_config(run_folder / "hosted_job.yaml")
    assert made == load_config(run_folder / "config.yaml")
    assert made.rollout.tasks_per_step == 2 and made.rollout.group_size == 4 and made.eval.samples_per_task == 1


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
