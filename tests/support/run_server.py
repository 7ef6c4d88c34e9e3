"""Runs of the scripted engine in processes of their own, and what of two run folders has to be the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import yaml

from tests.support import ROOT
from tests.support.configs import scripted_config

MOST_S = 300.0
SAME_EVERYWHERE = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Torch then computes the same bits on every x86-64."""


class Server:
    """Runs configs, each in a process of its own; see scripted_run.py."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.scripted_run", "--serve", str(model)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | SAME_EVERYWHERE | {"PYTHONWARNINGS": "ignore"},
        )
        assert self._line() == "ready"

    def start(self, config: Path, *, processes: int = 1) -> int:
        """The id of the process, or of the main one of several."""
        assert self._process.stdin
        self._process.stdin.write(f"{processes} {config}\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The exit status, the worst of several processes'; -9 after SIGKILL."""
        return int(self._line())

    def outcome(self, config: Path) -> str:
        """What the run says that refuses; nothing where it comes to its end."""
        said = config.with_suffix(".error")
        said.unlink(missing_ok=True)
        pid = self.start(config)
        hung = threading.Timer(MOST_S, os.kill, (pid, signal.SIGKILL))
        hung.start()
        status = self.wait()
        hung.cancel()
        return "" if status == 0 else said.read_text() if status == 2 else f"ended with status {status}"

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        assert line, "the server of runs has ended"
        return line


SMALL: dict[str, dict[str, object]] = {
    "model": {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}},
    "rollout": {"tasks_per_step": 1},
    "eval": {"every_steps": 3, "num_tasks": 1},
}
"""Of a run that takes half as long: four rollouts a step."""


def write_config(folder: Path, model: Path, num_steps: int, /, **sections: dict[str, object]) -> Path:
    """Half of the steps have a checkpoint of their own, so that a kill also loses finished steps."""
    own: dict[str, dict[str, object]] = {
        "optim": {"num_steps": num_steps},
        "checkpoint": {"every_steps": 2},
        "eval": {"every_steps": 3},
        "curriculum": {"floor": 0.2},
    }
    config = scripted_config(folder, model, **own | sections)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def num_rollouts(folder: Path, files: str = "step-*.jsonl") -> int:
    count = 0
    for path in folder.glob(f"rollouts/{files}"):
        with contextlib.suppress(FileNotFoundError):  # a resumed run deletes what it does anew
            count += path.read_bytes().count(b"\n")
    return count


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if "time/" not in key and not key.endswith(("_s", "per_s"))}
        for row in lines(folder / "metrics.jsonl")
    ]


def result(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """What a run is there for: the adapter's files and the metrics."""
    return {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}, metrics(folder)
