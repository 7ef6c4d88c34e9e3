"""What lies in a run folder, for the report; what could not be read is named in `RunData.notes`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.reports.run_reader import METRICS, read_text, records_in, records_of_step
from trainer.run_files import object_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One rollout of an evaluation, reduced to what the report shows."""

    task_id: str
    reward: float
    stop_reason: str
    explanation: str
    parts: Mapping[str, float]
    messages: list[dict[str, Any]]
    item: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The run folder's contents."""

    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    """`run.json`."""
    steps: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """All figures of a step, training and evaluation together, in the order of the steps."""
    before: list[Sample] = field(default_factory=list)
    after: list[Sample] = field(default_factory=list)
    """Rollouts of the first and the last evaluation; `after` is empty where there was only one."""
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever the step has a finite value."""
        return [(s, row[key]) for s, row in self.steps.items() if key in row and math.isfinite(row[key])]

    def keys(self, prefix: str) -> list[str]:
        """Names of the metrics that begin with `prefix`, sorted."""
        return sorted({k for row in self.steps.values() for k in row if k.startswith(prefix)})

    @property
    def eval_steps(self) -> list[int]:
        return _steps_with(self.steps, "eval/")

    @property
    def train_steps(self) -> list[int]:
        return _steps_with(self.steps, "train/")


def read_run(run_folder: Path) -> RunData:
    """Raises `FileNotFoundError` only where the folder itself is missing."""
    if not run_folder.is_dir():
        raise FileNotFoundError(f"no run folder at {run_folder}")
    notes: list[str] = []
    config_text = read_text(run_folder / "config.yaml", notes)
    try:
        config = yaml.safe_load(config_text) or {}
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
        config = {}
        notes.append("config.yaml is not valid YAML")
    about = read_text(run_folder / "run.json", notes)
    info = object_in(about.encode())
    if about and info is None:
        notes.append("run.json is not valid JSON")
    steps = _read_steps(run_folder / METRICS, notes)
    evals = _steps_with(steps, "eval/")
    return RunData(
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        info=info or {},
        steps=steps,
        before=_read_samples(run_folder, evals[0], notes) if evals else [],
        after=_read_samples(run_folder, evals[-1], notes) if len(evals) > 1 else [],
        notes=notes,
    )


def _steps_with(steps: Mapping[int, Mapping[str, float]], prefix: str) -> list[int]:
    return [step for step, row in steps.items() if any(key.startswith(prefix) for key in row)]


def _read_steps(path: Path, notes: list[str]) -> dict[int, dict[str, float]]:
    """Rows of one step are merged; of a step done twice (after a resume) the later figures count."""
    steps: dict[int, dict[str, float]] = {}
    for row in records_in(path, notes, dict, what="step's figures"):
        step = row.get("step")
        if isinstance(step, int):
            numbers = {k: n for k, v in row.items() if k != "step" and (n := _number(v)) is not None}
            steps.setdefault(step, {}).update(numbers)
    return dict(sorted(steps.items()))


def _read_samples(run_folder: Path, step: int, notes: list[str]) -> list[Sample]:
    """Graded rollouts only, of all processes; a masked one has no reward to compare."""
    samples = []
    for row in records_of_step(run_folder / "evals", step, notes, dict, what="rollout"):
        episode, grade, task = _mapping(row, "episode"), _mapping(row, "grade"), _mapping(row, "task")
        reward = _number(grade.get("reward"))
        if reward is None:
            continue
        messages = episode.get("messages")
        samples.append(
            Sample(
                task_id=str(episode.get("task_id") or task.get("task_id") or ""),
                reward=reward,
                stop_reason=str(episode.get("stop_reason") or ""),
                explanation=str(grade.get("explanation") or ""),
                parts={k: n for k, v in _mapping(grade, "parts").items() if (n := _number(v)) is not None},
                messages=[m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else [],
                item=_mapping(task, "item"),
            )
        )
    return samples


def _number(value: object) -> float | None:
    """None for what is none, also for JSON's integers that no float holds."""
    with contextlib.suppress(OverflowError):
        return float(value) if isinstance(value, int | float) else None
    return None


def _mapping(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, dict) else {}
