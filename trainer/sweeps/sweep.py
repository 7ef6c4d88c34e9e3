"""A sweep from its file to its report: trials are begun, looked at, told and drawn until all have ended.

One process drives a sweep. It may be killed at any time: what is at work goes on and is found again by the same
command, what was interrupted is resumed, and what has ended is not run again.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil

from envs.errors import FoundLate, UserError
from envs.terminal import console, say
from trainer.config import RunConfig
from trainer.reports.tables import to_terminal
from trainer.runs.folder import RunFolder
from trainer.runs.lock import RunLock
from trainer.sweeps.figures import RunFigures, figure, has_grades, show, shown
from trainer.sweeps.page import best_of, trials_table, write_best, write_sweep_page
from trainer.sweeps.plan import Plan, make_plan, note_begun, take_folder
from trainer.sweeps.space import Point, in_words
from trainer.sweeps.study import Noted, Study
from trainer.sweeps.work import Slot, Work, marked_processes, said_last, slot_of, start

_POLL_S = 0.5
_REFRESH_S = 20.0
_REFUSED = 2
"""The exit code of a run whose input is wrong."""


def run_sweep(
    path: Path, overrides: Sequence[str], *, train: Path, launch: str | None = None, retry_failed: bool = False
) -> int:
    """Run a sweep, or go on with it; the exit code. `train`: scripts/train.py, which each run is.

    Raises `UserError` before anything is started, or where every trial's input was wrong; `FoundLate` for what only
    shows at work: a disk that is full, a storage that has gone. The trials at work are ended in order then.
    """
    plan = make_plan(path, overrides, train=train, launch=launch)
    with RunLock(plan.folder):
        with _writing(plan.folder, UserError):
            sweep_id, has_begun = take_folder(plan)
            sweep = Sweep(plan, Study(plan.config, sweep_id=sweep_id, is_new=not has_begun), sweep_id)
            note_begun(plan.folder)
            sweep.check_drawn()
        for remark in plan.remarks:
            say(f"note: {remark}")
        try:
            with _writing(plan.folder, FoundLate):
                sweep.take_up(retry_failed=retry_failed)
                sweep.run()
                return sweep.close()
        except BaseException:
            sweep.end_all()
            raise


@contextlib.contextmanager
def _writing(folder: Path, kind: type[UserError]) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # Of the terminal, not of the folder.
        raise
    except OSError as e:
        raise kind(f"output_dir {folder}: can't be written: {e.strerror or e}") from e


@dataclass(slots=True, kw_only=True)
class _Run:
    """One seed of a trial."""

    name: str
    config: RunConfig
    overrides: Sequence[str]
    value: float | None = None
    """The objective, once it has ended."""


@dataclass(slots=True, kw_only=True)
class _Trial:
    """A trial at work."""

    index: int
    runs: dict[str, _Run]
    waiting: collections.deque[str] = field(default_factory=collections.deque)
    reported: int
    """The last evaluation on the way that the study was told of."""


class Sweep:
    """The trials at work and the processes of their runs; what has ended is the study's."""

    def __init__(self, plan: Plan, study: Study, sweep_id: str) -> None:
        self._plan = plan
        self._study = study
        self._id = sweep_id
        self._trials: dict[int, _Trial] = {}
        self._work: dict[str, Work] = {}
        names = [name for index in range(plan.num_trials) for name, _ in plan.runs(index)]
        self._figures = {name: RunFigures(plan.run_folder(name)) for name in names}
        self._num_begun = 0
        self._refused: list[bool] = []
        """Of each trial that has ended in this call: whether its input was wrong."""
        self._drawn_at = time.monotonic()

    def check_drawn(self) -> None:
        """Where points are known before they are tried, all of them. Raises `UserError`."""
        if self._plan.config.method.type == "random":
            for index in range(self._plan.num_trials):
                self._opened(index, self._study.propose(index))

    # ---- what an earlier call left

    def take_up(self, *, retry_failed: bool) -> None:
        """Runs at work are watched, trials without an end go on; those that failed too, where that is asked for."""
        trials = self._study.trials()
        for noted in trials.values() if retry_failed else ():
            if noted.state == "failed":
                self._study.begin(noted.index, noted.point)
        trials = self._study.trials()
        self._num_begun = len(trials)
        left = marked_processes(self._id)
        for noted in trials.values():
            if noted.state == "running":
                self._take_up(noted, left)
        known = {name for trial in self._trials.values() for name in trial.runs}
        for name in left.keys() - known:
            # Its trial had been given up when the sweep was killed, before the run had ended.
            slot = slot_of(left[name], self._plan.slots, self._taken())
            self._work[name] = Work(slot=slot, folder=self._plan.run_folder(name), found=left[name])
            self._work[name].end()
        if trials:
            states = collections.Counter(t.state for t in trials.values())
            told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            say(f"going on with {len(trials)} of {self._plan.num_trials} trials: {told.replace('running', 'at work')}")

    def _take_up(self, noted: Noted, left: dict[str, list[psutil.Process]]) -> None:
        trial = self._opened(noted.index, noted.point)
        trial.reported = noted.last_step
        self._trials[noted.index] = trial
        for name in list(trial.waiting):
            work = Work(slot=self._plan.slots[0], folder=self._plan.run_folder(name), found=left.get(name, []))
            if not work.is_over:
                work.slot = slot_of(work.found, self._plan.slots, self._taken())
                self._work[name] = work
                trial.waiting.remove(name)
                say(f"{name}: is still at work")

    def _opened(self, index: int, point: Point) -> _Trial:
        """Raises `UserError` where its config can't be meant."""
        runs = {}
        for name, seed in self._plan.runs(index):
            overrides = self._plan.overrides(point, name, seed)
            runs[name] = _Run(name=name, config=self._plan.run_config(point, name, seed), overrides=overrides)
        return _Trial(index=index, runs=runs, waiting=collections.deque(runs), reported=0)

    # ---- the loop

    def run(self) -> None:
        """Until every trial has ended."""
        while True:
            self._fill()
            if not self._work and not self._trials:
                return
            self._look()
            if time.monotonic() - self._drawn_at > _REFRESH_S:
                self.draw(is_over=False)
            time.sleep(_POLL_S)

    def _fill(self) -> None:
        """Start what there is room for."""
        while (free := [slot for slot in self._plan.slots if slot not in self._taken()]) and (found := self._next()):
            trial, run = found
            if self._is_done(trial, run):
                self._settle(trial, run)
            elif trial.index in self._trials:
                self._start(trial, run, free[0])

    def _taken(self) -> list[Slot]:
        return [work.slot for work in self._work.values()]

    def _next(self) -> tuple[_Trial, _Run] | None:
        """The next run to start: of a trial that has begun, else of a new one."""
        while True:
            for trial in self._trials.values():
                if trial.waiting:
                    return trial, trial.runs[trial.waiting.popleft()]
            if self._num_begun >= self._plan.num_trials:
                return None
            self._begin(self._num_begun)

    def _begin(self, index: int) -> None:
        points = self._plan.points
        point = points[index] if points is not None else self._study.propose(index)
        self._study.begin(index, point)
        self._num_begun += 1
        say(f"trial {index}: {in_words(point)}")
        try:
            self._trials[index] = self._opened(index, point)
        except UserError as e:
            self._study.give_up(index, "failed", str(e))
            self._note_end(index, f"failed: {e}", refused=str(e))

    def _start(self, trial: _Trial, run: _Run, slot: Slot) -> None:
        plan = self._plan
        command = [*plan.start, "--config", str(plan.config.base), *run.overrides]
        folder, log = plan.run_folder(run.name), plan.log(run.name)
        self._work[run.name] = start(command, mark=f"{self._id}/{run.name}", slot=slot, folder=folder, log=log)

    def _look(self) -> None:
        """What has ended, and what the others have come to."""
        for name, work in list(self._work.items()):
            if work.is_over:
                del self._work[name]
                if (trial := self._of(name)) is not None:
                    self._settle(trial, trial.runs[name], work)
        for trial in list(self._trials.values()):
            self._report(trial)

    def _of(self, name: str) -> _Trial | None:
        return next((trial for trial in self._trials.values() if name in trial.runs), None)

    def _report(self, trial: _Trial) -> None:
        """Tell the study of the evaluations that all of a trial's runs have come to, and end it where it says so."""
        key = self._plan.config.objective.key
        rows = [self._figures[name].evaluations() for name in trial.runs]
        last = min(run.config.optim.num_steps for run in trial.runs.values())
        for step in sorted(set.intersection(*(set(steps) for steps in rows))):
            values = [value for steps in rows if (value := figure(steps[step], key)) is not None]
            if not trial.reported < step < last or len(values) < len(rows):
                continue
            trial.reported = step
            if self._study.report(trial.index, step, fmean(values)):
                reason = f"after step {step}, at {show(key, fmean(values))}"
                self._study.give_up(trial.index, "pruned", reason)
                self._close_trial(trial)
                self._note_end(trial.index, f"pruned {reason}")
                return

    # ---- ends

    def _is_done(self, trial: _Trial, run: _Run) -> bool:
        """Whether its folder holds the run at its end. What stands in its way ends the trial."""
        try:
            return RunFolder.is_finished(run.config)
        except UserError as e:
            self._fail(trial, str(e), refused=True)
            return False

    def _settle(self, trial: _Trial, run: _Run, work: Work | None = None) -> None:
        """A run is over: its value, or why it has none. What was found at work and left no result goes on."""
        finished = self._is_done(trial, run)
        if trial.index not in self._trials:
            return
        if not finished:
            code = work.exit_code if work is not None else None
            if code is None:
                trial.waiting.append(run.name)
            else:
                said = said_last(self._plan.log(run.name))
                self._fail(trial, f"{run.name}: {_ended(code)}{f': {said}' if said else ''}", refused=code == _REFUSED)
            return
        key, row = self._plan.config.objective.key, self._figures[run.name].last()
        run.value = figure(row, key)
        if run.value is None and has_grades(row):
            known = ", ".join(sorted(k for k in row if k.startswith("eval/"))[:12])
            raise FoundLate(f"objective.key: {run.name} has no {key}; its evaluation has {known} ...")
        if run.value is None:
            self._fail(trial, f"{run.name}: its last evaluation has no graded rollout", refused=False)
            return
        values = [r.value for r in trial.runs.values() if r.value is not None]
        if len(values) == len(trial.runs):
            self._study.tell(trial.index, fmean(values))
            self._close_trial(trial)
            self._note_end(trial.index, f"{key} {show(key, fmean(values))}")

    def _fail(self, trial: _Trial, reason: str, *, refused: bool) -> None:
        self._study.give_up(trial.index, "failed", reason)
        self._close_trial(trial)
        self._note_end(trial.index, f"failed: {reason}", refused=reason if refused else "")

    def _close_trial(self, trial: _Trial) -> None:
        """Its runs that are at work are asked to end; they keep their slots until they have."""
        del self._trials[trial.index]
        for name in trial.runs.keys() & self._work.keys():
            self._work[name].end()

    def _note_end(self, index: int, said: str, *, refused: str = "") -> None:
        """Raises `UserError` where every trial's input was wrong: of all, or of as many as show it."""
        say(f"trial {index}: {said}")
        self._refused.append(bool(refused))
        enough = min(self._plan.num_trials, max(3, len(self._plan.slots) + 1))
        if all(self._refused) and len(self._refused) >= enough:
            raise UserError(
                f"every trial was refused, {len(self._refused)} until now; the last one says: {refused}. Put it right "
                "and go on with --retry-failed, or, where the sweep's own file or its base has to change, in another "
                "output_dir"
            )
        self.draw(is_over=False)

    def end_all(self) -> None:
        """Ask what is at work to end, once, and wait until it has."""
        for work in self._work.values():
            work.end()
        here = [work for work in self._work.values() if work.process is not None or work.found]
        while not all(work.is_over for work in here):
            time.sleep(_POLL_S)

    # ---- what is shown

    def draw(self, *, is_over: bool) -> None:
        """The page, and the best config, as of now."""
        trials = [shown(self._plan, noted, self._figures) for noted in self._study.trials().values()]
        write_sweep_page(self._plan, trials, self._study.importance(), is_over=is_over)
        write_best(self._plan, trials)
        self._drawn_at = time.monotonic()

    def close(self) -> int:
        """The last page, and the table on the terminal; the exit code."""
        self.draw(is_over=True)
        plan = self._plan
        trials = [shown(plan, noted, self._figures) for noted in self._study.trials().values()]
        console().print(to_terminal(trials_table(plan, trials)))
        say(f"report   {plan.folder / 'report.html'}")
        best = best_of(plan, trials)
        if best is None:
            refused = all(self._refused) and self._refused
            say("error: no trial came to its end; see the reasons above", file=sys.stderr)
            return _REFUSED if refused else 1
        say(f"best     {best.name}: {in_words(best.noted.point)}")
        say(f"train it with:\npython scripts/train.py --config {plan.folder / 'best.yaml'}")
        return 0


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
