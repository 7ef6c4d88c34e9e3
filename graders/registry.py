"""From settings to graders. Each grader's libraries are imported only where it is used."""

from __future__ import annotations

from collections.abc import Iterable

from envs.base import Checks
from envs.errors import told_of
from envs.types import Task
from graders.config import (
    CustomConfig,
    EndpointConfig,
    ExactConfig,
    GraderConfig,
    LabelModelConfig,
    MultiConfig,
    NumericConfig,
    PenaltiesConfig,
    PythonConfig,
    ScoreModelConfig,
    SingleGraderConfig,
    StringCheckConfig,
    TextSimilarityConfig,
    check_penalties,
    has_continuous_scores,
    pass_threshold,
)
from graders.judges.base import Judge, JudgeReply, JudgeRequest
from graders.penalties import PenalisedGrader
from graders.rules.exact import ExactGrader
from graders.rules.numeric import NumericGrader
from graders.types import Grader


def build_grader(
    config: GraderConfig, penalties: PenaltiesConfig, *, judge: Judge | None = None, tasks: Iterable[Task] = ()
) -> PenalisedGrader:
    """The grader that the config describes, its penalties taken off; `judge` answers `score_model` and `label_model`.

    Raises `UserError` for penalties that could lift a wrong answer over a right one, for a template, formula, source or
    target that can't be read, and for the first of `tasks` that this grader can't grade.
    """
    check_penalties(config, penalties)
    grader = build_scorer(config, judge=judge)
    if isinstance(grader, Checks):
        for task in tasks:
            with told_of(task.where):
                grader.check(task)
    threshold = pass_threshold(config)
    return PenalisedGrader(
        grader, penalties, threshold=threshold, floor=threshold if has_continuous_scores(config) else None
    )


def check_grader(config: GraderConfig | SingleGraderConfig) -> None:
    """Raise `UserError` for a template, formula or source that can't be read. Asks nobody and loads nothing.

    What needs a library, this machine or the user's own code is found by `build_grader`.
    """
    match config:
        case MultiConfig():
            from graders.multi import formula_of

            formula_of(config)
            for name, inner in config.graders.items():
                with told_of(f"graders.{name}"):
                    check_grader(inner)
        case PythonConfig():
            from graders.user.python import check_source

            check_source(config.source)
        case TextSimilarityConfig():
            from graders.hosted.templates import Template

            for key in ("input", "reference"):
                Template(getattr(config, key), where=f"grader {config.name!r}: {key}")
        case StringCheckConfig() | ScoreModelConfig() | LabelModelConfig():
            build_scorer(config, judge=NobodyAsked())


class NobodyAsked:
    """Stands in for the judge where graders are only checked: it needs no key and no server."""

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        raise AssertionError("a grader that is only checked asks no judge")

    async def aclose(self) -> None: ...


def build_scorer(config: GraderConfig | SingleGraderConfig, *, judge: Judge | None = None) -> Grader:
    """The bare grader, without penalties."""
    match config:
        case ExactConfig():
            return ExactGrader(config)
        case NumericConfig():
            return NumericGrader(config)
        case StringCheckConfig():
            from graders.rules.string_check import StringCheckGrader

            return StringCheckGrader(config)
        case TextSimilarityConfig():
            from graders.rules.similarity import TextSimilarityGrader

            return TextSimilarityGrader(config)
        case ScoreModelConfig():
            from graders.judges.model_graders import ScoreModelGrader

            return ScoreModelGrader(config, _needed(judge))
        case LabelModelConfig():
            from graders.judges.model_graders import LabelModelGrader

            return LabelModelGrader(config, _needed(judge))
        case PythonConfig():
            from graders.user.python import PythonGrader

            return PythonGrader(config)
        case EndpointConfig():
            from graders.user.endpoint import EndpointGrader

            return EndpointGrader(config)
        case CustomConfig():
            from graders.user.custom import load_custom_grader

            return load_custom_grader(config)
        case MultiConfig():
            from graders.multi import MultiGrader

            graders: dict[str, Grader] = {}
            for name, inner in config.graders.items():
                with told_of(f"graders.{name}"):
                    graders[name] = build_scorer(inner, judge=judge)
            return MultiGrader(config, graders)


def _needed(judge: Judge | None) -> Judge:
    assert judge is not None, "score_model and label_model need a judge"
    return judge
