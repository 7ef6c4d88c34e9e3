"""string_check: four comparisons, and what is scored where a variable is missing."""

from __future__ import annotations

from typing import Any

import pytest

from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.rules.string_check import StringCheckConfig, StringCheckGrader
from graders.types import Grade, GraderErrorKind


def task(**item: Any) -> Task:
    return Task(task_id="row-1", messages=(Message(role="user", content="?"),), item=item)


def episode(answer: str, stop_reason: StopReason = StopReason.ANSWERED) -> Episode:
    turns = (Turn(message=Message(role="assistant", content=answer)),)
    return Episode(rollout_id="r", task_id="row-1", messages=(), turns=turns, stop_reason=stop_reason)


def make(
    operation: str, text: str = "{{ sample.output_text }}", reference: str = "{{ item.gold }}"
) -> StringCheckGrader:
    config = {"type": "string_check", "name": "check", "operation": operation, "input": text, "reference": reference}
    return StringCheckGrader(StringCheckConfig.model_validate(config))


@pytest.mark.parametrize(
    ("answer", "gold", "holds"),
    [
        ("Paris", "Paris", "eq like ilike"),
        ("paris", "Paris", "ne ilike"),
        ("It is Paris.", "Paris", "ne like ilike"),
        ("IT IS PARIS.", "Paris", "ne ilike"),
        ("Par", "Paris", "ne"),
        ("Pa ris", "Paris", "ne"),
        ("Straße", "STRASSE", "ne ilike"),
        ("14", 14, "eq like ilike"),
        ("", "Paris", "ne"),
        ("Paris", "", "ne like ilike"),
        ("", "", "eq like ilike"),
    ],
)
async def test_each_operation_holds_where_it_should(answer, gold, holds):
    for operation in ("eq", "ne", "like", "ilike"):
        grade = await make(operation).grade(task(gold=gold), episode(answer))
        expected = float(operation in holds.split())
        assert (grade.reward, grade.parts, grade.errors) == (expected, {"check": expected}, ()), operation


async def graded(text: str, answer: str, operation: str = "ne", **item: Any) -> Grade:
    return await make(operation, text, "x").grade(task(**item), episode(answer))


async def test_a_missing_variable_scores_0_under_every_operation():
    for operation in ("eq", "ne", "like", "ilike"):
        grade = await graded("{{ sample.output_tools[0].function.name }}", "14", operation)
        assert (grade.reward, grade.errors) == (0.0, (GraderErrorKind.INVALID_VARIABLE,))
        assert grade.explanation == "sample.output_tools[0].function.name is missing"


async def test_an_answer_that_is_no_json_is_told_from_one_without_the_key():
    text = "{{ sample.output_json.value }}"
    assert (await graded(text, "14")).errors == (GraderErrorKind.SAMPLE_PARSE,)
    assert (await graded(text, '{"other": 1}')).errors == (GraderErrorKind.INVALID_VARIABLE,)
    assert (await graded(text, '{"value": 14}')).reward == 1.0


async def test_an_episode_without_an_answer_has_an_empty_text():
    grade = await make("eq").grade(task(gold="Paris"), episode("Paris", StopReason.MAX_TURNS))
    assert grade.reward == 0.0
    with pytest.raises(ValueError, match="world fault"):
        await make("eq").grade(task(gold="Paris"), episode("Paris", StopReason.WORLD_FAULT))


async def test_the_explanation_shows_both_texts_cut():
    grade = await make("like").grade(task(gold="Paris"), episode("x" * 500))
    assert grade.explanation == f"not so: {'x' * 80 + '…'!r} contains 'Paris'"


def test_templates_are_read_and_tasks_checked_before_anything_runs():
    with pytest.raises(UserError, match=r"^grader 'check': reference: can't read the variable '1 \+ 1'"):
        make("eq", reference="{{ 1 + 1 }}")
    make("eq").check(task(gold="Paris"))
    with pytest.raises(UserError, match=r"^grader 'check': reference: task row-1 has no \{\{ item\.gold \}\}"):
        make("eq").check(task(answer="Paris"))
