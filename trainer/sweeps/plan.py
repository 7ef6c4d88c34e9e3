"""What a sweep is going to do, checked as far as it can be before anything starts."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import UserError, told_of
from envs.reading.json_text import write_json
from envs.secrets import without_secrets
from trainer.config import RunConfig, laid_over, load_config
from trainer.runs.about import differences, plain_config
from trainer.runs.files import check_place, names_in, read_object, write_atomically
from trainer.runs.lock import LOCK_NAME
from trainer.runs.resuming import start_adapter
from trainer.sweeps.config import GridConfig, HalvingConfig, MedianConfig, SweepConfig, TpeConfig, load_sweep
from trainer.sweeps.space import Point, as_overrides, corner_points, grid_points, in_words
from trainer.sweeps.work import Slot, slots_of, starter

_ABOUT = "sweep.json"
_FOLDERS = ("trials", "logs")
_GRADED = ("grader", "penalties", "judge", "watch_grader")
"""Sections that the reward comes from."""
_NOT_MEASURED = ("output_dir", "trackers", "prometheus")
"""Of the base, likewise."""
_FREE = ("output_dir", "parallel", "launch", "storage", "beside")
"""What may change between two calls: it changes nothing that has been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A sweep that can be meant."""

    config: SweepConfig
    base: RunConfig
    seeds: Sequence[int]
    points: Sequence[Point] | None
    """A grid's; None of a method that draws."""
    slots: Sequence[Slot]
    start: Sequence[str]
    """What starts scripts/train.py, without its arguments."""
    remarks: Sequence[str]

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    @property
    def num_trials(self) -> int:
        if self.points is not None:
            return len(self.points)
        assert not isinstance(self.config.method, GridConfig)
        return self.config.method.num_trials

    def runs(self, index: int) -> Iterator[tuple[str, int]]:
        """(name, seed) of the runs of a trial."""
        for seed in self.seeds:
            yield f"trial-{index:04d}" + (f"-seed-{seed}" if len(self.seeds) > 1 else ""), seed

    def run_folder(self, name: str) -> Path:
        return self.folder / "trials" / name

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def overrides(self, point: Point, name: str, seed: int) -> list[str]:
        own: dict[str, Any] = {"seed": seed, "output_dir": str(self.run_folder(name))}
        if self.base.prometheus is not None:
            # Of runs side by side one alone would have the port.
            own["prometheus"] = None
        return as_overrides({**self.config.settings, **point, **own})

    def run_config(self, point: Point, name: str, seed: int) -> RunConfig:
        """Raises `UserError`."""
        return load_config(self.config.base, self.overrides(point, name, seed))


def make_plan(path: Path, overrides: Sequence[str], *, train: Path, launch: str | None) -> Plan:
    """Read the sweep and check every config that is known before it begins. Raises `UserError`."""
    config, _ = load_sweep(path, list(overrides))
    if launch is not None:
        config = config.model_copy(update={"launch": launch})
    with told_of(f"sweep {path}"):
        config = config.model_copy(update={"settings": laid_over(config.base, config.settings)})
        own = as_overrides({**config.settings, "output_dir": str(config.output_dir)})
        base = load_config(config.base, own)
        points = grid_points(config.space) if config.method.type == "grid" else None
        plan = Plan(
            config=config,
            base=base,
            seeds=config.seeds or [base.seed],
            points=points,
            slots=slots_of(config.parallel),
            start=starter(train, config.launch, "launch"),
            remarks=list(_remarks(config, base)),
        )
        for point in points if points is not None else corner_points(config.space):
            _check(plan, point)
        if config.pruner is not None and not 0 < base.eval.every_steps < base.optim.num_steps:
            raise UserError(
                "pruner: would never see an evaluation on the way; set eval.every_steps below optim.num_steps, "
                "settings: {eval.every_steps: 2} say"
            )
    return plan


def _check(plan: Plan, point: Point) -> None:
    with told_of(f"space: {in_words(point)}"):
        start_adapter(plan.run_config(point, *next(plan.runs(0))))


