"""Policies side by side on the tasks that they share; one alone is a table of its means. Pure.

Shape suffixes: P policies, T shared tasks.

Every figure of a policy is the mean over the shared tasks of its mean over that task's graded rollouts, so that a task
counts the same however often it was rolled out. The first policy is the baseline; intervals are those of
`trainer.measures.intervals`. Tails (p50, p90, p95, max) are over single rollouts and have no interval.

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
from trainer.measures.catalogue import Measure, Place, measure, shown_in
from trainer.measures.intervals import Floats, Interval, intervals
from trainer.measures.masked import Masked, masked_causes
from trainer.reports.evaluations import Evaluation
from trainer.types import Rollout

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
    means: Sequence[float]
    """Mean reward of each policy."""
    rollouts: Sequence[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the table, the Markdown and the page show."""

    evaluations: Sequence[Evaluation]
    """Their rollouts are those of shared tasks, graded only."""
    num_tasks: int
    num_left_out: int
    """Tasks that not all policies have a graded rollout of."""
    num_masked: Mapping[Masked, Sequence[int]]
    """By policy: rollouts without a grade, for each kind of reason that there is."""
    lines: Sequence[Line]
    tails: Mapping[str, Sequence[Mapping[str, float]]]
    """Key of the measure → by policy: quantile → value."""
    by: str
    kinds: Mapping[str, Sequence[Line]]
    """Kind of question → its lines; empty where the tasks have no such key, or one value only."""
    errors: Mapping[str, Sequence[float]]
    """Errors per rollout by kind → by policy."""
    pairs: Sequence[Pair]

    def line(self, key: str) -> Line | None:
        """None where not every shared task of every policy has the measure."""
        return next((line for line in self.lines if line.measure.key == key), None)


def compare(evaluations: Sequence[Evaluation], *, by: str | None = None, seed: int = 0) -> Comparison:
    """`by` is the key of a task's item that tells kinds of question apart. Raises `UserError` for nothing in common."""
    graded = [e.graded() for e in evaluations]
    shared = [t for t in graded[0] if all(t in other for other in graded[1:])]
    if not shared:
        raise UserError(
            f"{', '.join(e.name for e in evaluations)}: no task has a graded rollout of every policy; "
            "expected evaluations of the same tasks (same task ids)"
        )
    kind_of = {t: _kind(graded[0][t][0], by or DEFAULT_BY) for t in shared}
    if by is not None and not any(kind_of.values()):
        raise UserError(
            f"--by {by}: no task's item has this key; it has {', '.join(graded[0][shared[0]][0].task.item)}"
        )
    kinds = sorted({kind for kind in kind_of.values() if kind})
    mine = [replace(p, rollouts=[r for t in shared for r in g[t]]) for p, g in zip(evaluations, graded, strict=True)]
    return Comparison(
        evaluations=mine,
        num_tasks=len(shared),
        num_left_out=len({t for g in graded for t in g} - set(shared)),
        num_masked=_num_masked(evaluations),
        lines=_lines(graded, shared, seed),
        tails={m.key: [_tail(e.rollouts, m) for e in mine] for m in shown_in(Place.TAILS)},
        by=by or DEFAULT_BY,
        kinds={kind: _lines(graded, [t for t in shared if kind_of[t] == kind], seed) for kind in kinds}
        if len(kinds) > 1
        else {},
        errors=_errors(mine),
        pairs=_pairs(graded, shared),
    )


def _kind(rollout: Rollout, by: str) -> str:
    value = rollout.task.item.get(by)
    return str(value) if isinstance(value, str | int | float | bool) else ""


def _lines(graded: Sequence[Mapping[str, Sequence[Rollout]]], tasks: Sequence[str], seed: int) -> list[Line]:
    """A line for every measure that all tasks of all policies have."""
    lines = []
    for shown in shown_in(Place.TABLE):
        values_PT = _task_means(graded, tasks, shown)
        if values_PT is not None:
            means, differences = intervals(values_PT, seed=seed)
            lines.append(Line(measure=shown, means=means, differences=differences))
    return lines


