"""A sweep's settings: which settings of a run are tried, how trials are chosen, measured, cut short and run.

Needs nothing but pydantic: a sweep that cannot be meant is refused before Optuna or a model is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from envs.errors import UserError, nearest
from envs.reading.documents import apply_override, as_number, read_document
from envs.settings import Settings, by_type
from envs.validation import validation_problems
from trainer.measures.catalogue import CATALOGUE
from trainer.measures.reference import is_known

_MOST_TRIALS = 10_000
_LARGEST, _SMALLEST = 1e100, 1e-100
"""Of bounds, so that what is computed of them is a number."""
_TAKEN = {
    "output_dir": "each run has a folder of its own",
    "seed": "it is nothing to choose; give seeds, over which every trial is averaged",
    "base": "it names the sweep's config",
    "trackers": "it changes nothing that is measured",
    "prometheus": "it changes nothing that is measured",
}
"""What stands nowhere in a space, and why."""


def label_of(value: Any) -> str:
    """A value as it is shown, and as it stands in KEY=VALUE: JSON, but a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- the space


class ChoicesConfig(Settings):
    """Some values; a plain list says the same."""

    type: Literal["choices"]
    values: list[Any] = Field(min_length=2, description="the values, each once")

    @field_validator("values")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        values = [as_number(value) for value in values]
        try:
            labels = [label_of(value) for value in values]
        except (TypeError, ValueError) as e:
            raise ValueError(f"expected values that JSON has: {e}") from None
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"{twice[0]} stands twice; expected each value once")
        return values


class RangeConfig(Settings):
    """Numbers between two bounds, both included; whole numbers where both bounds are."""

    type: Literal["range"]
    low: int | float = Field(description="the lowest")
    high: int | float = Field(description="the highest")
    num: int | None = Field(
        None,
        ge=2,
        le=_MOST_TRIALS,
        description="of a grid: so many values, evenly from low to high; null: each whole number",
    )

    @model_validator(mode="after")
    def _in_order(self) -> RangeConfig:
        _check_order(self.low, self.high)
        return self


class LogRangeConfig(Settings):
    """Numbers between two bounds, both included, each power as likely; whole numbers where both bounds are."""

    type: Literal["log_range"]
    low: int | float = Field(description="the lowest, above 0")
    high: int | float = Field(description="the highest")
    num: int | None = Field(
        None, ge=2, le=_MOST_TRIALS, description="of a grid: so many values, by equal factors from low to high"
    )

    @model_validator(mode="after")
    def _in_order(self) -> LogRangeConfig:
        if self.low <= 0:
            raise ValueError(f"low: expected a number above 0, as logarithms have no other (got {self.low:g})")
        _check_order(self.low, self.high)
        if self.low < _SMALLEST:
            raise ValueError(f"low: expected at least {_SMALLEST:g} (got {self.low:g})")
        return self


def _check_order(low: float, high: float) -> None:
    if max(abs(low), abs(high)) > _LARGEST:
        raise ValueError(f"expected bounds between {-_LARGEST:g} and {_LARGEST:g}")
    if low >= high:
        raise ValueError(f"low {low:g} is not below high {high:g}; expected the bounds in their order")


def _choices(value: Any) -> Any:
    return {"type": "choices", "values": value} if isinstance(value, list) else value


Axis = ChoicesConfig | RangeConfig | LogRangeConfig


# ---- how trials are chosen, measured, cut short and run


class GridConfig(Settings):
    """Every combination, in the order of the file."""

    type: Literal["grid"] = "grid"


class RandomConfig(Settings):
    """Each trial drawn by itself (Optuna's RandomSampler)."""

    type: Literal["random"]
    num_trials: int = Field(ge=2, le=_MOST_TRIALS, description="how many; more may be asked for later")
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws")


class TpeConfig(Settings):
    """Drawn where trials went well before: a tree-structured Parzen estimator (Optuna's TPESampler)."""

    type: Literal["tpe"]
    num_trials: int = Field(ge=2, le=_MOST_TRIALS, description="how many; more may be asked for later")
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws")
    startup_trials: int = Field(8, ge=1, description="trials that are drawn at random before")


class ObjectiveConfig(Settings):
    """What makes a trial a good one: a figure of its last held-out evaluation, the mean over `seeds`."""

    key: str = Field("eval/reward", description="a key of metrics.jsonl that begins with eval/")
    goal: Literal["maximise", "minimise"] = Field("maximise", description="whether more is better")

    @field_validator("key")
    @classmethod
    def _of_an_evaluation(cls, key: str) -> str:
        return _eval_key(key)


