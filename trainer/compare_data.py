"""The policies that are compared, read from the folders of runs and of preflights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.errors import UserError
from trainer.rollout import Rollout
from trainer.run_files import is_intact, lines_in, object_in, refusal
from trainer.runs import rollout_from_json

_EVAL_FILE = re.compile(r"step-(\d+)(?:\.rank\d+)?\.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy's rollouts of one evaluation."""

    name: str
    source: str
    """Folder and step or preflight, for the reader."""
    rollouts: Sequence[Rollout]
    """Without their tokens, which are not compared."""

    def graded(self) -> dict[str, list[Rollout]]:
        """The graded rollouts by task."""
        out: dict[str, list[Rollout]] = {}
        for rollout in self.rollouts:
            if rollout.grade is not None:
                out.setdefault(rollout.task.task_id, []).append(rollout)
        return out


def read_policies(arguments: Sequence[str]) -> list[Policy]:
    """Each argument is `FOLDER`, `FOLDER@STEP` or one of them after `NAME=`. Raises `UserError`."""
    if len(arguments) < 2:
        raise UserError("expected at least two policies to compare, such as run@0 run@8 for before and after")
    parsed = [_parse(argument) for argument in arguments]
    policies = [_read(name, folder, step) for name, folder, step in parsed]
    names = [p.name for p in policies]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two policies are called {min(twice)!r}; name them apart: NAME=FOLDER")
    return policies


def _parse(argument: str) -> tuple[str, Path, int | None]:
    """(name or nothing, folder, step). A folder's own name may hold `=` and `@`: what exists as it stands is one."""
    folder, step = _with_step(argument)
    if folder.is_dir():
        return "", folder, step
    name, equals, rest = argument.partition("=")
    if not equals or not name:
        raise UserError(f"{argument}: there is no folder {folder}; expected [NAME=]FOLDER[@STEP]")
    folder, step = _with_step(rest)
    if not folder.is_dir():
        raise UserError(f"{argument}: there is no folder {folder}; expected [NAME=]FOLDER[@STEP]")
    return name, folder, step


def _with_step(text: str) -> tuple[Path, int | None]:
    found = re.fullmatch(r"(.+)@(\d+)", text)
    if found is None or Path(text).is_dir():
        return Path(text), None
    return Path(found[1]), int(found[2])


def _read(name: str, folder: Path, step: int | None) -> Policy:
    if (folder / "preflight.json").is_file() and step is None:
        rollouts = _read_file(folder / "rollouts.jsonl")
        return Policy(name=name or folder.resolve().name, source=f"{folder}, preflight", rollouts=rollouts)
    by_step: dict[int, list[Path]] = {}
    for path in sorted((folder / "evals").glob("step-*.jsonl")):
        if found := _EVAL_FILE.fullmatch(path.name):
            by_step.setdefault(int(found[1]), []).append(path)
    if not by_step:
        raise UserError(
            f"{folder}: holds no evaluation (evals/step-….jsonl); expected the folder of a run or of a preflight"
        )
    step = max(by_step) if step is None else step
    if step not in by_step:
        raise UserError(f"{folder}: holds no evaluation at step {step}; it has {', '.join(map(str, sorted(by_step)))}")
    rollouts = [rollout for path in by_step[step] for rollout in _read_file(path)]
    return Policy(name=name or f"{folder.resolve().name}@{step}", source=f"{folder}, step {step}", rollouts=rollouts)


def _read_file(path: Path) -> list[Rollout]:
    rollouts = []
    try:
        for number, line in enumerate(lines_in(path), start=1):
            if not line.endswith(b"\n"):
                # A kill cut the last line off.
                continue
            try:
                if is_intact(line) is False or (record := object_in(line)) is None:
                    raise ValueError("the line is damaged")
                rollouts.append(rollout_from_json({**record, "ledgers": []}))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: not a rollout of this project: {e!r}") from e
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the rollouts of a run or of a preflight") from None
    except OSError as e:
        raise refusal(e, path) from e
    return rollouts
