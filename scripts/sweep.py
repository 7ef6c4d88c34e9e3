"""Run one config with several values: `python scripts/sweep.py --config configs/quickstart.yaml --set seed=0,1,2`.

Every combination of the values given with `--set` is a run of `scripts/train.py` in a folder of its own under the
config's `output_dir`, one after the other; finished runs are not run again, interrupted ones are resumed. Ends with a
Markdown table of all runs. `--launch "accelerate launch --num_processes 8"` says how each is started. Exit codes as
`scripts/train.py`; a run that fails ends the sweep with its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from envs.errors import UserError
from envs.terminal import run, say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=V1,V2", help="values to go through")
    parser.add_argument("--launch", default=sys.executable, help="what starts scripts/train.py")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the same for all runs")
    arguments = parser.parse_intermixed_args()
    # Only now: --help and a misspelt option answer at once.
    from trainer.config import load_config
    from trainer.processes import end_on_signals

    try:
        runs = _runs(arguments.config, arguments.overrides, arguments.set)
        launch = _launch(arguments.launch)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return 2
    end_on_signals()
    train = Path(__file__).with_name("train.py")
    for name, overrides in runs.items():
        say(f"--- {name}")
        command = [*launch, str(train), "--config", str(arguments.config), *overrides]
        if code := _run_to_its_end(command):
            return code
    say(_table({name: load_config(arguments.config, overrides).output_dir for name, overrides in runs.items()}))
    return 0


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


def _launch(text: str) -> list[str]:
    """The command that starts each run. Raises `UserError` where there is none of that name."""
    try:
        launch = shlex.split(text)
    except ValueError as e:
        raise UserError(f"--launch {text!r}: {e}") from None
    if not launch or shutil.which(launch[0]) is None:
        raise UserError(
            f"--launch {text!r}: no such command; expected accelerate launch --num_processes 8, for example"
        )
    return launch


def _runs(config_path: Path, overrides: list[str], swept: list[str]) -> dict[str, list[str]]:
    """The overrides of each run under its name; every config is checked before the first run starts."""
    from trainer.config import load_config

    base = load_config(config_path, overrides)
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
        load_config(config_path, runs[name])
    return runs


def _table(folders: dict[str, Path]) -> str:
    """A row per run: each figure before → after."""
    from trainer.measures.catalogue import Place, shown_in
    from trainer.reports.comparison_page import in_short
    from trainer.reports.run_report import before_and_after
    from trainer.reports.tables import Grid, Row, to_markdown

    shown = shown_in(Place.SWEEP)
    rows = []
    for name, folder in folders.items():
        comparison = before_and_after(folder)
        lines = [comparison.line(m.key) if comparison else None for m in shown]
        rows.append(Row(cells=[name, *("–" if line is None else in_short(line) for line in lines)]))
    return to_markdown(Grid(id="sweep", headers=["run", *(f"{m.title}, {m.unit}" for m in shown)], rows=rows))


if __name__ == "__main__":
    run(main)