def _eval_key(key: str) -> str:
    where, _, name = key.rpartition("eval/")
    if where or not name or name == key:
        raise ValueError("expected a figure of the held-out evaluation, such as eval/reward")
    # A reward function may log what nobody else knows; what is nearly a figure's name is a slip.
    if not is_known(key) and (hint := nearest(name, [measure.key for measure in CATALOGUE if measure.is_logged])):
        raise ValueError(f"no figure of an evaluation is called {name}{hint}")
    return key


class MedianConfig(Settings):
    """A trial ends whose best evaluation until now is below the median of the others' at that step."""

    type: Literal["median"]
    startup_trials: int = Field(4, ge=1, description="trials that come to their end before any is cut short")
    warmup_steps: int = Field(0, ge=0, description="evaluations before this step end no trial")


class HalvingConfig(Settings):
    """Asynchronous successive halving (arXiv:1810.05934): of so many trials that reach a rung one goes on."""

    type: Literal["successive_halving"]
    min_steps: int = Field(1, ge=1, description="the first rung: steps of training")
    reduction_factor: int = Field(3, ge=2, description="how many compete for one place, and how far rungs lie apart")


class SlotsConfig(Settings):
    """So many runs at once, which share this machine or which the launcher sends elsewhere."""

    type: Literal["slots"] = "slots"
    num: int = Field(1, ge=1, le=1024, description="runs at once")


class GpusConfig(Settings):
    """Runs side by side, each of which sees GPUs of its own (CUDA_VISIBLE_DEVICES)."""

    type: Literal["gpus"]
    ids: list[int | str] | None = Field(
        None, min_length=1, description="as CUDA_VISIBLE_DEVICES names them; null: those of this process"
    )
    per_run: int = Field(1, ge=1, description="GPUs of each run; the launcher starts as many processes")

    @field_validator("ids")
    @classmethod
    def _each_once(cls, ids: list[int | str] | None) -> list[int | str] | None:
        if ids is not None and (twice := [x for x in ids if [str(y) for y in ids].count(str(x)) > 1]):
            raise ValueError(f"{twice[0]} stands twice; expected each GPU once")
        return ids


class CoresConfig(Settings):
    """Runs side by side, each on a share of this machine's cores of its own."""

    type: Literal["cores"]
    num: int = Field(2, ge=1, le=1024, description="runs at once; each takes the memory of a whole run")


Method = GridConfig | RandomConfig | TpeConfig
Pruner = MedianConfig | HalvingConfig
Parallel = SlotsConfig | GpusConfig | CoresConfig

if TYPE_CHECKING:
    AnyAxis = Axis
    AnyMethod = Method
    AnyPruner = Pruner
    AnyParallel = Parallel
else:
    _AXES = {"choices": ChoicesConfig, "range": RangeConfig, "log_range": LogRangeConfig}
    AnyAxis = Annotated[by_type(_AXES, without_type=""), BeforeValidator(_choices)]
    AnyMethod = by_type({"grid": GridConfig, "random": RandomConfig, "tpe": TpeConfig}, without_type="grid")
    AnyPruner = by_type({"median": MedianConfig, "successive_halving": HalvingConfig}, without_type="")
    AnyParallel = by_type({"slots": SlotsConfig, "gpus": GpusConfig, "cores": CoresConfig}, without_type="slots")


