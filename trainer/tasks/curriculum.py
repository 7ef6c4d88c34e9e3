"""Which tasks a step visits: all in turn, or by measured difficulty (`trainer.tasks.difficulty`)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence

from envs.errors import UserError
from envs.types import Task
from trainer import processes
from trainer.config import CurriculumConfig, RunConfig
from trainer.runs.folder import RunFolder
from trainer.tasks.difficulty import Rule, Visit, Visits, choose_tasks, preflight_visits, tied_share, with_visits
from trainer.tasks.load import fresh_tasks, tasks_of_step, train_requests
from trainer.types import Rollout, RolloutRequest


def load_preflight(config: CurriculumConfig | None) -> dict[str, list[Visit]]:
    """What a preflight has shown of the tasks; nothing without one. Raises `UserError` that names the file."""
    if config is None or config.preflight is None:
        return {}
    where = f"curriculum.preflight {config.preflight}"
    try:
        report = json.loads(config.preflight.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{where}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON: {e}") from e
    return preflight_visits(report.get("tasks") if isinstance(report, dict) else None, where=where)


class Curriculum:
    """Chooses each step's tasks. Its memory is the run folder's `visits.jsonl`, so that resuming is exact.

    A step that may be asked for `overlap.max_staleness` steps ahead is chosen by what had been learned by then, however
    late it is asked for: else a run that goes on would choose otherwise.
    """

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], run: RunFolder, preflight: Mapping[str, Sequence[Visit]]
    ) -> None:
        self._config = config
        self._tasks = tasks
        self._run = run
        self._rule: Rule | None = None
        self._visits: Visits = preflight
        self._earlier: Visits = preflight
        """What the step that was chosen last may know of."""
        self._not_yet: deque[tuple[int, Mapping[str, Sequence[float | None]]]] = deque()
        """The others, by step."""
        if config.curriculum is not None:
            self._rule = Rule(floor=config.curriculum.floor, min_rollouts=config.curriculum.min_rollouts)
            for step, rewards in processes.from_main(run.visits):
                self._take_in(step, rewards)

    def requests(self, step: int) -> list[RolloutRequest]:
        """What a training step asks for, group after group; steps are asked for in their order."""
        return train_requests(self._config, self.choose(step), run_id=self._run.run_id, step=step)

    def choose(self, step: int) -> list[Task]:
        """The tasks of a training step, the first of which is 1."""
        num_tasks, seed = self._config.rollout.tasks_per_step, self._config.seed
        if self._rule is None:
            return tasks_of_step(
                self._tasks,
                seed=seed,
                step=step - 1,
                num_tasks=num_tasks,
                stratify_by=self._config.rollout.stratify_by,
            )
        by_id = {task.task_id: task for task in self._tasks}
        while self._not_yet and self._not_yet[0][0] < step - self._config.overlap.max_staleness:
            learned, rewards = self._not_yet.popleft()
            self._earlier = with_visits(self._earlier, step=learned, rewards=rewards)
        chosen = choose_tasks(list(by_id), self._earlier, seed=seed, step=step, num_tasks=num_tasks, rule=self._rule)
        return [by_id[task_id] for task_id in chosen]

    def fresh_requests(self, step: int, *, first: int, count: int) -> list[RolloutRequest]:
        """Those of `count` groups more for the step that was chosen last, which has asked for `first` of them so far.

        A pure function of these, the seed and what earlier steps have shown: by difficulty the next most overdue; else
        the step's others by a hash, whatever `stratify_by` says.
        """
        tasks = self._fresh(step, first, count)
        return train_requests(self._config, tasks, run_id=self._run.run_id, step=step, first_group=first)

    def _fresh(self, step: int, first: int, count: int) -> list[Task]:
        seed = self._config.seed
        if self._rule is None:
            own = self.choose(step)
            return fresh_tasks(self._tasks, own, seed=seed, step=step, count=first - len(own) + count)[-count:]
        assert self._config.overlap.max_staleness == 0, "what the step was chosen by is still what is known"
        by_id = {task.task_id: task for task in self._tasks}
        num_tasks = first + count
        chosen = choose_tasks(list(by_id), self._earlier, seed=seed, step=step, num_tasks=num_tasks, rule=self._rule)
        return [by_id[task_id] for task_id in chosen[first:]]

    def learn(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Take in what the step's rollouts have shown; figures for the metrics."""
        if self._rule is None:
            return {}
        rewards: dict[str, list[float | None]] = {}
        for rollout in rollouts:
            rewards.setdefault(rollout.task.task_id, []).append(rollout.reward)
        self._take_in(step, rewards)
        self._run.note_visits(step, rewards)
        ids = [task.task_id for task in self._tasks]
        return {"curriculum/tied_share": tied_share(ids, self._visits, self._rule)}

    def _take_in(self, step: int, rewards: Mapping[str, Sequence[float | None]]) -> None:
        self._visits = with_visits(self._visits, step=step, rewards=rewards)
        self._not_yet.append((step, rewards))
