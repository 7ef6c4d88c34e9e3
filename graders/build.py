"""From settings to graders. Each grader's libraries are imported only where it is used."""

from __future__ import annotations

from collections.abc import Iterable

from envs.base import Checks
from envs.errors import told_of
from envs.types import Task
from envs.user_code import looked_at
from graders.config import MultiConfig, singles
from graders.judges.base import Judge
from graders.multi import MultiGrader, formula_of
from graders.penalties import PenalisedGrader, PenaltiesConfig, check_penalties
from graders.registry import GRADERS, grader_of
from graders.settings import ChecksTexts, GraderSettings, has_continuous_scores, pass_threshold
from graders.types import Grader


def build_grader(
    config: GraderSettings, penalties: PenaltiesConfig, *, judge: Judge | None = None, tasks: Iterable[Task] = ()
) -> PenalisedGrader:
    """The grader that the config describes, its penalties taken off; `judge` answers `score_model` and `label_model`.

    Raises `UserError` for penalties that could lift a wrong answer over a right one, for a template, formula, source or
    target that can't be read, and for the first of `tasks` that this grader can't grade.
    """
    check_penalties(config, penalties)
    grader = build_scorer(config, judge=judge)
    if isinstance(grader, Checks):
        for task in tasks:
            with told_of(task.where), looked_at("grader: check()"):
                grader.check(task)
    threshold = pass_threshold(config)
    return PenalisedGrader(
        grader, penalties, threshold=threshold, floor=threshold if has_continuous_scores(config) else None
    )


def check_grader(config: GraderSettings) -> None:
    """Raise `UserError` for a template, formula or source that can't be read. Asks nobody and loads nothing.

    What needs a library, this machine or the user's own code is found by `build_grader`.
    """
    if isinstance(config, MultiConfig):
        formula_of(config)
    for key, single in singles(config).items():
        with told_of(key.removeprefix(".")):
            if isinstance(single, ChecksTexts):
                single.check_texts()


def build_scorer(config: GraderSettings, *, judge: Judge | None = None) -> Grader:
    """The bare grader, without penalties."""
    if isinstance(config, MultiConfig):
        graders: dict[str, Grader] = {}
        for name, inner in config.graders.items():
            with told_of(f"graders.{name}"):
                graders[name] = build_scorer(inner, judge=judge)
        return MultiGrader(config, graders)
    if not GRADERS[config.type].judge:
        return grader_of(config.type)(config)
    assert judge is not None, f"{config.type} needs a judge"
    return grader_of(config.type)(config, judge)
