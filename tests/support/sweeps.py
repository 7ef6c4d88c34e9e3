"""Sweeps over the stand-in of scripts/train.py: their files, their processes, and what they leave."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from tests.support import ROOT
from tests.support.scripts import Ended, run_script, script_at_work

LAUNCH = shlex.join([sys.executable, "-m", "tests.support.sweep_trainer"])
SMALL: dict[str, Any] = {
    "settings": {"optim.num_steps": 3, "eval.every_steps": 1},
    "space": {
        "optim.learning_rate": {"type": "log_range", "low": 1e-5, "high": 1e-2, "num": 4},
        "rollout.group_size": [4, 8],
    },
    "parallel": {"num": 2},
    "launch": LAUNCH,
}
"""A grid of eight trials, two at once."""


class SweepUnderTest:
    """A sweep's file in a folder of its own, and the folder that the sweep makes beside it."""

    def __init__(self, folder: Path, /, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "out"
        self.path = folder / "sweep.yaml"
        self.started_file = folder / "started"
        self.environment = {"STARTED": str(self.started_file), "PYTHONPATH": str(ROOT)}
        (folder / "base.yaml").write_text(f"base: {ROOT / 'configs' / 'quickstart.yaml'}\noutput_dir: nowhere\n")
        self.write(**settings)

    def write(self, **settings: Any) -> None:
        made = {"base": "base.yaml", "output_dir": str(self.folder), **SMALL, **settings}
        self.path.write_text(yaml.safe_dump({k: v for k, v in made.items() if v is not None}, sort_keys=False))

    def at_work(self, *arguments: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
        return script_at_work("sweep", self.path, *arguments, environment=self.environment | environment)

    def run(self, *arguments: str, **environment: str) -> Ended:
        """To its end."""
        return run_script("sweep", self.path, *arguments, environment=self.environment | environment)

    def started(self) -> list[tuple[str, int]]:
        """(run, the step after which it went on) of each start, -1 for a new one."""
        if not self.started_file.exists():
            return []
        words = [line.split() for line in self.started_file.read_text().splitlines()]
        return [(name, int(step)) for name, step in words]

    def begun(self) -> Counter[str]:
        """How often each run began from nothing."""
        return Counter(name for name, step in self.started() if step < 0)

    def finished(self) -> set[str]:
        """The runs whose folders say so."""
        about = self.folder.glob("trials/*/run.json")
        return {path.parent.name for path in about if "finished_steps" in json.loads(path.read_text())}

    def best(self) -> dict[str, Any]:
        best: dict[str, Any] = yaml.safe_load((self.folder / "best.yaml").read_text())
        return best
