"""What the folder of a run says of it at a moment: the run may be at work, over, interrupted, or hardly begun.

*Covered*: a folder that is being written, that can only be read, that is damaged, that a resumed run cuts back. Nothing
is written and no lock is taken. *Not covered*: what stands in no file, such as a queue; a run that calls its folder
its own on another machine whose file system does not tell of locks, of which `is_held` is None.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import fmean

import numpy as np

from envs.errors import UserError
from trainer.measures.catalogue import CATALOGUE
from trainer.measures.intervals import Interval, intervals
from trainer.measures.masked import masked_causes
from trainer.reports.comparison import errors_of
from trainer.reports.evaluations import rollout_without_tokens
from trainer.reports.run_reader import UNREADABLE, RunData, read_run, steps_in
from trainer.reports.watch.tail import Tail
from trainer.runs.about import check_run_folder
from trainer.runs.files import is_intact, object_in, open_to_read, step_files
from trainer.runs.lock import is_held
from trainer.types import Kind, Rollout

_KNOWN_BY = ("config.yaml", "run.json", "run.lock")
_MOST_LOG_BYTES = 2**18
_NUM_EPISODES = 3
_LINE = re.compile(r"\[(\d\d:\d\d:\d\d) progress\] (phase|warning): (.+)")


class State(StrEnum):
    """What becomes of it."""

    NOT_BEGUN = "not begun"
    AT_WORK = "at work"
    INTERRUPTED = "interrupted"
    """Nobody holds the folder; the same command goes on."""
    FINISHED = "finished"
    UNKNOWN = "at work or interrupted"
    """Whether it is held is not told to this user or on this file system."""


@dataclass(slots=True)
class Figures:
    """Of the rollouts of one step that there are so far."""

    num_done: int = 0
    num_graded: int = 0
    rewards: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By task."""
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of what the catalogue shows on a screen, over graded rollouts, by key."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many graded rollouts have it."""
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Why rollouts have no grade, in the words of their causes."""
    _interval: tuple[int, Interval | None] | None = None
    """What was computed last, and of how many."""

    def add(self, rollout: Rollout) -> None:
        self.num_done += 1
        for kind, causes in masked_causes([rollout]).items():
            self.faults.update(f"{kind}: {cause}" for cause in causes)
        self.errors += errors_of(rollout)
        if rollout.reward is None:
            return
        self.num_graded += 1
        self.rewards[rollout.task.task_id].append(rollout.reward)
        for measure in CATALOGUE:
            if measure.on_screen and (values := measure.values([rollout])):
                self.sums[measure.key] += values[0]
                self.counts[measure.key] += 1

    def means(self) -> dict[str, float]:
        return {key: self.sums[key] / count for key, count in self.counts.items()}

    def interval(self) -> Interval | None:
        """Of the reward, over tasks."""
        if self._interval is None or self._interval[0] != self.num_graded:
            means_PT = np.array([[fmean(of_task) for of_task in self.rewards.values()]])
            self._interval = (self.num_graded, intervals(means_PT, seed=0)[0][0] if self.rewards else None)
        return self._interval[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a screen shows."""

    name: str
    state: State
    data: RunData
    phase: str
    """The last that the log tells of; empty without a log."""
    phase_since: str
    """The machine's clock, 17:05:33."""
    warning: str
    """The last one."""
    train: Mapping[int, Figures]
    """The first step, the last that is in the metrics, and those that are under way."""
    evals: Mapping[int, Figures]
    """The first evaluation, the last that is in the metrics, and the newest."""
    asked: Mapping[Kind, int]
    """Rollouts of a step, of an evaluation."""
    episodes: Sequence[Rollout]
    """The last that came to their end, the newest first."""
    notes: Sequence[str]
    last_written: float
    """Seconds of the epoch; 0 where nothing is written."""

    @property
    def num_steps(self) -> int:
        """Asked for; 0 where the config does not tell."""
        return _whole(self.data.config, "optim", "num_steps")

    @property
    def last_step(self) -> int:
        return max(self.data.train_steps, default=0)


