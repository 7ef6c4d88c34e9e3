"""The record of a sweep in Optuna's storage, and Optuna's samplers and pruners. Optuna is loaded when one is opened.

A trial is written down at once, with its point; what a point is depends on its number alone (grid, random) or on what
had been told by then (tpe), never on a sampler's state, which a kill would lose.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from envs.errors import FoundLate, UserError
from envs.reading.variables import expand
from trainer.seeds import derive_seed
from trainer.sweeps.config import Axis, ChoicesConfig, LogRangeConfig, RandomConfig, SweepConfig, TpeConfig, label_of
from trainer.sweeps.space import Point

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

State = Literal["running", "complete", "pruned", "failed"]

_STATES: dict[str, State] = {"RUNNING": "running", "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
_DIRECTIONS = {"maximise": "maximize", "minimise": "minimize"}
_PATIENCE_S = 10
_TOP_SHARE = 0.25
"""What importance is told of: how the best quarter of the trials differs from all. Optuna's tenth would be one trial
of twelve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A trial as the storage has it; of one that was tried again, the last try."""

    index: int
    """Its place in the sweep, from 0; its folders have it."""
    point: Point
    state: State
    value: float | None
    """The objective, where it is complete."""
    reason: str
    """Why it failed or was cut short."""
    last_step: int
    """The last evaluation that was told on the way; 0: none."""
    seconds: float | None
    """From its beginning to its end, what a kill lay between included; None while it is at work."""


class Study:
    """One sweep's trials. Raises `UserError` where the storage can't be had, `FoundLate` once it could."""

    def __init__(self, config: SweepConfig, *, sweep_id: str, is_new: bool) -> None:
        optuna = _optuna()
        self._config = config
        self._where = "storage" if config.storage else str(config.output_dir / "study.db")
        self._name = f"{config.output_dir.name}-{sweep_id}"
        self._distributions = {key: _distribution(axis) for key, axis in config.space.items()}
        with self._told(UserError):
            self._storage = optuna.storages.RDBStorage(**_address(config))
            known = self._name in optuna.get_all_study_names(self._storage)
            if not is_new and not known:
                others = ", ".join(optuna.get_all_study_names(self._storage)) or "no study at all"
                raise UserError(
                    f"{self._where}: holds no study {self._name!r}, which {config.output_dir} began, but {others}: it "
                    "belongs to another sweep; restore it, or choose another output_dir"
                )
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=self._name,
                load_if_exists=True,
                direction=_DIRECTIONS[config.objective.goal],
                pruner=_pruner(config),
            )

    def trials(self) -> dict[int, Noted]:
        """By index, in its order."""
        with self._told(FoundLate):
            trials = self._study.get_trials(deepcopy=False)
        noted = {int(t.user_attrs["index"]): self._noted(t) for t in trials}
        return dict(sorted(noted.items()))

    def propose(self, index: int) -> Point:
        """The point of the trial `index`, of a method that draws."""
        optuna, method = _optuna(), self._config.method
        assert isinstance(method, RandomConfig | TpeConfig)
        seed = derive_seed(method.seed, "trial", index) % 2**32
        if isinstance(method, TpeConfig):
            # Trials at work count as bad ones, so that two at once do not try the same.
            sampler: Any = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=method.startup_trials, constant_liar=True
            )
        else:
            sampler = optuna.samplers.RandomSampler(seed=seed)
        # Drawn aside, and written down as a whole: a kill leaves no half of a trial.
        aside = optuna.create_study(sampler=sampler, direction=_DIRECTIONS[self._config.objective.goal])
        if isinstance(method, TpeConfig):
            with self._told(FoundLate):
                aside.add_trials(self._study.get_trials(deepcopy=False))
        drawn = aside.ask(self._distributions).params
        return {key: _value(self._config.space[key], drawn[key]) for key in self._config.space}

    def begin(self, index: int, point: Point) -> None:
        """Write the trial down as one at work."""
        optuna = _optuna()
        with self._told(FoundLate):
            params = {key: _stored(self._config.space[key], value) for key, value in point.items()}
            self._study.add_trial(
                optuna.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params=params,
                    distributions=self._distributions,
                    user_attrs={"index": index},
                )
            )

    def report(self, index: int, step: int, value: float) -> bool:
        """An evaluation on the way; whether the pruner ends the trial by it."""
        optuna = _optuna()
        with self._told(FoundLate):
            trial = optuna.trial.Trial(self._study, self._id(index))
            trial.report(value, step)
            return bool(trial.should_prune())

    def tell(self, index: int, value: float) -> None:
        """It has come to its end."""
        with self._told(FoundLate):
            self._study.tell(self._number(index), value)

    def give_up(self, index: int, state: Literal["pruned", "failed"], reason: str) -> None:
        """It was cut short, or could not be run."""
        optuna = _optuna()
        ends = {"pruned": optuna.trial.TrialState.PRUNED, "failed": optuna.trial.TrialState.FAIL}
        with self._told(FoundLate):
            self._storage.set_trial_user_attr(self._id(index), "reason", reason[:1000])
            self._study.tell(self._number(index), state=ends[state])

    def importance(self) -> dict[str, float]:
        """The share of each key in what makes trials good (PED-ANOVA, arXiv:2304.10255), the largest first.

        Empty for fewer than four complete trials, or where all have one value.
        """
        optuna = _optuna()
        values = [t.value for t in self.trials().values() if t.state == "complete"]
        if len(values) < 4 or len(set(values)) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_TOP_SHARE)
        with self._told(FoundLate):
            return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))

    def _noted(self, trial: optuna.trial.FrozenTrial) -> Noted:
        space = self._config.space
        return Noted(
            index=int(trial.user_attrs["index"]),
            point={key: _value(space[key], trial.params[key]) for key in space},
            state=_STATES[trial.state.name],
            value=trial.value,
            reason=str(trial.user_attrs.get("reason", "")),
            last_step=trial.last_step or 0,
            seconds=trial.duration.total_seconds() if trial.duration is not None else None,
        )

    def _id(self, index: int) -> int:
        return int(self._last(index)._trial_id)

    def _number(self, index: int) -> int:
        return int(self._last(index).number)

    def _last(self, index: int) -> optuna.trial.FrozenTrial:
        """The last try."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs["index"] == index][-1]

    @contextlib.contextmanager
    def _told(self, kind: type[UserError]) -> Iterator[None]:
        """What the database says, as a mistake on one line."""
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except (SQLAlchemyError, OptunaError, ImportError, RuntimeError, ValueError) as e:
            cause: BaseException = e
            while (inner := getattr(cause, "orig", None) or cause.__cause__) is not None:
                cause = inner
            said = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise kind(f"{self._where}: can't be used: {said.strip()}") from e


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna, which records sweeps, is not installed: pip install 'agent-rft[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _address(config: SweepConfig) -> Mapping[str, Any]:
    from sqlalchemy.pool import NullPool

    # A connection for each use: between two evaluations a server may well have closed one, and none is left open.
    if config.storage is None:
        path: Path = (config.output_dir / "study.db").absolute()
        url, patience = f"sqlite:///{quote(str(path))}", {"timeout": _PATIENCE_S}
    else:
        _, _, rest = expand(config.storage, "storage").partition("://")
        url, patience = f"postgresql+psycopg://{rest}", {"connect_timeout": _PATIENCE_S}
    return {"url": url, "engine_kwargs": {"connect_args": patience, "poolclass": NullPool}}


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, ChoicesConfig):
        return CategoricalDistribution([label_of(value) for value in axis.values])
    log = isinstance(axis, LogRangeConfig)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=log)
    return FloatDistribution(float(axis.low), float(axis.high), log=log)


def _stored(axis: Axis, value: Any) -> Any:
    return label_of(value) if isinstance(axis, ChoicesConfig) else value


def _value(axis: Axis, stored: Any) -> Any:
    if isinstance(axis, ChoicesConfig):
        return next(value for value in axis.values if label_of(value) == stored)
    return stored


def _pruner(config: SweepConfig) -> optuna.pruners.BasePruner:
    pruners, pruner = _optuna().pruners, config.pruner
    if pruner is None:
        return pruners.NopPruner()
    if pruner.type == "median":
        return pruners.MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup_steps)
    return pruners.SuccessiveHalvingPruner(min_resource=pruner.min_steps, reduction_factor=pruner.reduction_factor)
