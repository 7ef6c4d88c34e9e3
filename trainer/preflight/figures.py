"""What the preflight's rollouts show, as figures. Pure.

Best-of-k of a task is estimated without bias from its n graded rollouts, n ≥ k, by the estimator of Chen et al. 2021
(arXiv:2107.03374). With c rollouts that passed,

    pass@k  = 1 - C(n - c, k) / C(n, k)

and for rewards r_1 ≤ … ≤ r_n, where it is the mean of the best over all subsets of k,

    best@k  = Σ_i C(i - 1, k - 1) · r_i / C(n, k)         worst@k: the same of -r, negated

which is pass@k where rewards are 0 and 1. The plug-in 1 - (1 - c/n)^k draws with replacement and is too low for k > 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from graders.penalties import penalty_in
from graders.types import Grade
from trainer.measures.catalogue import num_tool_errors
from trainer.measures.masked import Masked, masked_causes
from trainer.tasks.difficulty import TaskStats, stats_of
from trainer.types import Rollout

Curve = list[tuple[int, float]]
"""(k, value)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything that the advice, the page and `preflight.json` show. Shares are of graded rollouts unless said."""

    num_rollouts: int
    num_masked: int
    samples_per_task: int
    tasks: Mapping[str, TaskStats]
    """Tasks with at least one graded rollout."""
    mean: float
    """Mean over tasks of the task's mean reward, so that each task counts the same."""
    best: float
    """Mean over tasks of the task's best reward."""
    worst: float
    varied_share: float
    """Share of tasks whose rewards are not all equal: only they teach."""
    varied_by_penalties_only: float
    """Share of those, in which the rewards without the penalties are all equal."""
    correct: float | None
    """Share that passed; None where the grader does not say what passes."""
    never_passed: float | None
    """Share of tasks of which no rollout passed."""
    always_passed: float | None
    curves: Mapping[str, Curve]
    """pass@k (where passes are known), best@k, worst@k, mean."""
    tool_calls: Sequence[int]
    tokens: Sequence[int]
    """Generated tokens of each graded rollout."""
    episode_tokens: Sequence[int]
    """Of the rollout's rows together, prompt and tool outputs included: what training has to read."""
    parsed_calls_share: float
    """Share with at least one tool call that parsed."""
    malformed_share: float
    """Share with at least one malformed call."""
    drifted_share: float
    """Share with at least one turn whose raw text is not what serving would render."""
    calls: int
    stop_shares: Mapping[str, float]
    tool_errors: Mapping[str, float]
    """Per rollout by kind, `malformed` among them."""
    grader_errors: Mapping[str, float]
    """Per rollout by kind."""
    masked_causes: Mapping[Masked, Mapping[str, int]]
    """Why rollouts have no grade: by kind, how often each cause."""
    parts: Mapping[str, float]
    """Mean of each part of the reward: the grader's own first, then the penalties and what tools gave."""

    @property
    def penalty(self) -> float:
        """Mean of all penalties together: 0 or negative."""
        return penalty_in(self.parts)

    @property
    def score(self) -> float:
        """Mean of all that the grader, tools and environment give."""
        return math.fsum(self.parts.values()) - self.penalty

    @property
    def tool_error_share(self) -> float:
        """Errors per tool call, malformed calls counted in both."""
        return math.fsum(self.tool_errors.values()) * (self.num_rollouts - self.num_masked) / max(1, self.calls)


