"""Policies side by side: `python scripts/compare.py before=runs/finance@0 after=runs/finance@60`.

Each policy is a run folder, of which the last evaluation counts, or `FOLDER@STEP` for another one, or the folder of a
preflight (`scripts/preflight.py --held-out` rolls any model or adapter out on the evaluation's tasks); `NAME=` before
it names it. The first is the baseline. They are compared on the tasks that they share: reward, calls, tokens, latency,
errors, with paired bootstrap intervals. Writes compare.html and compare.md into `--out`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from program import UserError, console, run, say

from envs.reading.documents import check_writable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", metavar="[NAME=]FOLDER[@STEP]")
    parser.add_argument("--by", metavar="KEY", help="of a task's item: a table for each value (default: kind)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--markdown", action="store_true", help="print Markdown instead of the terminal's tables")
    parser.add_argument("--demo", action="store_true", help="add the published demo's figures beside first and last")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    arguments = parser.parse_args()
    try:
        _compare(arguments)
    except UserError as e:
        say(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _compare(arguments: argparse.Namespace) -> None:
    from trainer.reports.comparison import compare
    from trainer.reports.comparison_page import render_markdown, render_terminal, write_comparison_page
    from trainer.reports.evaluations import read_evaluations

    out: Path = arguments.out
    check_writable(out, "--out", is_folder=True)
    comparison = compare(read_evaluations(arguments.policies), by=arguments.by, seed=arguments.seed)
    for evaluation in comparison.evaluations:
        for note in evaluation.notes:
            say(f"warning: {evaluation.name}: {note}", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    page = write_comparison_page(comparison, out / "compare.html", demo=arguments.demo)
    markdown = render_markdown(comparison, demo=arguments.demo)
    (out / "compare.md").write_text(markdown, encoding="utf-8", errors="replace")
    if arguments.markdown:
        say(markdown)
    else:
        console().print(render_terminal(comparison, demo=arguments.demo))
        say(f"page  {page}")


if __name__ == "__main__":
    run(main)
