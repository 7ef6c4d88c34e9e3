"""Measured difficulty: which tasks a step visits, by what their rollouts have shown so far. Pure: no files, no clock.

A group whose rewards are all equal teaches nothing, so a task that is always solved or never solved costs rollouts and
gives no gradient. The rule:

1. A task is judged by its newest visits that together hold at least `min_rollouts` graded rollouts. A visit is the
   group of one step, or the preflight's rollouts. Older visits are forgotten: the policy was another one then.
2. Its weight is 1 where those rewards vary, or where fewer than `min_rollouts` rollouts are known; where they are all
   equal (tied) it is `floor`. Rewards and not passes are compared, because rewards are what advantages are made of.
3. A step visits the tasks that are most overdue: those with the largest weight · (steps since the last visit), where a
   task not yet visited in this run counts as visited just before the first step. Ties go by a hash of seed, step and
   task.

So with equal weights every task is visited once before any is visited twice; a tied task comes back, `floor` times as
often as the others, and at full weight once a visit has shown variance; and the choice depends on its arguments alone,
so that a resumed run that is given the same visits goes on with the same tasks.

Resampling tasks changes which expected reward is maximised: tasks that vary count more. That is meant, and evaluation
is not resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.errors import UserError
from trainer.seeds import hash_of

_ROUNDING = 1e-12
"""By so much, relative to the larger of them and 1, sums of the same parts in another order may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats:
    """The rewards of one task's graded rollouts."""

    n: int
    """How many; masked rollouts don't count. The other figures are 0 where it is 0."""
    mean: float
    best: float
    worst: float
    std: float
    """With Bessel's correction; 0 for fewer than two."""

    @property
    def tied(self) -> bool:
        """All rewards are equal but for rounding: as a group they teach nothing."""
        return _are_equal(self.best, self.worst)

    def to_json(self) -> dict[str, float]:
        return {"n": self.n, "mean": self.mean, "best": self.best, "worst": self.worst, "std": self.std}


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one step, or the preflight, has shown of a task."""

    step: int | None
    """The training step, the first of which is 1; None for the preflight."""
    stats: TaskStats


Visits = Mapping[str, Sequence[Visit]]
"""By task id, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The numbers of the rule above."""

    floor: float = 0.1
    """Weight of a tied task, in (0, 1]."""
    min_rollouts: int = 4
    """So many graded rollouts are needed to call a task tied."""

    def __post_init__(self) -> None:
        assert 0 < self.floor <= 1 and self.min_rollouts >= 2, self


def stats_of(rewards: Sequence[float | None]) -> TaskStats:
    """Of the rewards that are there; None is a masked rollout. What only rounding tells apart is equal."""
    present = [r for r in rewards if r is not None]
    if not present:
        return TaskStats(n=0, mean=0.0, best=0.0, worst=0.0, std=0.0)
    n = len(present)
    best, worst = max(present), min(present)
    if _are_equal(best, worst):
        # A rounded mean of equal rewards would leave a residue.
        return TaskStats(n=n, mean=best, best=best, worst=best, std=0.0)
    mean = math.fsum(present) / n
    variance = math.fsum((r - mean) ** 2 for r in present) / (n - 1)
    return TaskStats(n=n, mean=mean, best=best, worst=worst, std=math.sqrt(variance))


def _are_equal(best: float, worst: float) -> bool:
    return best - worst <= _ROUNDING * max(1.0, abs(best), abs(worst))


def pooled(parts: Sequence[TaskStats]) -> TaskStats:
    """The statistics of all rollouts of the parts together (Chan, Golub, LeVeque 1983)."""
    parts = [p for p in parts if p.n]
    n = sum(p.n for p in parts)
    if not parts:
        return stats_of(())
    best, worst = max(p.best for p in parts), min(p.worst for p in parts)
    if _are_equal(best, worst):
        return TaskStats(n=n, mean=best, best=best, worst=best, std=0.0)
    mean = math.fsum(p.n * p.mean for p in parts) / n
    squares = math.fsum((p.n - 1) * p.std**2 + p.n * (p.mean - mean) ** 2 for p in parts)
    return TaskStats(n=n, mean=mean, best=best, worst=worst, std=math.sqrt(squares / (n - 1)))


def weight(visits: Sequence[Visit], rule: Rule) -> float:
    """1 or `floor`: parts 1 and 2 of the rule."""
    newest: list[TaskStats] = []
    for visit in reversed(visits):
        newest.append(visit.stats)
        if sum(s.n for s in newest) >= rule.min_rollouts:
            return rule.floor if pooled(newest).tied else 1.0
    return 1.0


def choose_tasks(
    task_ids: Sequence[str], visits: Visits, *, seed: int, step: int, num_tasks: int, rule: Rule
) -> list[str]:
    """The tasks of training step `step`, the first of which is 1: part 3 of the rule.

    `visits` holds what earlier steps have shown, and the preflight where there was one; visits of this step or later
    ones are passed over, so that a caller may hand in all it has. No task comes twice in a step, unless there are
    fewer tasks than `num_tasks`: then each comes before any comes again.
    """
    assert task_ids and step >= 1 and num_tasks >= 1

    def priority(task_id: str) -> tuple[float, int]:
        known = [v for v in visits.get(task_id, ()) if v.step is None or v.step < step]
        last = max((v.step for v in known if v.step is not None), default=0)
        return -weight(known, rule) * (step - last), hash_of(seed, step, task_id)

    order = sorted(task_ids, key=priority)
    return [order[i % len(order)] for i in range(num_tasks)]


def with_visits(visits: Visits, *, step: int, rewards: Mapping[str, Sequence[float | None]]) -> dict[str, list[Visit]]:
    """A copy of `visits` with what `step` has shown: the rewards of its groups by task.

    A group of which every rollout was masked is a visit, too: a task whose tool server is down must not come again in
    every step.
    """
    out = {task_id: list(known) for task_id, known in visits.items()}
    for task_id, group in rewards.items():
        out.setdefault(task_id, []).append(Visit(step=step, stats=stats_of(group)))
    return out


def tied_share(task_ids: Sequence[str], visits: Visits, rule: Rule) -> float:
    """The share of the tasks that stand at less than full weight: a metric."""
    return sum(weight(visits.get(t, ()), rule) < 1 for t in task_ids) / len(task_ids)


def preflight_visits(tasks: Any, *, where: str) -> dict[str, list[Visit]]:
    """The visits of `preflight.json`'s key `tasks`. Raises `UserError` that says what was expected `where`."""
    if not isinstance(tasks, dict):
        raise UserError(f"{where}: tasks: expected an object of task id → {{n, mean, best, worst, std}}")
    visits = {}
    for task_id, row in tasks.items():
        values: list[Any] = [row.get(k) for k in ("n", "mean", "best", "worst", "std")] if isinstance(row, dict) else []
        if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise UserError(f"{where}: tasks.{task_id}: expected numbers n, mean, best, worst and std")
        n, mean, best, worst, std = values
        visits[task_id] = [Visit(step=None, stats=TaskStats(n=int(n), mean=mean, best=best, worst=worst, std=std))]
    return visits
