"""Policies side by side on the tasks that they share. Pure.

Shape suffixes: P policies, T shared tasks.

Every figure of a policy is the mean over the shared tasks of its mean over that task's graded rollouts, so that a task
counts the same however often it was rolled out. The first policy is the baseline; intervals are paired bootstraps over
tasks (see `trainer.bootstrap`), seeded. Tails (p50, p90, p95, max) are over single rollouts and have no interval.

Latency is that of each evaluation's own machine and load: rollouts that share an engine slow each other down. Compare
latencies of runs on the same hardware with as many rollouts at once, or compare tokens and calls instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from envs.errors import UserError
from trainer.bootstrap import Floats, Interval, intervals, paired_differences
from trainer.compare_data import Policy
from trainer.measures import MEASURES, Masked, Measure, masked_causes
from trainer.rollout import Rollout

_TAILS = ("tool_calls", "tokens", "latency_s")
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "max": 1.0}
_NUM_GAINS, _NUM_LOSSES = 3, 2
DEFAULT_BY = "kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measure of all policies."""

    measure: Measure
    means: Sequence[Interval]
    """By policy."""
    differences: Sequence[Interval]
    """Of each later policy to the first."""

    def percent(self, i: int) -> float | None:
        """The change of the i-th later policy in percent of the first; None where that is not above 0."""
        base = self.means[0].mean
        return 100 * self.differences[i].mean / base if base > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A task with one typical rollout of each policy."""

    task_id: str
    difference: float
    """In mean reward, of the last policy to the first."""
    rollouts: Sequence[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the table, the Markdown and the page show."""

    policies: Sequence[Policy]
    """Their rollouts are those of shared tasks, graded only."""
    num_tasks: int
    num_left_out: int
    """Tasks that not all policies have a graded rollout of."""
    num_masked: Mapping[Masked, Sequence[int]]
    """By policy: rollouts without a grade, for each kind of reason that there is."""
    lines: Sequence[Line]
    tails: Mapping[str, Sequence[Mapping[str, float]]]
    """Measure → by policy: quantile → value."""
    by: str
    kinds: Mapping[str, Sequence[Line]]
    """Kind of question → its lines; empty where the tasks have no such key, or one value only."""
    errors: Mapping[str, Sequence[float]]
    """Errors per rollout by kind → by policy."""
    pairs: Sequence[Pair]
    seed: int


def compare(policies: Sequence[Policy], *, by: str | None = None, seed: int = 0) -> Comparison:
    """`by` is the key of a task's item that tells kinds of question apart. Raises `UserError` for nothing in common."""
    graded = [p.graded() for p in policies]
    shared = [t for t in graded[0] if all(t in other for other in graded[1:])]
    if not shared:
        raise UserError(
            f"{', '.join(p.name for p in policies)}: no task has a graded rollout of every policy; "
            "expected evaluations of the same tasks (same task ids)"
        )
    kind_of = {t: _kind(graded[0][t][0], by or DEFAULT_BY) for t in shared}
    if by is not None and not any(kind_of.values()):
        raise UserError(
            f"--by {by}: no task's item has this key; it has {', '.join(graded[0][shared[0]][0].task.item)}"
        )
    kinds = sorted({kind for kind in kind_of.values() if kind})
    mine = [replace(p, rollouts=[r for t in shared for r in g[t]]) for p, g in zip(policies, graded, strict=True)]
    return Comparison(
        policies=mine,
        num_tasks=len(shared),
        num_left_out=len({t for g in graded for t in g} - set(shared)),
        num_masked=_num_masked(policies),
        lines=_lines(graded, shared, seed),
        tails={key: [_tail(p.rollouts, key) for p in mine] for key in _TAILS},
        by=by or DEFAULT_BY,
        kinds={kind: _lines(graded, [t for t in shared if kind_of[t] == kind], seed) for kind in kinds}
        if len(kinds) > 1
        else {},
        errors=_errors(mine),
        pairs=_pairs(graded, shared),
        seed=seed,
    )


def _kind(rollout: Rollout, by: str) -> str:
    value = rollout.task.item.get(by)
    return str(value) if isinstance(value, str | int | float | bool) else ""


