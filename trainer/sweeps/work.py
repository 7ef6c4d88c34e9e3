"""Runs of scripts/train.py as processes: on which slot, from a start or found at work after a kill, to their end.

A process carries its run's name in its environment, so that a sweep that was killed finds it again.

*Covered*: SIGKILL of the sweep (its runs go on, and are found), launchers that start processes of their own, runs of
which only the folder's lock tells that they are at work (on another machine).
*Not covered*: a run on another machine that has not come to its folder yet, when the sweep is killed and started anew
within that time; what ends a process whose environment was emptied by its launcher.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from envs.errors import UserError
from envs.terminal import clean
from trainer.runs.files import open_to_append, open_to_read
from trainer.runs.lock import is_held
from trainer.sweeps.config import CoresConfig, GpusConfig, SlotsConfig

MARK = "AGENT_RFT_SWEEP_RUN"
"""The environment variable that holds `SWEEP_ID/NAME`."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_TAIL_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one run."""

    number: int
    devices: tuple[str, ...] = ()
    """GPUs that the run alone sees; none where it sees what the sweep sees."""
    cores: tuple[int, ...] = ()
    """On which the run's processes are; none where they are on any."""

    @property
    def environment(self) -> dict[str, str]:
        return {_VISIBLE: ",".join(self.devices)} if self.devices else {}

    def __str__(self) -> str:
        if self.cores:
            return f"core {', '.join(map(str, self.cores))}"
        return f"GPU {', '.join(self.devices)}" if self.devices else f"slot {self.number}"

    def holds(self, process: psutil.Process) -> bool:
        """Whether the process was started on this slot, as far as GPUs and cores tell."""
        if self.cores:
            return set(process.cpu_affinity()) <= set(self.cores)
        return bool(self.devices) and process.environ().get(_VISIBLE, "") == ",".join(self.devices)

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """What this thread starts meanwhile is on the slot's cores, and counts no others."""
        if not self.cores:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


@dataclass(slots=True, kw_only=True)
class Work:
    """A run at work."""

    slot: Slot
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    """None of one that was found."""
    found: list[psutil.Process] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        if self.process is not None:
            return self.process.poll() is not None
        return not any(map(_lives, self.found)) and not is_held(self.folder)

    @property
    def exit_code(self) -> int | None:
        """None of one that was found: whoever did not start it is not told."""
        return None if self.process is None else self.process.returncode

    def end(self) -> None:
        """Ask it to end, once: a second signal would break off its clearing up."""
        groups = {self.process.pid} if self.process is not None else set()
        for process in self.found:
            with contextlib.suppress(ProcessLookupError):
                groups.add(os.getpgid(process.pid))
        for group in groups - {os.getpgid(0)}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)


def starter(train: Path, launch: str | None, where: str) -> list[str]:
    """What stands before the arguments of scripts/train.py. Raises `UserError` where there is no such launcher."""
    return [*([sys.executable] if launch is None else _launcher(launch, where)), str(train)]


def _launcher(text: str, where: str) -> list[str]:
    try:
        launch = shlex.split(text)
    except ValueError as e:
        raise UserError(f"{where} {text!r}: {e}") from None
    if not launch or shutil.which(launch[0]) is None:
        raise UserError(f"{where} {text!r}: no such command; expected accelerate launch --num_processes 8, for example")
    return launch


def slots_of(parallel: SlotsConfig | GpusConfig | CoresConfig) -> list[Slot]:
    """Raises `UserError` where there are too few GPUs."""
    if isinstance(parallel, SlotsConfig):
        return [Slot(number) for number in range(parallel.num)]
    if isinstance(parallel, CoresConfig):
        return _shares(sorted(os.sched_getaffinity(0)), parallel.num)
    ids = [str(x) for x in parallel.ids] if parallel.ids is not None else _visible_gpus()
    num = len(ids) // parallel.per_run
    if not num:
        found = f"{len(ids)} GPU{'s' * (len(ids) != 1)}" + ("" if parallel.ids is not None else " found")
        raise UserError(f"parallel: {found}, and each run takes {parallel.per_run}; expected as many at least")
    return [Slot(i, tuple(ids[i * parallel.per_run : (i + 1) * parallel.per_run])) for i in range(num)]


def _shares(cores: Sequence[int], num: int) -> list[Slot]:
    """Each core in one share; where there are more runs than cores, one core each, which several share."""
    if num > len(cores):
        return [Slot(i, cores=(cores[i % len(cores)],)) for i in range(num)]
    ends = [len(cores) * i // num for i in range(num + 1)]
    return [Slot(i, cores=tuple(cores[ends[i] : ends[i + 1]])) for i in range(num)]


def _visible_gpus() -> list[str]:
    if (visible := os.environ.get(_VISIBLE)) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
        return [str(i) for i, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]
    return []


def start(command: Sequence[str], *, mark: str, slot: Slot, folder: Path, log: Path) -> Work:
    """Start it in a session of its own, what it says in `log`. Raises `OSError`."""
    fd = open_to_append(log)
    try:
        with slot.bound():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                env=os.environ | slot.environment | {MARK: mark},
                # It hears of a Ctrl-C from the sweep, once.
                start_new_session=True,
            )
    finally:
        os.close(fd)
    return Work(slot=slot, folder=folder, process=process)


def marked_processes(sweep_id: str) -> dict[str, list[psutil.Process]]:
    """The processes of this machine that carry a run's name, by that name."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            sweep, _, name = process.environ().get(MARK, "").partition("/")
            if sweep == sweep_id and _lives(process) and process.pid != os.getpid():
                found.setdefault(name, []).append(process)
    return found


def slot_of(processes: Sequence[psutil.Process], slots: Sequence[Slot], taken: Sequence[Slot]) -> Slot:
    """Where a run that was found is at work: where its GPUs or cores are, or on a free slot; else beside all."""
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            if held := [slot for slot in slots if slot.holds(process)]:
                # More runs than cores share some.
                return next((slot for slot in held if slot not in taken), held[0])
    free = [slot for slot in slots if slot not in taken and not slot.devices]
    return free[0] if free else Slot(-1 - len(taken))


def said_last(log: Path) -> str:
    """What a run said of its end: its error, or its last line."""
    with contextlib.suppress(OSError), open_to_read(log) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = list(_lines(file.read().decode(errors="replace")))
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1].removeprefix("error: ")
    return ""


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        if shown := clean(line.rstrip("\r").rpartition("\r")[2]).strip():
            yield shown


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
