"""What the settings of every grader say; each grader's own stand beside it."""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

from pydantic import Field

from envs.settings import Settings

Name = Annotated[str, Field(min_length=1, description="Of the grader, in messages and metrics.")]


class GraderSettings(Settings):
    """A grader that gives scores of a few values, such as 0 and 1."""

    type: str

    @property
    def score_gap(self) -> float:
        """The least difference of two scores that differ."""
        return 1.0


class Continuous(GraderSettings):
    """A grader whose scores may lie anywhere."""

    pass_threshold: float | None = Field(
        default=None, description="The score from which an answer counts as right; penalties need it."
    )


@runtime_checkable
class ChecksTexts(Protocol):
    """Settings with a template, a formula or a source."""

    def check_texts(self) -> None:
        """Raise `UserError` for one that can't be read. Asks nobody and loads nothing."""
        ...


def pass_threshold(grader: GraderSettings) -> float | None:
    """The score from which an answer counts as right; None where a grader of continuous scores names none."""
    return grader.pass_threshold if isinstance(grader, Continuous) else 1.0


def has_continuous_scores(grader: GraderSettings) -> bool:
    return isinstance(grader, Continuous)