def _lines(graded: Sequence[Mapping[str, Sequence[Rollout]]], tasks: Sequence[str], seed: int) -> list[Line]:
    """Of every measure that all rollouts have."""
    lines = []
    for measure in MEASURES:
        values_PT = _task_means(graded, tasks, measure)
        if values_PT is not None:
            means, changes = intervals(values_PT, seed=seed), paired_differences(values_PT, seed=seed)
            lines.append(Line(measure=measure, means=means, differences=changes))
    return lines


def _task_means(
    graded: Sequence[Mapping[str, Sequence[Rollout]]], tasks: Sequence[str], measure: Measure
) -> Floats | None:
    rows: list[list[float]] = []
    for by_task in graded:
        row = []
        for task_id in tasks:
            values = [value for r in by_task[task_id] if (value := measure.of(r)) is not None]
            if not values:
                return None
            row.append(fmean(values))
        rows.append(row)
    return np.array(rows)


def values(rollouts: Sequence[Rollout], key: str) -> list[float]:
    """A measure of each rollout that has it."""
    measure = next(m for m in MEASURES if m.key == key)
    return [value for r in rollouts if (value := measure.of(r)) is not None]


def _tail(rollouts: Sequence[Rollout], key: str) -> dict[str, float]:
    measured = values(rollouts, key)
    return {name: float(np.quantile(measured, q)) for name, q in _QUANTILES.items()}


def _num_masked(policies: Sequence[Policy]) -> dict[Masked, list[int]]:
    causes = [masked_causes(p.rollouts) for p in policies]
    return {
        kind: [c[kind].total() if kind in c else 0 for c in causes] for kind in Masked if any(kind in c for c in causes)
    }


def _errors(policies: Sequence[Policy]) -> dict[str, list[float]]:
    """Per graded rollout: tool errors by kind, malformed calls, grader errors by kind, episodes without an answer."""
    counts = [Counter[str]() for _ in policies]
    for count, policy in zip(counts, policies, strict=True):
        for rollout in policy.rollouts:
            for turn in rollout.episode.turns:
                count["malformed call"] += turn.malformed
                count.update(f"tool: {result.error}" for result in turn.results if result.error is not None)
            count.update(f"grader: {kind}" for kind in (rollout.grade.errors if rollout.grade else ()))
            if not rollout.episode.stop_reason.is_complete:
                count[f"ended by {rollout.episode.stop_reason}"] += 1
    names = sorted({name for count in counts for name in count if count[name]})
    return {n: [c[n] / len(p.rollouts) for c, p in zip(counts, policies, strict=True)] for n in names}


def _pairs(graded: Sequence[Mapping[str, Sequence[Rollout]]], tasks: Sequence[str]) -> list[Pair]:
    """The tasks whose mean reward rose most from first to last policy, and those where it fell most.

    Both, or the choice would flatter. Where fewer tasks changed in reward, those whose calls changed most fill up.
    """
    means = [{t: fmean(r.grade.reward for r in g[t] if r.grade) for t in tasks} for g in graded]
    calls = [{t: fmean(r.episode.num_tool_calls for r in g[t]) for t in tasks} for g in graded]
    change = {t: means[-1][t] - means[0][t] for t in tasks}
    ranked = sorted(tasks, key=lambda t: -change[t])
    chosen = [t for t in ranked[:_NUM_GAINS] if change[t] > 0] + [
        t for t in ranked[::-1][:_NUM_LOSSES] if change[t] < 0
    ]
    by_calls = sorted(tasks, key=lambda t: -abs(calls[-1][t] - calls[0][t]))
    chosen += [t for t in by_calls if t not in chosen and calls[-1][t] != calls[0][t]]
    return [
        Pair(
            task_id=t,
            difference=change[t],
            rollouts=[
                # The rollout nearest to the task's mean is the typical one.
                min(g[t], key=lambda r, m=mean[t]: abs((r.grade.reward if r.grade else 0.0) - m))  # type: ignore[misc]
                for g, mean in zip(graded, means, strict=True)
            ],
        )
        for t in chosen[: _NUM_GAINS + _NUM_LOSSES]
    ]
