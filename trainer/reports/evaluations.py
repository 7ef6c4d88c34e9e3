"""What is compared: evaluations, read from the folders of runs and of preflights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.errors import UserError
from trainer.reports.run_reader import read_steps, records_in, records_of_step, steps_in
from trainer.runs.records import rollout_from_json
from trainer.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One policy's rollouts of the same tasks as another's."""

    name: str
    source: str
    """Folder and step or preflight, for the reader."""
    rollouts: Sequence[Rollout]
    """Without their tokens, which are not compared."""
    notes: Sequence[str] = ()
    """What of them could not be read."""

    def graded(self) -> dict[str, list[Rollout]]:
        """The graded rollouts by task."""
        out: dict[str, list[Rollout]] = {}
        for rollout in self.rollouts:
            if rollout.grade is not None:
                out.setdefault(rollout.task.task_id, []).append(rollout)
        return out


def read_evaluation(folder: Path, step: int, *, name: str, num_rollouts: float | None) -> Evaluation:
    """The evaluation after `step`, of all processes, as far as it can be read. `num_rollouts`: what metrics count."""
    notes: list[str] = []
    rollouts = list(records_of_step(folder / "evals", step, notes, rollout_without_tokens, what="rollout"))
    if num_rollouts is not None and len(rollouts) < num_rollouts:
        notes.append(f"evaluation after {step} steps: {len(rollouts)} of {num_rollouts:.0f} rollouts could be read")
    return Evaluation(name=name, source=f"{folder}, step {step}", rollouts=rollouts, notes=notes)


def rollout_without_tokens(record: dict[str, Any]) -> Rollout:
    """Raises whatever a record that is none makes of it."""
    rollout = rollout_from_json({**record, "ledgers": []})
    if rollout.grade is not None and not math.isfinite(rollout.grade.reward):
        raise ValueError("a reward is no number")
    return rollout


def read_evaluations(arguments: Sequence[str]) -> list[Evaluation]:
    """Each argument is `FOLDER`, `FOLDER@STEP` or one of them after `NAME=`. Raises `UserError`."""
    if len(arguments) < 2:
        raise UserError("expected at least two policies to compare, such as run@0 run@8 for before and after")
    parsed = [_parse(argument) for argument in arguments]
    evaluations = [_read(name, folder, step) for name, folder, step in parsed]
    names = [e.name for e in evaluations]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two policies are called {min(twice)!r}; name them apart: NAME=FOLDER")
    return evaluations


def _parse(argument: str) -> tuple[str, Path, int | None]:
    """(name or nothing, folder, step). A folder's own name may hold `=` and `@`: what exists as it stands is one."""
    folder, step = _with_step(argument)
    if folder.is_dir():
        return "", folder, step
    name, equals, rest = argument.partition("=")
    if not equals or not name:
        raise _no_folder(argument, folder)
    folder, step = _with_step(rest)
    if not folder.is_dir():
        raise _no_folder(argument, folder)
    return name, folder, step


def _no_folder(argument: str, folder: Path) -> UserError:
    what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
    return UserError(f"{argument}: {what}; expected [NAME=]FOLDER[@STEP]")


def _with_step(text: str) -> tuple[Path, int | None]:
    found = re.fullmatch(r"(.+)@(\d+)", text)
    if found is None or Path(text).is_dir():
        return Path(text), None
    return Path(found[1]), int(found[2])


def _read(name: str, folder: Path, step: int | None) -> Evaluation:
    if (folder / "preflight.json").is_file() and step is None:
        evaluation = _of_preflight(folder, name or folder.resolve().name)
    else:
        steps = steps_in(folder / "evals")
        if not steps:
            raise UserError(
                f"{folder}: holds no evaluation (evals/step-….jsonl); expected the folder of a run that has come to "
                "one, or of a preflight"
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"{folder}: holds no evaluation at step {step}; it has {', '.join(map(str, steps))}")
        figures = read_steps(folder, [])
        name = name or f"{folder.resolve().name}@{step}"
        counted = figures.get(step, {}).get("eval/rollouts")
        evaluation = read_evaluation(folder, step, name=name, num_rollouts=counted)
        if counted is None and any("eval/rollouts" in of_step for of_step in figures.values()):
            told = f"evaluation after {step} steps: has not ended; the rollouts that take longest are missing"
            evaluation = replace(evaluation, notes=[*evaluation.notes, told])
    if not evaluation.rollouts:
        raise UserError(f"{evaluation.source}: holds no rollout; {'; '.join(evaluation.notes) or 'its file is empty'}")
    return evaluation


def _of_preflight(folder: Path, name: str) -> Evaluation:
    path = folder / "rollouts.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the rollouts of a run or of a preflight")
    notes: list[str] = []
    rollouts = list(records_in(path, notes, rollout_without_tokens, what="rollout"))
    return Evaluation(name=name, source=f"{folder}, preflight", rollouts=rollouts, notes=notes)
