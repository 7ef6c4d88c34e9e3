"""Look at a run while it works, from wherever its folder can be read: `python scripts/watch.py runs/quickstart`.

Reads the run folder, writes nothing and takes no lock: a copy that rsync keeps, or a mount that can only be read, will
do. Without a terminal, and with `--once`, one picture is printed. Ctrl-C ends the view, not the run. Exit codes: 0 the
run has finished or one picture was asked for, 2 there is no run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from program import UserError, run, say


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--once", action="store_true", help="print one picture, and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default 2)")
    arguments = parser.parse_args()
    if not 0.1 <= arguments.every <= 3600:
        parser.error(f"--every {arguments.every:g}: expected 0.1 to 3600 seconds")
    # Only now: --help and a misspelt option answer at once.
    from trainer.reports.watch.view import show_on, show_once

    try:
        if arguments.once or not show_on(arguments.run, every_s=arguments.every):
            show_once(arguments.run)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    run(main)
