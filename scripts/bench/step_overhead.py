"""What a finished or running run's steps cost outside generation and training. Reads metrics.jsonl; starts nothing.

    python scripts/bench/step_overhead.py --run runs/quickstart [--json FILE]

The share is 1 - (rollouts + training) / step, in wall-clock time: publishing, its proof, the checkpoint and everything
between count as overhead. Evaluations lie outside the steps. min, median and max are over the run's steps. How a
publish divides into saving, loading and proof is measured by `publish_time.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Figure, report, run_main

from envs.errors import UserError
from trainer.measures.timing import Lap
from trainer.runs.files import read_lines

_LAPS = ("step", *Lap)


def step_figures(records: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures of the records that are steps, not evaluations. Raises `UserError` when there are none."""
    steps = [r for r in records if "time/step_s" in r]
    if not steps:
        raise UserError("metrics.jsonl: no finished training step")
    figures = [
        Figure(
            name="outside rollouts and training",
            unit="share of the step",
            values=[r["time/other_share"] for r in steps],
            target=0.05,
            target_is_ceiling=True,
        )
    ]
    figures += [Figure(name=lap, unit="s", values=[r[f"time/{lap}_s"] for r in steps]) for lap in _LAPS]
    return figures + [
        Figure(name=f"{kind} tokens", unit="tokens/s", values=[r[f"throughput/{kind}_tokens_per_s"] for r in steps])
        for kind in ("sampled", "trained")
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", type=Path, required=True, help="run folder")
    arguments.add_argument("--json", type=Path, help="also write the figures here")
    given = arguments.parse_args()
    run: Path = given.run
    if not (run / "run.json").is_file():
        raise UserError(f"--run {run}: holds no run.json; expected the folder of a run")
    figures = step_figures(read_lines(run / "metrics.jsonl"))
    measured = json.loads((run / "run.json").read_text())
    # The table's own environment is that of this script; the run may stem from elsewhere.
    about = {
        "steps": len(figures[0].values),
        "the run's hardware": measured["hardware"],
        "the run's versions": measured["versions"],
        "the run's start": measured["started"],
    }
    report(f"Step overhead of {run}", figures, about=about, json_path=given.json)


if __name__ == "__main__":
    sys.exit(run_main(main))
