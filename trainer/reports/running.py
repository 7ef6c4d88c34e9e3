"""A run's report while the run works."""

from __future__ import annotations

import time

from envs.errors import UserError
from trainer.reports.run_report import write_report
from trainer.runs.folder import RunFolder
from trainer.runs.progress import Progress

_COST = 50
"""A report that took a second to write is left as it is for so many seconds: it costs 2 % of the run at most."""


class RunningReport:
    """report.html, written anew after a step or an evaluation as often as it costs next to nothing."""

    def __init__(self, run: RunFolder, progress: Progress) -> None:
        self._run = run
        self._progress = progress
        self._next = 0.0
        self._told = ""

    def write(self) -> None:
        """On the main process, if it is time. What stands against it is said once; the run does not depend on it."""
        start = time.monotonic()
        if not self._run.is_main or start < self._next:
            return
        try:
            write_report(self._run.path)
        except (UserError, OSError) as e:
            if self._told != (told := f"report.html can't be written for now: {e}"):
                self._told = told
                self._progress.warn(told)
        end = time.monotonic()
        self._next = end + _COST * (end - start)
