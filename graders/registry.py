"""The graders, by the `type` that a config names: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from graders.settings import GraderSettings
from graders.types import Grader, GraderErrorKind


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a grader stands."""

    module: str
    """Below `graders`; it holds both."""
    settings: str
    """Their class, a `GraderSettings`."""
    grader: str
    """Called with the settings: a class, or a function; what it needs of libraries is imported then, and not before."""
    judge: bool = False
    """It is called with the run's judge too."""
    alone: bool = True
    """A run may have it for its grader; else it stands inside `multi` only."""
    fault: GraderErrorKind = GraderErrorKind.OTHER
    """What it is called where its server fails for good."""


_JUDGES: dict[str, Any] = {"judge": True, "fault": GraderErrorKind.MODEL_GRADER_SERVER}
GRADERS = {
    "exact": Entry("rules.exact", "ExactConfig", "ExactGrader"),
    "numeric": Entry("rules.numeric", "NumericConfig", "NumericGrader"),
    "string_check": Entry("rules.string_check", "StringCheckConfig", "StringCheckGrader"),
    "text_similarity": Entry("rules.similarity", "TextSimilarityConfig", "TextSimilarityGrader"),
    "score_model": Entry("judges.model_graders", "ScoreModelConfig", "ScoreModelGrader", **_JUDGES),
    "label_model": Entry("judges.model_graders", "LabelModelConfig", "LabelModelGrader", **_JUDGES, alone=False),
    "python": Entry("user.python", "PythonConfig", "PythonGrader", fault=GraderErrorKind.PYTHON_GRADER_SERVER),
    "endpoint": Entry("user.endpoint", "EndpointConfig", "EndpointGrader", fault=GraderErrorKind.UNRESPONSIVE_REWARD),
    "custom": Entry("user.custom", "CustomConfig", "load_custom_grader"),
}


def settings_of(name: str) -> type[GraderSettings]:
    """The class of a grader's settings."""
    entry = GRADERS[name]
    found: type[GraderSettings] = resolve_name(f"graders.{entry.module}:{entry.settings}")
    return found


def grader_of(name: str) -> Callable[..., Grader]:
    """What makes a grader of its settings."""
    entry = GRADERS[name]
    found: Callable[..., Grader] = resolve_name(f"graders.{entry.module}:{entry.grader}")
    return found
