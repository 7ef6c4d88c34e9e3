"""A run of the hosted kind on real parts: rows, tools and endpoint grader over HTTP, and a judge served by vLLM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parent.parent
FINANCE = [sys.executable, "scripts/examples/finance_server.py", "--config", "configs/quickstart.yaml"]
DEADLINE_S = 600
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start_server(command: list[str], url: str, log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return process
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"waited in vain for {url}")


@pytest.fixture(scope="module")
def run_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hosted")
    subprocess.run([*FINANCE, "--write", str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    tools_port, judge_port = free_port(), free_port()
    judge = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    judge += ["--served-model-name", "judge", "--port", str(judge_port), "--host", "127.0.0.1", "--enforce-eager"]
    judge += ["--max-model-len", "1024"]
    url = f"http://127.0.0.1:{tools_port}"
    servers: list[subprocess.Popen[bytes]] = []
    try:
        servers.append(start_server([*FINANCE, "--port", str(tools_port)], f"{url}/docs", folder / "tools.log"))
        servers.append(start_server(judge, f"http://127.0.0.1:{judge_port}/health", folder / "judge.log"))
        tools = ", ".join(
            f"{{name: {name}, server_url: '{url}/call'}}" for name in ("search", "list", "cat", "calculate")
        )
        train = [sys.executable, "scripts/train.py", "--config", "configs/hosted.yaml", *SMALL]
        train += [f"output_dir={folder / 'run'}", f"world.tools=[{tools}]", f"grader.url={url}/grade"]
        train += [f"data={{train: {folder / 'train.jsonl'}, eval: {folder / 'eval.jsonl'}}}"]
        train += [
            f"warmstart.data={folder / 'conversations.jsonl'}",
            f"judge.base_url=http://127.0.0.1:{judge_port}/v1",
        ]
        result = subprocess.run(train, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert result.returncode == 0, result.stderr + (folder / "judge.log").read_text()[-2000:]
        yield folder / "run"
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


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
