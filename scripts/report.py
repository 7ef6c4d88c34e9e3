"""Write a run's report and transcripts anew: `python scripts/report.py runs/quickstart`.

It reads what lies in the run folder, also while the run goes on. Exit codes: 0 done, 2 something in the input is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from program import UserError, run, say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="run folder")
    folder: Path = parser.parse_args().run
    # Only now: --help and a misspelt option answer at once.
    from trainer.reports.run_report import write_report
    from trainer.reports.transcripts.write import run_decoder, write_transcripts
    from trainer.runs.about import check_run_folder

    try:
        check_run_folder(folder, "run.json")
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code
    try:
        decode = run_decoder(folder)
    except UserError as e:
        # The page is of use without it, and the run may stem from another machine.
        say(f"tokens will be shown by their ids: {e}", file=sys.stderr)
        decode = None
    try:
        transcripts = write_transcripts(folder, decode)
        # After it: the report links to transcripts that are there.
        report = write_report(folder)
    except OSError as e:
        say(f"error: {e.filename}: {e.strerror or e}", file=sys.stderr)
        return 2
    say(f"report       {report}\ntranscripts  {transcripts}")
    return 0


if __name__ == "__main__":
    run(main)