class SweepConfig(Settings):
    """A sweep: runs of one config that differ in some settings."""

    base: Path = Field(description="the config of all trials, from this file's folder")
    output_dir: Path = Field(description="the sweep's folder; the trials' run folders lie in it")
    settings: dict[str, Any] = Field({}, description="what all trials have other than the base, by dotted key")
    space: dict[str, AnyAxis] = Field(
        min_length=1, description="what trials differ in, by dotted key: a list of values, a range or a log_range"
    )
    method: AnyMethod = Field(GridConfig(), description="how trials are chosen")
    seeds: list[Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]] | None = Field(
        None, min_length=1, description="each trial is run with each of them and judged by the mean; null: the base's"
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="what makes a trial a good one")
    beside: list[str] = Field([], description="figures of the evaluation that the report sets against the objective")
    pruner: AnyPruner | None = Field(
        None, description="which trials end early, by their evaluations on the way; null: none"
    )
    parallel: AnyParallel = Field(SlotsConfig(), description="how many runs are at work at once, and where")
    launch: str | None = Field(
        None, description="what starts scripts/train.py, `accelerate launch --num_processes 4` say; null: Python"
    )
    storage: str | None = Field(
        None, description="PostgreSQL's URL, which may hold ${NAME}; null: study.db in the sweep's folder"
    )

    @field_validator("space")
    @classmethod
    def _keys_that_can_be_tried(cls, space: dict[str, Axis]) -> dict[str, Axis]:
        for key in space:
            _check_key(key)
            top = key.partition(".")[0]
            if key in _TAKEN:
                raise ValueError(f"{key}: {_TAKEN[key]}")
            if top == "eval":
                raise ValueError(f"{key}: trials would be measured by different evaluations; set it for all (settings)")
            if inner := [other for other in space if other.startswith(f"{key}.")]:
                raise ValueError(f"{key}: is the section of {inner[0]}; expected one of the two")
        return space

    @field_validator("settings")
    @classmethod
    def _keys_of_a_run(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for key in settings:
            _check_key(key)
            if key in ("output_dir", "base"):
                raise ValueError(f"{key}: stands on top of the sweep")
        return settings

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds and (twice := [seed for seed in seeds if seeds.count(seed) > 1]):
            raise ValueError(f"{twice[0]} stands twice; expected each seed once")
        return seeds

    @field_validator("beside")
    @classmethod
    def _of_an_evaluation(cls, keys: list[str]) -> list[str]:
        return [_eval_key(key) for key in dict.fromkeys(keys)]

    @field_validator("storage")
    @classmethod
    def _a_server(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("postgresql://", "postgresql+psycopg://", "postgres://", "${")):
            raise ValueError("expected postgresql://USER:PASSWORD@HOST/DATABASE, or null for study.db in output_dir")
        return url

    @model_validator(mode="after")
    def _once(self) -> SweepConfig:
        for key in self.space:
            for other in self.settings:
                if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                    raise ValueError(f"settings.{other}: space.{key} sets it too; expected one of the two")
        if "seed" in self.settings and self.seeds is not None:
            raise ValueError("settings.seed: seeds says it too; expected one of the two")
        return self

    @model_validator(mode="after")
    def _pruned_seeds_run_side_by_side(self) -> SweepConfig:
        slots, num_seeds = self.parallel, len(self.seeds or [0])
        # How many GPUs will be found is not known yet.
        if isinstance(slots, GpusConfig):
            at_once = len(slots.ids) // slots.per_run if slots.ids else None
        else:
            at_once = slots.num
        if self.pruner is not None and at_once is not None and at_once < num_seeds:
            raise ValueError(
                f"pruner: would only ever stop the last of {num_seeds} seeds that run one after the other, as parallel "
                f"has room for {at_once}; give parallel as much room as there are seeds, or leave the pruner out"
            )
        return self

    @model_validator(mode="after")
    def _a_grid_has_its_values(self) -> SweepConfig:
        for key, axis in self.space.items():
            if isinstance(axis, ChoicesConfig):
                continue
            is_whole = isinstance(axis, RangeConfig) and isinstance(axis.low, int) and isinstance(axis.high, int)
            if isinstance(self.method, GridConfig) and axis.num is None and not is_whole:
                raise ValueError(f"space.{key}.num: required of a grid: how many values between the bounds")
            if not isinstance(self.method, GridConfig) and axis.num is not None:
                raise ValueError(f"space.{key}.num: has no effect but in a grid; leave it out")
        return self


def _check_key(key: str) -> None:
    if not all(key.split(".")):
        raise ValueError(f"{key!r}: expected a key of the config, such as optim.learning_rate")


def load_sweep(path: Path, overrides: list[str]) -> tuple[SweepConfig, dict[str, Any]]:
    """A sweep's file under `KEY=VALUE` for all runs; `output_dir=` is the sweep's. Also what it holds as written.

    The base's path is as this process sees it. Raises `UserError`.
    """
    data = read_document(path, f"sweep {path}")
    if not isinstance(data, dict):
        raise UserError(f"sweep {path}: expected a mapping of settings, got {type(data).__name__}")
    for override in overrides:
        key, _, value = override.partition("=")
        one: dict[str, Any] = {}
        apply_override(one, f"value={value}" if "=" in override else override)
        if key == "output_dir":
            data["output_dir"] = one["value"]
        else:
            settings = data.setdefault("settings", {})
            if not isinstance(settings, dict):
                break  # told by the validation
            settings[key] = one["value"]
    try:
        config = SweepConfig.model_validate(data)
    except ValidationError as e:
        raise UserError(validation_problems(f"sweep {path}", e, SweepConfig, data)) from None
    return config.model_copy(update={"base": path.parent / config.base}), data
