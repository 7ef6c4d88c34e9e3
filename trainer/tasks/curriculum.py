"""Which tasks a step visits: all in turn, or by measured difficulty (`trainer.tasks.difficulty`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from envs.errors import UserError
from envs.types import Task
from trainer.config import CurriculumConfig, RunConfig
from trainer.runs.folder import RunFolder
from trainer.tasks.difficulty import Rule, Visit, Visits, choose_tasks, preflight_visits, tied_share, with_visits
from trainer.tasks.load import tasks_of_step
from trainer.types import Rollout


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
    """Chooses each step's tasks. Its memory is the run folder's `visits.jsonl`, so that resuming is exact."""

    def __init__(
        self, config: RunConfig, tasks: Sequence[Task], run: RunFolder, preflight: Mapping[str, Sequence[Visit]]
    ) -> None:
        self._config = config
        self._tasks = tasks
        self._run = run
        self._rule: Rule | None = None
        self._visits: Visits = preflight
        if config.curriculum is not None:
            self._rule = Rule(floor=config.curriculum.floor, min_rollouts=config.curriculum.min_rollouts)
            for step, rewards in run.visits():
                self._visits = with_visits(self._visits, step=step, rewards=rewards)

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
        chosen = choose_tasks(list(by_id), self._visits, seed=seed, step=step, num_tasks=num_tasks, rule=self._rule)
        return [by_id[task_id] for task_id in chosen]

    def learn(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Take in what the step's rollouts have shown; figures for the metrics."""
        if self._rule is None:
            return {}
        rewards: dict[str, list[float | None]] = {}
        for rollout in rollouts:
            rewards.setdefault(rollout.task.task_id, []).append(rollout.reward)
        self._visits = with_visits(self._visits, step=step, rewards=rewards)
        self._run.note_visits(step, rewards)
        ids = [task.task_id for task in self._tasks]
        return {"curriculum/tied_share": tied_share(ids, self._visits, self._rule)}
