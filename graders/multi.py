"""The hosted service's `multi`: a formula over the scores of several graders."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from envs.arithmetic import Formula, FormulaError
from envs.base import Checks, Closes
from envs.errors import UserError, first_error
from envs.types import Episode, Task
from graders.config import MultiConfig
from graders.types import Grade, Grader, GraderErrorKind, taken_metrics


def formula_of(config: MultiConfig) -> Formula:
    """The formula. Raises `UserError` where it can't be read, and where it does not use each grader by its name."""
    for name in config.graders:
        if not name.isidentifier():
            raise UserError(f"grader {config.name!r}: the formula can't name {name!r}; use letters, digits and _")
    formula = Formula(config.calculate_output, config.graders)
    unused = [name for name in config.graders if name not in formula.names]
    if unused:
        raise UserError(
            f"grader {config.name!r}: calculate_output does not use {', '.join(map(repr, unused))}; add it to the "
            f"formula or remove it from graders"
        )
    return formula


class MultiGrader:
    """Asks all its graders at once. The reward is the formula's value, or `invalid_grade` where it has none.

    Covered: a `WorldError` of one grader cancels the others and passes through; of several errors at once, those that
    are not the world's go first. Not covered: weights that leave [0, 1]; the value is not clamped.
    """

    def __init__(self, config: MultiConfig, graders: Mapping[str, Grader]) -> None:
        self._config = config
        self._graders = dict(graders)
        self._formula = formula_of(config)

    async def grade(self, task: Task, episode: Episode) -> Grade:
        grades = await self._grades(task, episode)
        scores = {name: grade.reward for name, grade in grades.items()}
        errors = dict.fromkeys(kind for grade in grades.values() for kind in grade.errors)
        try:
            reward = self._formula.evaluate(scores)
            value = f"{self._config.calculate_output} = {reward:.6g}"
        except FormulaError as e:
            reward = self._config.invalid_grade
            value = f"{self._config.calculate_output} has no value ({e}): {reward:g}"
            errors[GraderErrorKind.FORMULA_PARSE] = None
        judge_tokens: dict[str, int] = {}
        for grade in grades.values():
            for model, num_tokens in grade.judge_tokens.items():
                judge_tokens[model] = judge_tokens.get(model, 0) + num_tokens
        return Grade(
            reward=reward,
            parts={self._config.name: reward},
            explanation="; ".join([*(f"{n} {g.reward:.6g} ({g.explanation})" for n, g in grades.items()), value]),
            scores=scores,
            errors=tuple(errors),
            judge_tokens=judge_tokens,
        )

    async def _grades(self, task: Task, episode: Episode) -> dict[str, Grade]:
        async with first_error(), asyncio.TaskGroup() as group:
            running = {name: group.create_task(g.grade(task, episode)) for name, g in self._graders.items()}
        return {name: t.result() for name, t in running.items()}

    def check(self, task: Task) -> None:
        for grader in self._graders.values():
            if isinstance(grader, Checks):
                grader.check(task)

    def take_metrics(self) -> dict[str, float]:
        return {name: value for grader in self._graders.values() for name, value in taken_metrics(grader).items()}

    async def aclose(self) -> None:
        """Closes all; where some fail, the others are closed all the same and the first error is raised."""
        closing = [grader.aclose() for grader in self._graders.values() if isinstance(grader, Closes)]
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
