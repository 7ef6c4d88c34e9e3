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
import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from envs.errors import UserError
from envs.reading.json_text import write_json
from trainer import processes
from trainer.config import RunConfig
from trainer.measures.exporter import Exporter, exporting
from trainer.runs.about import FILES, differences, files_named, plain_config, read_about, saved_config, versions
from trainer.runs.canary_record import CANARY, check_trained_base, trained_on
from trainer.runs.files import (
    UNFINISHED,
    append_line,
    append_text,
    check_place,
    clear,
    clear_unfinished,
    drop_damaged,
    keep_beginning,
    names_in,
    read_lines,
    sealed,
    step_files,
    whole_lines,
    write_atomically,
)
from trainer.runs.lock import LOCK_NAME, RunLock
from trainer.runs.manifest import RESTS_ON, checkpoints, fault_of, read_manifest, renew_manifest, run_id_of
from trainer.runs.records import asked_as, rollout_in, rollout_to_json
from trainer.runs.resuming import check_resumable, drop_unfit, drop_ungraded, export_is_whole, refuse_changed_files
from trainer.types import Kind, Rollout

_VISIT = TypeAdapter(tuple[int, dict[str, list[float | None]]])
_FOLDERS = (*Kind, "tokens", "checkpoints", "adapter", "warmstart", "agent-rft")
"""What a run makes in its folder; the last is TensorBoard's."""


