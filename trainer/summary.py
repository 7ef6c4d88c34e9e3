"""Figures of a set of rollouts: what a step's metrics, an evaluation and the report show. Pure."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

from graders.types import Grade
from trainer.measures import masked_causes
from trainer.rollout import Rollout
from trainer.samples import Sample

Metrics = dict[str, float]


def summarise(rollouts: Sequence[Rollout]) -> Metrics:
    """Means over the graded rollouts, and counts of what was lost: all, and where there are any by kind (`Masked`).

    `unclosed_environments` are those whose closing failed or took too long, where there are any.

    Tokens are generated tokens: `completion_tokens` in all, of which `reasoning_tokens` by the reasoning parser and
    `answer_tokens` the others (tool calls and answers). Latencies are in seconds. `tool_calls` counts malformed calls
    too. `answered` is the share of episodes that came to their own end: an answer, calls that are the answer, a game
    that is over; `user_turns` counts the replies of a simulated user. `correct` is the share that passed, where the
    grader says what passes. Keys `stop/…` are shares; `tool/NAME/calls` and `errors` are per rollout, `latency_s` and
    `tokens` per call; `part/…` and `score/…` are reward parts and the scores of a `multi`'s graders; `grader_error/…`
    and `judge_tokens/…` are per rollout; `watch/divergence` is how much more the grader gives than the one that is
    never trained on. `special_tokens_in_tools` and `special_tokens_spelled` are those of the chat format that tools'
    outputs and the model itself spell out (`trainer.special_tokens`), per rollout.
    """
    graded = [r for r in rollouts if r.grade is not None]
    metrics: Metrics = {"rollouts": len(rollouts), "masked_rollouts": len(rollouts) - len(graded)}
    metrics |= {f"masked_by/{kind}": causes.total() for kind, causes in masked_causes(rollouts).items()}
    metrics["retried_rollouts"] = sum(r.num_attempts > 1 for r in rollouts)
    if unclosed := sum(len(r.unclosed) for r in rollouts):
        metrics["unclosed_environments"] = unclosed
    if not graded:
        return metrics
    episodes = [r.episode for r in graded]
    metrics |= {
        "reward": fmean(r.grade.reward for r in graded if r.grade is not None),
        "answered": fmean(e.stop_reason.is_complete for e in episodes),
        "turns": fmean(len(e.turns) for e in episodes),
        "tool_calls": fmean(e.num_tool_calls for e in episodes),
        "invalid_calls": fmean(e.num_invalid_calls for e in episodes),
        "malformed_calls": fmean(sum(t.malformed for t in e.turns) for e in episodes),
        "completion_tokens": fmean(e.num_tokens for e in episodes),
        "reasoning_tokens": fmean(e.num_reasoning_tokens for e in episodes),
        "answer_tokens": fmean(e.num_tokens - e.num_reasoning_tokens for e in episodes),
        "episode_tokens": fmean(sum(len(ledger) for ledger in r.ledgers) for r in graded),
        "episode_latency_s": fmean(e.latency_s for e in episodes),
        "forks": fmean(len(r.ledgers) - 1 for r in graded),
        "drifted_turns": fmean(r.num_drifted_turns for r in graded),
        "special_tokens_in_tools": fmean(
            sum(x.num_special_tokens for t in e.turns for x in t.results) for e in episodes
        ),
        "special_tokens_spelled": fmean(sum(t.num_spelled_tokens for t in e.turns) for e in episodes),
    }
    if replies := sum(t.reply is not None for e in episodes for t in e.turns):
        metrics["user_turns"] = replies / len(episodes)
    passed = [r.grade.passed for r in graded if r.grade is not None and r.grade.passed is not None]
    if passed:
        metrics["correct"] = fmean(passed)
    metrics |= {f"stop/{reason}": n / len(graded) for reason, n in Counter(e.stop_reason for e in episodes).items()}
    metrics |= _by_tool(graded)
    return metrics | _by_grader(graded)


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
    watched = [(_score(r.grade), _score(r.watch)) for r in graded if r.grade is not None and r.watch is not None]
    if watched:
        metrics["watch/score"] = fmean(watch for _, watch in watched)
        metrics["watch/divergence"] = fmean(score - watch for score, watch in watched)
    return metrics


def _score(grade: Grade) -> float:
    """The grader's own part: the first one; the others are penalties."""
    return next(iter(grade.parts.values()), grade.reward)


def _by_tool(graded: Sequence[Rollout]) -> Metrics:
    results = [result for r in graded for turn in r.episode.turns for result in turn.results]
    metrics: Metrics = {}
    # A name that the model made up is no tool of ours; it is counted with the invalid calls.
    for name in sorted({r.name for r in results if r.error is None}):
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


class Stopwatch:
    """Splits a step's wall-clock time into laps."""

    def __init__(self) -> None:
        self._start = self._lap_start = time.perf_counter()
        self._laps_s: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to `name`."""
        now = time.perf_counter()
        self._laps_s[name] = now - self._lap_start
        self._lap_start = now

    def metrics(self, rollouts: Sequence[Rollout], samples: Sequence[Sample], *, has_kl: bool) -> Metrics:
        """`time/…_s` of each lap and of the step, the share outside rollouts and training, tokens a second.

        Trained tokens are those of rows with an advantage: without a KL term the others cost the trainer nothing.
        """
        num_sampled_tokens = sum(r.episode.num_tokens for r in rollouts)
        num_trained_tokens = sum(len(s.token_ids) for s in samples if s.advantage or has_kl)
        step_s = time.perf_counter() - self._start
        work_s = self._laps_s["rollouts"] + self._laps_s["training"]
        return {f"time/{name}_s": seconds for name, seconds in self._laps_s.items()} | {
            "time/step_s": step_s,
            "time/other_share": 1 - work_s / step_s,
            "throughput/sampled_tokens_per_s": num_sampled_tokens / self._laps_s["rollouts"],
            "throughput/trained_tokens_per_s": num_trained_tokens / self._laps_s["training"],
        }
