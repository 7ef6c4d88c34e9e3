"""The settings of any grader, told apart by `type`. The hosted service's grader JSON loads unchanged."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from graders.registry import GRADERS, settings_of
from graders.settings import Continuous, GraderSettings, Name

if TYPE_CHECKING:
    SingleGraderConfig = GraderSettings
else:
    SingleGraderConfig = Annotated[
        functools.reduce(operator.or_, map(settings_of, GRADERS)), Field(discriminator="type")
    ]


class MultiConfig(Continuous):
    """A formula over the scores of several graders. They do not nest."""

    type: Literal["multi"]
    name: Name = "multi"
    graders: dict[str, SingleGraderConfig] = Field(
        min_length=1, description="By the name that the formula uses; a list or a single grader goes by its own names."
    )
    calculate_output: str = Field(
        min_length=1, description="The formula: + - * / ^, min max abs floor ceil exp sqrt log."
    )
    invalid_grade: float = Field(default=0.0, description="The score where the formula has no value.")

    @field_validator("graders", mode="before")
    @classmethod
    def _by_name(cls, graders: Any) -> Any:
        if isinstance(graders, dict) and isinstance(graders.get("type"), str):
            graders = [graders]
        if not isinstance(graders, list):
            return graders
        named: dict[str, Any] = {}
        for grader in graders:
            name = grader.get("name", grader.get("type")) if isinstance(grader, dict) else None
            if not isinstance(name, str):
                raise ValueError("every grader of a list needs a name")
            if name in named:
                raise ValueError(f"two graders are named {name!r}")
            named[name] = grader
        return named


GRADER_TYPES = (*(name for name, entry in GRADERS.items() if entry.alone), "multi")
"""Those that a run, or a job, may have for its grader."""
if TYPE_CHECKING:
    GraderConfig = GraderSettings
else:
    _ALONE = (settings_of(name) for name in GRADER_TYPES if name in GRADERS)
    GraderConfig = Annotated[functools.reduce(operator.or_, (*_ALONE, MultiConfig)), Field(discriminator="type")]


def singles(grader: GraderSettings) -> dict[str, GraderSettings]:
    """The grader, or those of a multi, by what stands behind the grader's own key in a config."""
    if isinstance(grader, MultiConfig):
        return {f".graders.{name}": inner for name, inner in grader.graders.items()}
    return {"": grader}