class RunWatch:
    """Looks at a run's folder again and again; what was read once of its rollouts is not read again."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` for what is no run's folder."""
        self._folder = folder
        check_run_folder(self._folder, *_KNOWN_BY)
        self._data: RunData | None = None
        self._read: object = None
        self._steps: dict[tuple[Kind, int], _Step] = {}

    def look(self) -> Snapshot:
        """Raises `UserError` where the folder has gone."""
        check_run_folder(self._folder, *_KNOWN_BY)
        data = self._run_data()
        last, planned = max(data.train_steps, default=0), _whole(data.config, "optim", "num_steps")
        train = steps_in(self._folder / Kind.TRAIN)
        train = [step for step in train if step >= last or step == train[0]]
        evals = steps_in(self._folder / Kind.EVAL)
        shown = {*data.eval_steps[:1], *data.eval_steps[-1:], *evals[-1:]}
        evals = [step for step in evals if step in shown]
        wanted = [(Kind.TRAIN, step) for step in train] + [(Kind.EVAL, step) for step in evals]
        self._steps = {key: self._steps.get(key) or _Step(self._folder / key[0], key[1]) for key in wanted}
        for step in self._steps.values():
            step.read()
        phase, since, warning = _told(self._folder / "run.log")
        return Snapshot(
            name=self._folder.resolve().name,
            state=self._state(data, planned),
            data=data,
            phase=phase,
            phase_since=since,
            warning=warning,
            train={step: self._steps[Kind.TRAIN, step].figures for step in train},
            evals={step: self._steps[Kind.EVAL, step].figures for step in evals},
            asked=_asked(data),
            episodes=self._episodes(),
            notes=[*data.notes, *(note for step in self._steps.values() for note in step.notes())],
            last_written=_last_written(self._folder),
        )

    def _run_data(self) -> RunData:
        """Read again where one of its files has changed."""
        now = [_signature(self._folder / name) for name in ("config.yaml", "run.json", "metrics.jsonl")]
        if self._data is None or now != self._read:
            try:
                data = read_run(self._folder)
            except FileNotFoundError as e:
                raise UserError(str(e)) from e
            young = "metrics.jsonl is missing"
            self._data, self._read = data, now
            data.notes[:] = [note for note in data.notes if note != young and "cut off" not in note]
        return self._data

    def _state(self, data: RunData, planned: int) -> State:
        if planned and data.info.get("finished_steps") == planned:
            return State.FINISHED
        held = is_held(self._folder)
        if held is None:
            return State.UNKNOWN
        if held:
            return State.AT_WORK
        has_begun = data.steps or (self._folder / "run.log").exists()
        return State.INTERRUPTED if has_begun else State.NOT_BEGUN

    def _episodes(self) -> list[Rollout]:
        """Of the file that was written last."""
        steps = [step for step in self._steps.values() if step.last]
        return max(steps, key=lambda step: step.written).last[::-1] if steps else []


class _Step:
    """The files of a step, one of each process."""

    def __init__(self, folder: Path, step: int) -> None:
        self.figures = Figures()
        self.last: list[Rollout] = []
        self.written = 0.0
        self._folder = folder
        self._step = step
        self._tails: dict[Path, Tail] = {}
        self._num_unreadable = 0
        self._fault = ""

    def read(self) -> None:
        lines = self._new_lines()
        if lines is None:
            # A run that goes on has cut a file back: all of the step is counted anew.
            self.figures, self.last, self._tails, self._num_unreadable = Figures(), [], {}, 0
            lines = self._new_lines() or []
        for line in lines:
            self._take(line)

    def _new_lines(self) -> list[bytes] | None:
        """None where one of the files begins anew."""
        lines: list[bytes] = []
        self._fault = ""
        for path in sorted({*step_files(self._folder, self._step), *self._tails}):
            is_known = path in self._tails
            tail = self._tails.setdefault(path, Tail(path))
            try:
                new, is_anew = tail.read()
                if is_anew and is_known:
                    return None
                self.written = max(self.written, path.stat().st_mtime)
            except OSError as e:
                self._fault = f"{path.parent.name}/{path.name}: {e.strerror or e}"
                continue
            lines += new
        return lines

    def _take(self, line: bytes) -> None:
        try:
            record = object_in(line) if is_intact(line) is not False else None
            if record is None:
                raise ValueError("no object, or a damaged one")
            rollout = rollout_without_tokens(record)
        except UNREADABLE:
            self._num_unreadable += 1
            return
        self.figures.add(rollout)
        self.last = [*self.last, rollout][-_NUM_EPISODES:]

    def notes(self) -> list[str]:
        where = f"{self._folder.name}/step-{self._step:06d}"
        told = [f"{where}: {self._num_unreadable} lines are no rollouts"] if self._num_unreadable else []
        late = (
            [f"{where}: only its last rollouts are shown"] if any(t.begins_late for t in self._tails.values()) else []
        )
        return [*told, *late, *([self._fault] if self._fault else [])]


def _told(log: Path) -> tuple[str, str, str]:
    """The last phase, since when, and the last warning, by the end of the log."""
    phase = since = warning = ""
    with contextlib.suppress(OSError), open_to_read(log) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _MOST_LOG_BYTES))
        for line in file.read(_MOST_LOG_BYTES).decode(errors="replace").splitlines():
            if (found := _LINE.fullmatch(line)) is None:
                continue
            if found[2] == "phase":
                phase, since = found[3], found[1]
            else:
                warning = f"{found[1]} {found[3]}"
    return phase, since, warning


def _asked(data: RunData) -> dict[Kind, int]:
    """As the config has it; of an evaluation what an earlier one had, as there may be fewer tasks than asked for."""
    config = data.config
    train = _whole(config, "rollout", "tasks_per_step") * _whole(config, "rollout", "group_size")
    earlier = [int(n) for _, n in data.series("eval/rollouts")]
    evals = _whole(config, "eval", "num_tasks") * _whole(config, "eval", "samples_per_task")
    return {Kind.TRAIN: train, Kind.EVAL: earlier[-1] if earlier else evals}


def _whole(config: object, *keys: str) -> int:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if isinstance(config, int) and config > 0 else 0


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


def _last_written(folder: Path) -> float:
    times = [0.0]
    newest = [sorted(step_files(folder / kind))[-1:] for kind in Kind]
    for path in [folder / "metrics.jsonl", folder / "run.log", folder / "run.json", *(p for f in newest for p in f)]:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