def _task_means(
    graded: Sequence[Mapping[str, Sequence[Rollout]]], tasks: Sequence[str], shown: Measure
) -> Floats | None:
    values = [[shown.values(by_task[task_id]) for task_id in tasks] for by_task in graded]
    return np.array([[fmean(v) for v in row] for row in values]) if all(v for row in values for v in row) else None


def _tail(rollouts: Sequence[Rollout], shown: Measure) -> dict[str, float]:
    values = shown.values(rollouts)
    return {name: float(np.quantile(values, q)) for name, q in _QUANTILES.items()} if values else {}


def _num_masked(evaluations: Sequence[Evaluation]) -> dict[Masked, list[int]]:
    causes = [masked_causes(e.rollouts) for e in evaluations]
    return {
        kind: [c[kind].total() if kind in c else 0 for c in causes] for kind in Masked if any(kind in c for c in causes)
    }


def errors_of(rollout: Rollout) -> Counter[str]:
    """Tool errors by kind, malformed calls, grader errors by kind, and an end without an answer that is the model's."""
    count = Counter[str]()
    for turn in rollout.episode.turns:
        count["malformed call"] += turn.malformed
        count.update(f"tool: {result.error}" for result in turn.results if result.error is not None)
    count.update(f"grader: {kind}" for kind in (rollout.grade.errors if rollout.grade else ()))
    reason = rollout.episode.stop_reason
    if not (reason.is_complete or reason.is_masked):
        count[f"ended by {reason}"] += 1
    return count


def _errors(evaluations: Sequence[Evaluation]) -> dict[str, list[float]]:
    """`errors_of` per graded rollout."""
    counts = [sum((errors_of(r) for r in evaluation.rollouts), Counter[str]()) for evaluation in evaluations]
    names = sorted({name for count in counts for name in count if count[name]})
    return {n: [c[n] / len(e.rollouts) for c, e in zip(counts, evaluations, strict=True)] for n in names}


def _pairs(graded: Sequence[Mapping[str, Sequence[Rollout]]], tasks: Sequence[str]) -> list[Pair]:
    """The tasks whose mean reward rose most from first to last policy, and those where it fell most.

    Both, or the choice would flatter. Where fewer tasks changed in reward, those whose calls changed most fill up.
    """
    reward, calls = measure("reward"), measure("tool_calls")
    means = {t: [fmean(reward.values(g[t])) for g in graded] for t in tasks}
    change = {t: means[t][-1] - means[t][0] for t in tasks}
    moved = {t: abs(fmean(calls.values(graded[-1][t])) - fmean(calls.values(graded[0][t]))) for t in tasks}
    ranked = sorted(tasks, key=lambda t: -change[t])
    chosen = [t for t in ranked[:_NUM_GAINS] if change[t] > 0]
    chosen += [t for t in ranked[::-1][:_NUM_LOSSES] if change[t] < 0]
    chosen += [t for t in sorted(tasks, key=lambda t: -moved[t]) if t not in chosen and moved[t]]
    return [
        Pair(
            task_id=t,
            means=means[t],
            rollouts=[
                _typical(g[t], mean, change[t] if i else -change[t])
                for i, (g, mean) in enumerate(zip(graded, means[t], strict=True))
            ],
        )
        for t in chosen[: _NUM_GAINS + _NUM_LOSSES]
    ]


def _typical(rollouts: Sequence[Rollout], mean: float, direction: float) -> Rollout:
    """The rollout nearest to the task's mean reward; of two as near, the one in the direction of the change."""

    def distance(rollout: Rollout) -> tuple[float, float]:
        reward = rollout.grade.reward if rollout.grade else mean
        return round(abs(reward - mean), 6), -direction * reward

    return min(rollouts, key=distance)
