"""What graders read from a task and an episode."""

from __future__ import annotations

from envs.errors import UserError, nearest
from envs.types import Episode, Task


def final_answer(episode: Episode) -> str | None:
    """The final answer's text; None when the episode ended without one.

    Raises `ValueError` for an episode that was lost: it must be masked, not scored.
    """
    if episode.stop_reason.is_masked:
        how = episode.stop_reason.replace("_", " ")
        raise ValueError(f"episode {episode.rollout_id} ended in a {how}; mask it instead of grading it")
    return episode.answer


def gold_text(task: Task, answer_key: str) -> str:
    """The gold answer as text. Raises `UserError` when the task has none under this key."""
    if answer_key not in task.item:
        keys = ", ".join(sorted(task.item)) or "none"
        raise UserError(
            f"task {task.task_id}: no gold answer under answer_key {answer_key!r}; its keys are: {keys}"
            f"{nearest(answer_key, task.item)}"
        )
    gold = task.item[answer_key]
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or not str(gold).strip():
        raise UserError(f"task {task.task_id}: the gold answer under {answer_key!r} must be text or a number: {gold!r}")
    return str(gold)
