"""The main job on its real parts, in small: interrupted, resumed to the end, and the adapter served over HTTP."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ROOT
from tests.support.scripts import wait_for
from tests.support.servers import running_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]
SMALL = [
    # A kind of layer in each half of a block: each is probed, which takes some seconds.
    "model.lora.target_modules=[q_proj,down_proj]",
    "warmstart={num_steps: 1, episodes_per_step: 2}",
    "optim.num_steps=1",
    "rollout.tasks_per_step=2",
    "rollout.group_size=2",
    "rollout.max_turns=3",
    "rollout.max_turn_tokens=16",
    "eval={num_tasks: 2, samples_per_task: 1}",
    "engine.kv_cache_gib=1",
]
DEADLINE_S = 900


def command(folder: Path) -> list[str]:
    train = [sys.executable, "scripts/train.py", "--config", "configs/quickstart.yaml", f"output_dir={folder}"]
    return [*train, *SMALL]


CONTAINER = """
mount -t tmpfs -o size="$1" none /dev/shm
mount --bind "$HOME" "$HOME" && mount -o remount,bind,ro "$HOME"
shift
exec "$@"
"""
ROOM = "400m"
"""Of shared memory: as much as vLLM wants on a CPU, and less than the weights take."""


def contained(argv: list[str], shared_memory: str = ROOM) -> list[str]:
    """The command in a container with little shared memory and a home that can't be written.

    As it stands where this machine lets nobody make one.
    """
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    inside = [*unshare, "sh", "-ec", CONTAINER, "sh", shared_memory]
    # Where all of it would be read-only, there is nothing to write the run to.
    is_apart = not any(Path(p).resolve().is_relative_to(Path.home()) for p in (tempfile.gettempdir(), ROOT))
    if not (shutil.which("unshare") and is_apart):
        return argv
    possible = subprocess.run([*inside, "true"], capture_output=True, check=False).returncode == 0
    return [*inside, *argv] if possible else argv


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is told to stop in the middle of its first evaluation, and is then run again to its end."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    first = subprocess.Popen(command(folder), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(folder.glob("evals/*.jsonl")), first, DEADLINE_S)
    children = psutil.Process(first.pid).children(recursive=True)
    assert any("EngineCore" in child.name() or "VLLM" in child.name() for child in children)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 130, errors
    assert "resumes" in errors
    # No process of the engine outlives the run.
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return folder


@pytest.fixture(scope="module")
def result(run_folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        contained(command(run_folder)), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def test_an_interrupted_run_is_resumed_to_the_end_by_the_same_command(
    run_folder: Path, result: subprocess.CompletedProcess[str]
) -> None:
    assert result.returncode == 0, result.stderr
    assert "resumed after step 0" in result.stderr
    for shown in ("mean reward", "tool calls per rollout", "latency per episode", "report.html", "serve it with"):
        assert shown in result.stdout
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 1]
    assert all("canary/mismatch" in r for r in records if "train/rollouts" in r)
    assert len((run_folder / "evals/step-000000.jsonl").read_text().splitlines()) == 2


def test_the_rehearsal_on_a_gpu_reads_what_a_run_took(
    run_folder: Path, result: subprocess.CompletedProcess[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    figures = importlib.import_module("rehearse_gpu").run_figures(run_folder)
    assert figures["steps"] == 1 and figures["time/publish_s, median of the steps"] > 0
    assert 0 < figures["canary/mismatch, nats, largest"] < 0.15
    assert figures["throughput/sampled_tokens_per_s, median of the steps"] > 0


def in_a_container(argv: list[str], shared_memory: str) -> subprocess.CompletedProcess[str]:
    inside = contained(argv, shared_memory)
    if inside == argv:
        pytest.skip("no mount namespaces here, or the home holds what the test writes")
    return subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_the_resumed_run_had_little_shared_memory_and_a_home_that_can_not_be_written() -> None:
    seen = in_a_container(["sh", "-c", "df -m /dev/shm | tail -1; touch ~/.new || echo no"], ROOM).stdout.split()
    assert f"{seen[1]}m" == ROOM and seen[-1] == "no"


def test_a_container_of_64_mb_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    ended = in_a_container(command(tmp_path / "run"), "64m")
    assert ended.returncode == 2 and not (tmp_path / "run").exists()
    assert re.search(r"^error: /dev/shm: 64 MiB free, .* 240 MiB.*--shm-size=1g", ended.stderr), ended.stderr


def test_the_terminal_shows_progress_and_no_library_output(result: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert any(line.startswith("step 1/1") for line in lines)
    assert len(lines) < 20, result.stderr


@pytest.fixture(scope="module")
def server(run_folder: Path, result: subprocess.CompletedProcess[str]) -> Iterator[str]:
    """The exported adapter behind the very command that the run prints."""
    serve = shlex.split(json.loads((run_folder / "run.json").read_text())["serve_command"])
    with running_vllm(serve, run_folder / "serve.log") as address:
        yield address


def test_the_exported_adapter_is_served_by_the_printed_command(run_folder: Path, server: str) -> None:
    rollout = json.loads((run_folder / "evals/step-000001.jsonl").read_text().splitlines()[0])
    body = {
        "model": "policy",
        "messages": [{"role": m["role"], "content": m["content"]} for m in rollout["task"]["messages"]],
        "tools": [
            {"type": "function", "function": {"name": "search", "description": "Find.", "parameters": _SEARCH}},
        ],
        "temperature": 0,
        "max_tokens": 40,
    }
    answer = _post(f"{server}/v1/chat/completions", body)
    assert answer["model"] == "policy"
    message = answer["choices"][0]["message"]
    assert message.get("tool_calls") or message["content"]


_SEARCH = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
