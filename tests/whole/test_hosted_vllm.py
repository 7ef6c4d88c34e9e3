"""A run of the hosted kind on real parts: rows, tools and endpoint grader over HTTP, and a judge served by vLLM."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.user_code import load_target
from tests.support import ROOT
from tests.support.servers import running
from trainer.config import load_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400), pytest.mark.filterwarnings("ignore")]
FINANCE = [sys.executable, "scripts/examples/finance_server.py", "--config", "configs/quickstart.yaml"]
SMALL = [
    "model.dtype=float32",
    "warmstart.num_steps=1",
    "warmstart.episodes_per_step=3",
    "optim.num_steps=1",
    "rollout.max_turns=4",
    "rollout.max_episode_tokens=1500",
    "eval.num_tasks=2",
    "engine.kv_cache_gib=1",
    "engine.publish=lora",
    "loss.kl_coef=0.001",
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
        given = ["--hosted-job", str(write_job(folder, url))]
        given += ["--config", str(write_base(folder)), *SMALL, f"output_dir={folder / 'run'}"]
        given += [f"model.name={taught_model}", f"warmstart.data={folder / 'conversations.jsonl'}"]
        given += [f"judge.base_url={judge_url}"]
        with as_its_own_process(["train.py", *given]), contextlib.redirect_stdout(io.StringIO()) as said:
            assert load_target(f"{ROOT / 'scripts' / 'train.py'}:main", key="script")() == 0
    assert "job.json: model: 'o4-mini-2025-04-16' is the hosted service's" in said.getvalue()
    return folder / "run"


@contextlib.contextmanager
def as_its_own_process(command: list[str]) -> Iterator[None]:
    """Spared the imports of one; what the script sets for its process is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", command)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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


def test_the_rehearsal_on_a_gpu_reads_what_a_run_under_adapters_took(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    figures = importlib.import_module("rehearse_gpu").run_figures(run_folder)
    assert figures["steps"] == 1 and figures["time/publish_s, median of the steps"] > 0
    assert 0 < figures["canary/mismatch, nats, largest"] < 0.15
    assert figures["throughput/trained_tokens_per_s, median of the steps"] > 0
