"""Figures of a set of rollouts: what a step's metrics, an evaluation and the report show. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from envs.types import StopReason, ToolErrorKind
from trainer.measures.catalogue import CATALOGUE, COUNTS
from trainer.measures.masked import masked_causes
from trainer.types import Metrics, Rollout

_UNREACHED = frozenset({ToolErrorKind.UNKNOWN_TOOL, ToolErrorKind.OVER_BUDGET})
"""Errors of calls that say nothing of whether there is such a tool."""


def summarise(rollouts: Sequence[Rollout]) -> Metrics:
    """The catalogue's counts over all rollouts and its means over the graded ones, under their keys, and by name:

    `masked_by/KIND` (`Masked`) counts what was lost, where there is any. `stop/REASON` are shares. `tool/NAME/calls`
    and `errors` are per rollout, `latency_s` and `tokens` per call. `part/NAME` and `score/NAME` are the reward's parts
    and the scores of a `multi`'s graders; `grader_error/KIND` and `judge_tokens/MODEL` are per rollout, as is
    `grader_latency_s`; `watch/score` is that of the grader that is never trained on, `watch/divergence` how much more
    the other gives.
    """
    metrics: Metrics = {}
    for count in COUNTS:
        if (total := sum(map(count.of, rollouts))) or not count.if_any:
            metrics[count.key] = total
    metrics |= {f"masked_by/{kind}": causes.total() for kind, causes in masked_causes(rollouts).items()}
    graded = [r for r in rollouts if r.grade is not None]
    if not graded:
        return metrics
    for measure in CATALOGUE:
        values = [v for r in graded if (v := measure.of(r)) is not None] if measure.is_logged else []
        if values and (any(values) or not measure.if_any):
            metrics[measure.key] = fmean(values)
    reasons = Counter(r.episode.stop_reason for r in graded)
    metrics |= {f"stop/{reason}": n / len(graded) for reason, n in reasons.items()}
    return metrics | _by_tool(graded) | _by_grader(graded)


def _by_grader(graded: Sequence[Rollout]) -> Metrics:
    """What the grader gave and used: parts, sub-scores, errors by kind, latency, judge tokens; and the watching one."""
    grades = [r.grade for r in graded if r.grade is not None]
    totals: dict[str, float] = defaultdict(float)
    for grade in grades:
        for group, values in (("part", grade.parts), ("score", grade.scores), ("judge_tokens", grade.judge_tokens)):
            for name, value in values.items():
                totals[f"{group}/{name}"] += value
        for kind in grade.errors:
            totals[f"grader_error/{kind}"] += 1
    metrics = {name: total / len(grades) for name, total in totals.items()}
    metrics["grader_latency_s"] = fmean(g.latency_s for g in grades)
    watched = [(r.grade.score, r.watch.score) for r in graded if r.grade is not None and r.watch is not None]
    if watched:
        metrics["watch/score"] = fmean(watch for _, watch in watched)
        metrics["watch/divergence"] = fmean(score - watch for score, watch in watched)
    return metrics


def _by_tool(graded: Sequence[Rollout]) -> Metrics:
    # Of calls that are the answer only those have a result which no tool could have taken.
    episodes = [r.episode for r in graded if r.episode.stop_reason is not StopReason.CALLED]
    results = [result for episode in episodes for turn in episode.turns for result in turn.results]
    metrics: Metrics = {}
    # A name that the model made up is no tool of ours; it is counted with the invalid calls.
    for name in sorted({r.name for r in results if r.error not in _UNREACHED}):
        mine = [r for r in results if r.name == name]
        metrics |= {
            f"tool/{name}/calls": len(mine) / len(graded),
            f"tool/{name}/errors": sum(r.error is not None for r in mine) / len(graded),
            f"tool/{name}/latency_s": fmean(r.latency_s for r in mine),
            f"tool/{name}/tokens": fmean(r.num_tokens for r in mine),
        }
    return metrics


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