class RunFolder:
    """One run's files. Only the main process creates and deletes; each process appends to files of its own."""

    def __init__(self, path: Path, *, run_id: str, rank: int) -> None:
        self.path = path
        self.run_id = run_id
        self.remarks: list[str] = []
        """What the user has to be told of the state in which the folder was found."""
        self.exporter: Exporter | None = None
        """Told of all that is logged and rolled out, where the config asks for one."""
        self._rank = rank

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise `UserError` when the folder holds something else than this run, or is not ours. Writes nothing."""
        path = config.output_dir
        check_place(path, _FOLDERS)
        saved = path / "config.yaml"
        if os.path.lexists(saved):
            # A run may be made longer, and be watched elsewhere; anything else makes it another run.
            changed = differences(saved_config(saved), plain_config(config), config)
            changed = [k for k in changed if k != "optim.num_steps" and k.partition(".")[0] != "prometheus"]
            if changed:
                raise UserError(
                    f"output_dir {path}: holds a run with another config; it differs in {', '.join(changed[:5])}. "
                    "Choose another output_dir, delete the folder, or put its config.yaml right if that was changed"
                )
            refuse_changed_files(path, config)
            done = cls(path, run_id="", rank=0).resume_step
            if done > config.optim.num_steps:
                raise UserError(
                    f"output_dir {path}: holds a run that is at step {done} already, past optim.num_steps = "
                    f"{config.optim.num_steps}; choose another output_dir, or a larger optim.num_steps"
                )
        elif names_in(path) - {LOCK_NAME, f"{UNFINISHED}{saved.name}"}:
            if (path / "run.json").exists() or checkpoints(path):
                raise UserError(
                    f"{saved}: is missing, and with it what the run was asked to do; restore it from a copy, or choose "
                    "another output_dir"
                )
            raise UserError(f"output_dir {path}: is not empty and holds no run; choose another output_dir")

    @classmethod
    def is_finished(cls, config: RunConfig) -> bool:
        """Whether the folder holds this very run, at its end, with nothing missing or damaged of what it made.

        Raises `UserError` as `check` does.
        """
        cls.check(config)
        path = config.output_dir
        if not (path / "run.json").exists():
            return False
        about = read_about(path)
        if about.get("finished_steps") != config.optim.num_steps:
            return False
        if not all(isinstance(about.get(key), str) for key in ("adapter", "serve_command")):
            return False
        # Whoever deleted the last checkpoint of a run that has ended has what it made.
        last = [folder for step, folder in checkpoints(path) if step == config.optim.num_steps]
        return export_is_whole(path, about) and not any(fault_of(folder, path) for folder in last)

    @classmethod
    @contextlib.contextmanager
    def held(cls, config: RunConfig, *, rank: int, beside: Mapping[str, str] | None = None) -> Iterator[RunFolder]:
        """The folder as `create` leaves it, closed to other runs until the end. Every process of the run calls it.

        Raises `UserError` on all of them where another run holds it, before anything in it is touched, where what the
        run would go on from is missing or damaged, and where it is not the same folder for all.
        """
        with contextlib.ExitStack() as stack:
            remarks: list[str] = []

            def take() -> str:
                cls.check(config)
                stack.enter_context(RunLock(config.output_dir))
                try:
                    remarks.extend(cls.create(config, beside))
                    run = cls.open(config, rank=0)
                    remarks.extend(check_resumable(run.path))
                except OSError as e:
                    raise UserError(
                        f"output_dir {config.output_dir}: can't be written: {e.filename}: {e.strerror or e}"
                    ) from e
                return run.run_id

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
            run = cls(config.output_dir, run_id=run_id, rank=rank)
            run.remarks = remarks
            yield run

    @classmethod
    def create(cls, config: RunConfig, beside: Mapping[str, str] | None = None) -> list[str]:
        """Lay out the folder, or take up the one there is; `beside` are texts to leave by name. Main process only.

        Returns what the user has to be told.
        """
        cls.check(config)
        path = config.output_dir
        path.mkdir(parents=True, exist_ok=True)
        # Without the aliases that YAML writes for what stands in it twice.
        written_out = json.loads(json.dumps(plain_config(config)))
        write_atomically(path / "config.yaml", yaml.safe_dump(written_out, sort_keys=False))
        for name in (*Kind, "checkpoints"):
            (path / name).mkdir(exist_ok=True)
        clear_unfinished(path, _FOLDERS)
        for name, text in (beside or {}).items():
            write_atomically(path / name, text)
        if (path / "run.json").exists():
            about = read_about(path)
            if FILES not in about or not checkpoints(path):
                write_atomically(path / "run.json", write_json(about | {FILES: files_named(config)}, indent=2))
            return []
        known = run_id_of(path)
        about = {
            "run_id": known or f"run-{uuid.uuid4().hex[:12]}",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            FILES: files_named(config),
        }
        write_atomically(path / "run.json", write_json(about, indent=2))
        return ["run.json was missing and has been made anew"] * bool(checkpoints(path))

    @classmethod
    def open(cls, config: RunConfig, *, rank: int) -> RunFolder:
        """The folder as `create` left it."""
        return cls(config.output_dir, run_id=read_about(config.output_dir)["run_id"], rank=rank)

    @contextlib.contextmanager
    def exported(self, config: RunConfig, phase: Callable[[], str]) -> Iterator[None]:
        """Served to Prometheus where the config asks for it; `phase` tells what the run is at. Raises `UserError`."""

        def kept() -> list[dict[str, Any]]:
            # What a killed run has done since its checkpoint is done anew, and may be damaged.
            with contextlib.suppress(UserError):
                return [r for r in self.metrics() if r["step"] <= self.resume_step]
            return []

        records = processes.from_main(kept) if config.prometheus else []
        with exporting(config, run_id=self.run_id, records=records, phase=phase) as self.exporter:
            yield

    @property
    def is_main(self) -> bool:
        return self._rank == 0

    @property
    def log_path(self) -> Path:
        """Where this process's libraries write."""
        return self.path / (f"run.rank{self._rank}.log" if self._rank else "run.log")

    def note(self, **values: Any) -> None:
        """Add to run.json. Main process only."""
        about = read_about(self.path)
        write_atomically(self.path / "run.json", write_json(about | values, indent=2))

    # ---- metrics

    def log(self, record: dict[str, Any]) -> None:
        if self.is_main:
            append_line(self.path / "metrics.jsonl", record)
            if self.exporter is not None:
                self.exporter.record(record)

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        records = read_lines(path)
        if not all(isinstance(record.get("step"), int) for record in records):
            raise UserError(f"{path}: is damaged: a line names no step")
        return records

    def keep_canary(self, record: dict[str, Any], *, tolerance: float) -> None:
        """Write down what the trainer says of the canary; see `trainer.runs.canary_record`, errors too."""
        if "base" in record:
            ids, scores = record["token_ids"], record["base"]
            processes.from_main(lambda: check_trained_base(self.path, trained_on(self.path, ids), scores, tolerance))
        if self.is_main:
            append_line(self.path / CANARY, record)

    # ---- rollouts

    def rollouts_file(self, kind: Kind, step: int) -> Path:
        """Each process has a file of its own."""
        suffix = f".rank{self._rank}" if self._rank else ""
        return self.path / kind / f"step-{step:06d}{suffix}.jsonl"

    def keep_rollout(self, kind: Kind, step: int, rollout: Rollout) -> None:
        """Write it down, with a digest of the line."""
        append_text(self.rollouts_file(kind, step), sealed(rollout_to_json(rollout)))
        if self.exporter is not None:
            self.exporter.rollout(kind, rollout)

    def finished_rollouts(self, kind: Kind, step: int) -> dict[str, Rollout]:
        """What an interrupted run had already rolled out for this step, by the first attempt's rollout id.

        Of all its processes: there may have been more or fewer than now. Only this process's own file is mended.
        """
        path = self.rollouts_file(kind, step)
        # A line cut off by a kill must not run into the next one.
        drop_damaged(path, intact=lambda line: rollout_in(line) is not None)
        files = sorted(step_files(path.parent, step), key=lambda file: file == path)
        rollouts = [r for file in files for line in whole_lines(file) if (r := rollout_in(line)) is not None]
        return {asked_as(r): r for r in rollouts}

    # ---- what the steps have shown of the tasks

    def note_visits(self, step: int, rewards: Mapping[str, Sequence[float | None]]) -> None:
        """The rewards of a step's groups by task."""
        if self.is_main:
            append_line(self._visits_path, {"step": step, "rewards": rewards})

    def visits(self) -> list[tuple[int, dict[str, list[float | None]]]]:
        """(step, rewards by task) of every step so far."""
        try:
            return [_VISIT.validate_python((r.get("step"), r.get("rewards"))) for r in read_lines(self._visits_path)]
        except ValidationError as e:
            raise UserError(f"{self._visits_path}: is damaged: a line names no step and its rewards") from e

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
        try:
            records = [r for path in sorted(self.path.glob("live.rank*.jsonl")) for r in read_lines(path)]
        except UserError as e:
            raise UserError(f"{e}; delete it to go on: what it names is then not released") from None
        closed = {str(r["closed"]) for r in records if "closed" in r}
        return [str(r["opened"]) for r in records if "opened" in r and str(r["opened"]) not in closed]

    def forget_left_open(self) -> None:
        for path in self.path.glob("live.rank*.jsonl"):
            path.unlink()

    # ---- checkpoints

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint."""
        return next(iter(checkpoints(self.path)), None)

    @property
    def resume_step(self) -> int:
        """The step after which this run goes on; 0 in a new one."""
        checkpoint = self.last_checkpoint()
        return checkpoint[0] if checkpoint else 0

    def vouch_for(self, step: int) -> None:
        """Let the checkpoint of `step`, if there is one, rest on all that has been written until now."""
        newest = self.last_checkpoint()
        if self.is_main and newest is not None and newest[0] == step:
            renew_manifest(newest[1], self.path)

    def rewind(self, step: int, *, ahead: int = 0, num_rollouts: int = 1) -> list[str]:
        """Forget what was written after the checkpoint of `step`, but for the rollouts of the step in flight.

        Of so many steps more where rollouts run `ahead`. Later evaluations go too: they are of a policy that will be
        trained anew. So do rollouts in flight that are damaged, and a step's whole `num_rollouts` of which none has a
        grade. Returns what the user has to be told. Main process only.
        """
        newest = self.last_checkpoint()
        manifest = read_manifest(newest[1]) if newest is not None and newest[0] == step else None
        if manifest is not None:
            for name in RESTS_ON:
                keep_beginning(self.path / name, manifest.rests_on[name].num_bytes)
        else:
            kept = [r for r in self.metrics() if r["step"] <= step]
            write_atomically(self.path / "metrics.jsonl", "".join(write_json(r) + "\n" for r in kept))
            if self._visits_path.exists():  # there is none without a curriculum
                visits = [{"step": s, "rewards": rewards} for s, rewards in self.visits() if s <= step]
                write_atomically(self._visits_path, "".join(write_json(v) + "\n" for v in visits))
        # What it says of later steps is said anew; but a line that a kill cut off would swallow the next one.
        drop_damaged(self.path / CANARY, intact=lambda line: line.endswith(b"\n"))
        told = []
        is_evaluated = any(r["step"] == step and "eval/rollouts" in r for r in self.metrics())
        in_flight, needs_digest = range(step + 1, step + 2 + ahead), manifest is not None
        for name, last in ((Kind.TRAIN, in_flight[-1]), (Kind.EVAL, step), ("tokens", step)):
            for path in sorted(step_files(self.path / name)):
                if int(path.name[5:].partition(".")[0]) > last:
                    clear(path)
        for kind, steps in ((Kind.TRAIN, in_flight), (Kind.EVAL, [step])):
            for path, num_dropped in drop_unfit(self.path, self.run_id, kind, steps, needs_digest=needs_digest):
                is_over = kind == Kind.EVAL and is_evaluated
                then = "what the metrics say of them stays" if is_over else "their rollouts are made again"
                told.append(
                    f"{path}: {num_dropped} lines are damaged, of another step, or there twice: left out; {then}"
                )
        return told + drop_ungraded(self.path, in_flight, num_rollouts=num_rollouts)
