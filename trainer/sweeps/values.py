"""A sweep without a file: every combination of some values, one run after the other, and a table."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from envs.errors import UserError
from envs.terminal import say
from trainer.config import load_config
from trainer.measures.catalogue import Place, shown_in
from trainer.reports.comparison_page import in_short
from trainer.reports.run_report import before_and_after
from trainer.reports.tables import Grid, Row, to_markdown
from trainer.runs.resuming import start_adapter
from trainer.sweeps.work import starter


def run_values(
    config: Path, overrides: Sequence[str], swept: Sequence[str], *, train: Path, launch: str | None = None
) -> int:
    """The exit code: that of the first run that fails. Raises `UserError` before the first run starts.

    Finished runs are not run again, interrupted ones are resumed: each is `train` (scripts/train.py) in a folder of
    its own.
    """
    runs = _runs(config, overrides, swept)
    command = starter(train, launch, "--launch")
    for name, own in runs.items():
        say(f"--- {name}")
        if code := _run_to_its_end([*command, "--config", str(config), *own]):
            return code
    say(table({name: load_config(config, [*own]).output_dir for name, own in runs.items()}))
    return 0


def table(folders: Mapping[str, Path]) -> str:
    """A row per run: each figure before → after."""
    measures = shown_in(Place.SWEEP)
    rows = []
    for name, folder in folders.items():
        comparison = before_and_after(folder)
        lines = [comparison.line(m.key) if comparison else None for m in measures]
        rows.append(Row(cells=[name, *("–" if line is None else in_short(line) for line in lines)]))
    return to_markdown(Grid(id="sweep", headers=["run", *(f"{m.title}, {m.unit}" for m in measures)], rows=rows))


def _run_to_its_end(command: Sequence[str]) -> int:
    """The exit code. What interrupts the sweep interrupts the run, and waits until it has ended its engine."""
    # Of a session of its own it hears of Ctrl-C once: a second signal would break off its clearing up.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def _runs(config_path: Path, overrides: Sequence[str], swept: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of each run under its name; every config is checked before the first run starts."""
    base = load_config(config_path, [*overrides])
    axes: dict[str, list[str]] = {}
    for axis in swept:
        key, equals, values = axis.partition("=")
        if not equals or not all(each := values.split(",")):
            raise UserError(f"--set {axis!r}: expected KEY=V1,V2, for example seed=0,1,2")
        if key == "output_dir" or key in axes:
            why = "each run has a folder of its own" if key == "output_dir" else "its values stand twice"
            raise UserError(f"--set {axis!r}: {why}; expected another key")
        if twice := [value for value in each if each.count(value) > 1]:
            raise UserError(f"--set {axis!r}: {twice[0]} stands twice; expected each value once")
        axes[key] = [f"{key}={value}" for value in each]
    runs: dict[str, list[str]] = {}
    for combination in itertools.product(*axes.values()):
        name = "-".join(combination) or "run"
        runs[name] = [*overrides, *combination, f"output_dir={base.output_dir / name}"]
        start_adapter(load_config(config_path, runs[name]))
    return runs
