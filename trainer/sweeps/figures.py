"""What trials show: the held-out evaluations of their runs, and the means over a trial's seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from trainer.measures.catalogue import CATALOGUE, COUNTS, Measure
from trainer.reports.run_reader import METRICS, read_steps
from trainer.sweeps.plan import Plan
from trainer.sweeps.study import Noted

Row = Mapping[str, float]
_COUNTED = re.compile(r"(stop|masked_by|grader_error)/.+|tool/.+/(calls|errors)")
"""Figures that stand in metrics.jsonl only where there is something to count."""


class RunFigures:
    """A run's evaluations; its file is read again where it has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: tuple[int, int] | None = None
        self._rows: Mapping[int, Row] = {}

    def evaluations(self) -> Mapping[int, Row]:
        """The figures of each evaluation until now, by step."""
        try:
            about = (self.folder / METRICS).stat()
        except OSError:
            return {}
        if (seen := (about.st_size, about.st_mtime_ns)) != self._seen:
            steps = read_steps(self.folder, [])
            self._rows = {step: row for step, row in steps.items() if "eval/rollouts" in row}
            self._seen = seen
        return self._rows

    def last(self) -> Row:
        """The last one's; empty where there is none."""
        rows = self.evaluations()
        return rows[max(rows)] if rows else {}


def figure(row: Row, key: str) -> float | None:
    """A figure of an evaluation; what is left out where it is 0 is 0 where anything was graded."""
    if key in row:
        return row[key]
    name = key.removeprefix("eval/")
    left_out = _COUNTED.fullmatch(name) or any(entry.key == name and entry.if_any for entry in (*CATALOGUE, *COUNTS))
    return 0.0 if left_out and has_grades(row) else None


def has_grades(row: Row) -> bool:
    return row.get("eval/rollouts", 0) > row.get("eval/masked_rollouts", 0)


def measure_of(key: str) -> Measure | None:
    """How a figure is written, where the catalogue has it."""
    return next((m for m in CATALOGUE if f"eval/{m.key}" == key), None)


def show(key: str, value: float) -> str:
    measure = measure_of(key)
    return measure.show(value) if measure is not None else f"{value:.4g}"


def unit_of(key: str) -> str:
    measure = measure_of(key)
    return measure.unit if measure is not None else key


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A trial as it is shown."""

    noted: Noted
    values: Sequence[float]
    """The objective of each run that has ended or is on its way, as of its last evaluation."""
    curve: Sequence[tuple[int, float]]
    """The objective after each evaluation, the mean over the runs that have it."""
    beside: Mapping[str, Sequence[float]]
    """Other figures of the last evaluation, by key, of each run."""
    runs: Sequence[str]
    """Names of the runs that have begun."""

    @property
    def name(self) -> str:
        return f"trial {self.noted.index}"


def shown(plan: Plan, noted: Noted, figures: Mapping[str, RunFigures]) -> Shown:
    """`figures`: of every run, by name."""
    key = plan.config.objective.key
    mine = {name: figures[name] for name, _ in plan.runs(noted.index) if figures[name].folder.is_dir()}
    by_step: dict[int, list[float]] = {}
    for run in mine.values():
        for step, row in run.evaluations().items():
            if (value := figure(row, key)) is not None:
                by_step.setdefault(step, []).append(value)
    last = [run.last() for run in mine.values()]
    return Shown(
        noted=noted,
        values=[value for row in last if (value := figure(row, key)) is not None],
        curve=[(step, fmean(values)) for step, values in sorted(by_step.items())],
        beside={k: [v for row in last if (v := figure(row, k)) is not None] for k in plan.config.beside},
        runs=list(mine),
    )