def figures_of(rollouts: Sequence[Rollout], *, samples_per_task: int) -> Figures:
    """What the rollouts show; at least one of them is graded."""
    graded = [r for r in rollouts if r.grade is not None]
    assert graded
    by_task: dict[str, list[Rollout]] = {}
    for rollout in graded:
        by_task.setdefault(rollout.task.task_id, []).append(rollout)
    tasks = {task_id: stats_of([r.reward for r in mine]) for task_id, mine in by_task.items()}
    varied = [task_id for task_id, stats in tasks.items() if not stats.tied]
    same_scores = [t for t in varied if stats_of([_unpenalised(r) for r in by_task[t]]).tied]
    passes = {task_id: [r.grade.passed for r in mine if r.grade] for task_id, mine in by_task.items()}
    known = all(p is not None for mine in passes.values() for p in mine)
    counts = {task_id: (len(mine), sum(map(bool, mine))) for task_id, mine in passes.items()}
    episodes = [r.episode for r in graded]
    return Figures(
        num_rollouts=len(rollouts),
        num_masked=len(rollouts) - len(graded),
        samples_per_task=samples_per_task,
        tasks=tasks,
        mean=fmean(s.mean for s in tasks.values()),
        best=fmean(s.best for s in tasks.values()),
        worst=fmean(s.worst for s in tasks.values()),
        varied_share=len(varied) / len(tasks),
        varied_by_penalties_only=len(same_scores) / max(1, len(varied)),
        correct=fmean(c / n for n, c in counts.values()) if known else None,
        never_passed=fmean(c == 0 for _, c in counts.values()) if known else None,
        always_passed=fmean(c == n for n, c in counts.values()) if known else None,
        curves=_curves(by_task, counts if known else {}, samples_per_task),
        tool_calls=[e.num_tool_calls for e in episodes],
        tokens=[e.num_tokens for e in episodes],
        episode_tokens=[sum(map(len, r.ledgers)) for r in graded],
        parsed_calls_share=fmean(any(t.message.tool_calls for t in e.turns) for e in episodes),
        malformed_share=fmean(any(t.malformed for t in e.turns) for e in episodes),
        drifted_share=fmean(r.num_drifted_turns > 0 for r in graded),
        calls=sum(e.num_tool_calls for e in episodes),
        stop_shares=_per_rollout(Counter(str(e.stop_reason) for e in episodes), len(graded)),
        tool_errors=_per_rollout(_tool_errors(graded), len(graded)),
        grader_errors=_per_rollout(Counter(str(k) for r in graded if r.grade for k in r.grade.errors), len(graded)),
        masked_causes=masked_causes(rollouts),
        parts=_part_means([r.grade for r in graded if r.grade]),
    )


def _unpenalised(rollout: Rollout) -> float | None:
    grade = rollout.grade
    return None if grade is None else grade.reward - penalty_in(grade.parts)


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that of k of the n rollouts at least one of the c that passed is drawn."""
    assert 0 <= c <= n and 1 <= k <= n
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """The mean over all subsets of k rewards of the best one."""
    assert 1 <= k <= len(rewards)
    ranked = sorted(rewards)
    # Ratios of whole numbers: C(n, k) itself overflows a float beyond n = 1,000.
    whole = math.comb(len(ranked), k)
    return math.fsum(math.comb(i, k - 1) / whole * r for i, r in enumerate(ranked) if i >= k - 1)


def worst_at_k(rewards: Sequence[float], k: int) -> float:
    """The mean over all subsets of k rewards of the worst one."""
    return -best_at_k([-r for r in rewards], k)


def _curves(
    by_task: Mapping[str, Sequence[Rollout]], counts: Mapping[str, tuple[int, int]], samples: int
) -> dict[str, Curve]:
    """Each k's mean over the tasks that have at least k graded rollouts."""
    rewards = [[r.grade.reward for r in mine if r.grade] for mine in by_task.values()]

    def curve(value: Callable[[Sequence[float], int], float]) -> Curve:
        points = []
        for k in range(1, samples + 1):
            if values := [value(mine, k) for mine in rewards if len(mine) >= k]:
                points.append((k, fmean(values)))
        return points

    passes = []
    for k in range(1, samples + 1):
        if values := [pass_at_k(n, c, k) for n, c in counts.values() if n >= k]:
            passes.append((k, fmean(values)))
    best, worst = curve(best_at_k), curve(worst_at_k)
    mean = curve(lambda mine, k: fmean(mine))
    return {"pass@k": passes, "best@k reward": best, "mean reward": mean, "worst@k reward": worst}


def _part_means(grades: Sequence[Grade]) -> dict[str, float]:
    names = list(dict.fromkeys(name for g in grades for name in g.parts))
    return {name: math.fsum(g.parts.get(name, 0.0) for g in grades) / len(grades) for name in names}


def _tool_errors(rollouts: Sequence[Rollout]) -> Counter[str]:
    kinds = Counter(
        str(result.error)
        for r in rollouts
        for turn in r.episode.turns
        for result in turn.results
        if result.error is not None
    )
    malformed = sum(turn.malformed for r in rollouts for turn in r.episode.turns)
    assert kinds.total() + malformed == sum(map(num_tool_errors, rollouts))
    return kinds + Counter(malformed=malformed)


def _per_rollout(counts: Mapping[str, int], num_rollouts: int) -> dict[str, float]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: count / num_rollouts for name, count in ranked}
