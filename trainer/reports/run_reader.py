"""Whatever can be read of a run folder, for people; what can't be is named.

A run may be young, interrupted or damaged, of an older version, or still at work: every piece is optional. Each process
of a run writes a file of its own, and all of them are read.

*Covered*: lines cut off by a kill, damaged ones (by their digest), missing files, links and pipes in a file's place.
*Not covered*: rollouts that were deleted together with their lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainer.runs.files import is_intact, lines_in, object_in, read_document, step_files

METRICS = "metrics.jsonl"
UNREADABLE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    RecursionError,
)
T = TypeVar("T")
_STEPS_END = 10**15
"""A step's files have names of so many digits."""
_NUMBERS_END = 1e300


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The run folder's contents."""

    config_text: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    """`run.json`."""
    steps: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """All figures of a step, training and evaluation together, in the order of the steps; finite ones."""
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever the step has a value."""
        return [(s, row[key]) for s, row in self.steps.items() if key in row]

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
    if not isinstance(config, dict):
        notes.append("config.yaml holds no config")
    about = read_text(run_folder / "run.json", notes)
    info = object_in(about.encode())
    if about and info is None:
        notes.append("run.json holds no JSON object")
    return RunData(
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        info=info or {},
        steps=read_steps(run_folder, notes),
        notes=notes,
    )


def _steps_with(steps: Mapping[int, Mapping[str, float]], prefix: str) -> list[int]:
    return [step for step, row in steps.items() if any(key.startswith(prefix) for key in row)]


def read_steps(run_folder: Path, notes: list[str]) -> dict[int, dict[str, float]]:
    """The figures of metrics.jsonl by step. Rows of one step are merged; of a step done twice the later ones count.

    What is no finite number, or too large to be drawn and added up, is no figure; `notes` then says so.
    """
    steps: dict[int, dict[str, float]] = {}
    odd: list[str] = []
    for step, row in records_in(run_folder / METRICS, notes, _step_and_row, what="step's figures"):
        numbers = {k: n for k, v in row.items() if (n := _number(v)) is not None}
        figures = steps.setdefault(step, {})
        for key in [key for key in row if key not in numbers]:
            figures.pop(key, None)
            odd.append(f"{key} of step {step}")
        figures.update(numbers)
    if odd:
        others = f" and {len(odd) - 2} more" if len(odd) > 2 else ""
        notes.append(f"{METRICS}: {', '.join(odd[:2])}{others}: no finite number, or too large, left out")
    return dict(sorted(steps.items()))


def _step_and_row(record: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Raises `ValueError` for a row of no step that a run can come to."""
    step = record.pop("step", None)
    if type(step) is not int or not 0 <= step < _STEPS_END:
        raise ValueError("names no step")
    return step, record


def _number(value: object) -> float | None:
    """None for what is none, not finite, or so large that a sum or a difference of two may be more than floats hold."""
    return float(value) if isinstance(value, int | float) and abs(value) < _NUMBERS_END else None


# ---- files


def read_text(path: Path, notes: list[str]) -> str:
    """The whole file; empty where it can't be read, which `notes` then says."""
    try:
        return read_document(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except OSError as e:
        notes.append(f"{path.name}: {e.strerror or e}")
    return ""


def records_in(path: Path, notes: list[str], of: Callable[[dict[str, Any]], T], *, what: str) -> Iterator[T]:
    """What `of` makes of each line's object, line by line: files of rollouts are large.

    A line that holds no object, is not as it was written, or of which `of` makes nothing but an error is passed over;
    `notes` then says so, and that it holds no `what` ("rollout").
    """
    name = path.name if path.name == METRICS else f"{path.parent.name}/{path.name}"
    unreadable, is_cut = [], False
    try:
        for number, line in enumerate(lines_in(path), start=1):
            if not line.strip():
                continue
            try:
                record = object_in(line) if is_intact(line) is not False else None
                if record is None:
                    raise ValueError("no object, or a damaged one")
                value = of(record)
            except UNREADABLE:
                unreadable.append(number)
                is_cut = not line.endswith(b"\n")
                continue
            yield value
    except FileNotFoundError:
        notes.append(f"{name} is missing")
    except OSError as e:
        notes.append(f"{name}: {e.strerror or e}")
    if is_cut:
        notes.append(f"{name}, line {unreadable.pop()}: cut off, passed over")
    if unreadable:
        others = f" ({len(unreadable)} such lines)" if len(unreadable) > 1 else ""
        notes.append(f"{name}, line {unreadable[0]}: not a {what} of this project, passed over{others}")


def records_of_step(
    folder: Path, step: int, notes: list[str], of: Callable[[dict[str, Any]], T], *, what: str
) -> Iterator[T]:
    """`records_in` the files of all processes; `notes` says so where there is none."""
    files = sorted(step_files(folder, step), key=_rank)
    for path in files or [folder / f"step-{step:06d}.jsonl"]:
        yield from records_in(path, notes, of, what=what)


def steps_in(folder: Path) -> list[int]:
    """The steps that there are files of, in their order."""
    return sorted({int(path.name[5:].partition(".")[0]) for path in step_files(folder)})


def _rank(path: Path) -> int:
    found = re.search(r"\.rank(\d+)\.", path.name)
    return int(found[1]) if found else 0