def _remarks(config: SweepConfig, base: RunConfig) -> Iterator[str]:
    """What can be meant, and has to be known."""
    graded = [key for key in config.space if key.partition(".")[0] in _GRADED]
    if graded and config.objective.key == "eval/reward":
        yield (
            f"objective: eval/reward is what {graded[0]} changes, so that trials are not measured alike; eval/correct "
            "is the same for all, where the grader says what passes"
        )
    if base.prometheus is not None:
        yield "prometheus: trials listen at no port, of which there is one; watch them by scripts/watch.py"
    yield from _without_effect(config, base)
    if config.seeds is None and base.eval.num_tasks * base.eval.samples_per_task < 16:
        yield "eval: few rollouts and one seed a trial: the best one may be so by chance"


def _without_effect(config: SweepConfig, base: RunConfig) -> Iterator[str]:
    method, pruner, num_steps = config.method, config.pruner, base.optim.num_steps
    if isinstance(method, TpeConfig) and method.startup_trials >= method.num_trials:
        yield (
            f"method.startup_trials: {method.startup_trials} are drawn at random before TPE draws any, and there are "
            f"{method.num_trials} trials"
        )
    if isinstance(pruner, MedianConfig):
        if not isinstance(method, GridConfig) and pruner.startup_trials >= method.num_trials:
            yield f"pruner.startup_trials: {pruner.startup_trials} trials come to their end before any is cut short"
        if pruner.warmup_steps >= num_steps:
            yield f"pruner.warmup_steps: no trial is cut short before step {pruner.warmup_steps}, of {num_steps}"
    if isinstance(pruner, HalvingConfig) and pruner.min_steps >= num_steps:
        yield f"pruner.min_steps: the first rung is at step {pruner.min_steps}, of {num_steps}: no trial is cut short"


def take_folder(plan: Plan) -> tuple[str, bool]:
    """The sweep's id, and whether it has begun, in its folder, which the caller has locked. Raises `UserError`.

    A folder belongs to one sweep: it may be made longer, and run otherwise.
    """
    folder = plan.folder
    check_place(folder, _FOLDERS)
    about = read_object(folder / _ABOUT)
    mine = _written(plan)
    if about is None:
        if names_in(folder) - {LOCK_NAME}:
            raise UserError(f"output_dir {folder}: is not empty and holds no sweep; choose another output_dir")
        about = {"sweep_id": uuid.uuid4().hex[:8], "has_begun": False, **mine}
    sweep_id, has_begun = about.get("sweep_id"), about.get("has_begun")
    if not isinstance(sweep_id, str) or not isinstance(has_begun, bool):
        raise UserError(f"{folder / _ABOUT}: is damaged; restore it from a copy, or choose another output_dir")
    changed = [f"sweep.{key}" for key in differences(about.get("sweep"), mine["sweep"], plan.config)]
    changed += [f"base.{key}" for key in differences(about.get("base"), mine["base"], plan.base)]
    changed = [key for key in changed if key != "sweep.method.num_trials"]
    if changed:
        raise UserError(
            f"output_dir {folder}: holds another sweep; it differs in {', '.join(changed[:5])}. Choose another "
            "output_dir, or delete the folder"
        )
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    _write(folder, about | mine)
    return sweep_id, has_begun


def note_begun(folder: Path) -> None:
    """The storage knows the sweep from here on."""
    _write(folder, (read_object(folder / _ABOUT) or {}) | {"has_begun": True})


def _written(plan: Plan) -> dict[str, Any]:
    sweep = plan.config.model_dump(mode="json", exclude={*_FREE, "base"})
    # Of the base what it says, wherever it lies: to write it anew must not change trials that have run.
    base = {key: value for key, value in plain_config(plan.base).items() if key not in _NOT_MEASURED}
    return {"sweep": _plain(without_secrets(sweep)), "base": _plain(base)}


def _plain(value: Any) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = json.loads(json.dumps(value))
    return plain


def _write(folder: Path, about: Mapping[str, Any]) -> None:
    write_atomically(folder / _ABOUT, write_json(dict(about), indent=2))
