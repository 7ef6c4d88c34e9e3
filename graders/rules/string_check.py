"""The hosted service's `string_check`: 1 where a comparison of two texts holds, 0 otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator

from envs.text import quoted
from envs.types import Episode, Task
from graders.hosted.templates import MissingVariable, Template
from graders.hosted.view import hosted_sample, item_of
from graders.settings import GraderSettings, Name
from graders.types import Grade

_OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
_WORDS = {"eq": "equals", "ne": "differs from", "like": "contains", "ilike": "contains, whatever the case,"}
_MAX_SHOWN = 80


class StringCheckConfig(GraderSettings):
    """1 where the comparison of two texts holds, 0 otherwise."""

    type: Literal["string_check"]
    name: Name = "string_check"
    input: str = Field(description="Template of the text that is checked.")
    reference: str = Field(description="Template of the text that it is compared with.")
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        description="eq, ne (or neq): equal or not; like: input contains reference; ilike: so in any capitals."
    )

    @field_validator("operation", mode="before")
    @classmethod
    def _by_either_name(cls, operation: Any) -> Any:
        return "ne" if operation == "neq" else operation

    def check_texts(self) -> None:
        StringCheckGrader(self)


class StringCheckGrader:
    """eq, ne: equal or not, to the letter; like: the input contains the reference; ilike: the same, whatever the case.

    An episode without an answer has an empty `sample.output_text`, which differs from every reference: `ne` gives it 1,
    as the hosted service does. A variable that the sample lacks scores 0 under every operation.
    """

    def __init__(self, config: StringCheckConfig) -> None:
        self._config = config
        self._input = Template(config.input, where=f"grader {config.name!r}: input")
        self._reference = Template(config.reference, where=f"grader {config.name!r}: reference")

    async def grade(self, task: Task, episode: Episode) -> Grade:
        item, sample = item_of(task), hosted_sample(episode)
        try:
            text, reference = self._input.render(item, sample), self._reference.render(item, sample)
        except MissingVariable as e:
            return Grade(reward=0.0, parts={self._config.name: 0.0}, explanation=str(e), errors=(e.kind,))
        holds = _OPERATIONS[self._config.operation](text, reference)
        words = f"{quoted(text, _MAX_SHOWN)} {_WORDS[self._config.operation]} {quoted(reference, _MAX_SHOWN)}"
        why = words if holds else f"not so: {words}"
        return Grade(reward=float(holds), parts={self._config.name: float(holds)}, explanation=why)

    def check(self, task: Task) -> None:
        self._input.check(task)
        self._reference.check(task)
