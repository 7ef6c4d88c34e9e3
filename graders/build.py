"""From settings to graders."""

from __future__ import annotations

from collections.abc import Iterable

from envs.types import Task
from graders.config import ExactConfig, GraderConfig, NumericConfig, PenaltiesConfig, check_penalties
from graders.exact import ExactGrader
from graders.numeric import NumericGrader
from graders.penalties import PenalisedGrader
from graders.types import Grader


def build_grader(config: GraderConfig, penalties: PenaltiesConfig) -> Grader:
    """The grader that the config describes, its penalties taken off.

    Raises `UserError` for penalties that could lift a wrong answer over a right one.
    """
    check_penalties(config, penalties)
    return PenalisedGrader(_scorer(config), penalties)


def check_tasks(config: GraderConfig, tasks: Iterable[Task]) -> None:
    """Raise `UserError` for the first task that this grader can't grade; called before any model is loaded."""
    scorer = _scorer(config)
    for task in tasks:
        scorer.check(task)


def _scorer(config: GraderConfig) -> ExactGrader | NumericGrader:
    match config:
        case ExactConfig():
            return ExactGrader(config)
        case NumericConfig():
            return NumericGrader(config)
