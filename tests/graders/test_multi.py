"""multi: a formula over several graders; and a table of cases of every deterministic grader type, from hosted JSON."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import TypeAdapter

from envs.errors import UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolResult, Turn
from graders.build import build_scorer
from graders.config import GraderConfig, MultiConfig
from graders.judges.base import JudgeReply, JudgeRequest
from graders.multi import MultiGrader
from graders.types import Grade, Grader, GraderErrorKind

CONFIG: TypeAdapter[GraderConfig] = TypeAdapter(GraderConfig)
ANSWER = "{{ sample.output_text }}"
TOOL = "{{ sample.output_tools[0].function.name }}"


class NoJudge:
    async def ask(self, request: JudgeRequest) -> JudgeReply:
        raise AssertionError("no deterministic grader asks a judge")

    async def aclose(self) -> None: ...


def task(**item: Any) -> Task:
    return Task(task_id="row-1", messages=(Message(role="user", content="?"),), item=item)


def episode(answer: str) -> Episode:
    """One call of `search`, then the answer."""
    call = ToolCall(call_id="c0", name="search", arguments='{"q": "revenue"}')
    turns = (
        Turn(
            message=Message(role="assistant", tool_calls=(call,)),
            results=(ToolResult(call_id="c0", name="search", output="revenue: 14.4"),),
        ),
        Turn(message=Message(role="assistant", content=answer)),
    )
    return Episode(rollout_id="r", task_id="row-1", messages=(), turns=turns, stop_reason=StopReason.ANSWERED)


def check(operation: str, text: str = ANSWER, reference: str = "{{ item.gold }}", **more: Any) -> dict[str, Any]:
    return {"type": "string_check", "operation": operation, "input": text, "reference": reference, **more}


def alike(metric: str, text: str = ANSWER) -> dict[str, Any]:
    return {"type": "text_similarity", "evaluation_metric": metric, "input": text, "reference": "{{ item.gold }}"}


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": graders, "calculate_output": formula}


JSON_ANSWER = '{"name": "Ann", "age": 41}'
TABLE = [
    # (grader, item, answer, reward)
    ({"type": "exact"}, {"answer": "14.4 million"}, " 14.4  Million", 1),
    ({"type": "exact", "ignore_case": False}, {"answer": "14.4 million"}, "14.4 Million", 0),
    ({"type": "numeric"}, {"answer": "412.5 million"}, "412,500,000", 1),
    ({"type": "numeric"}, {"answer": "412.5 million"}, "412.6 million", 0.5),
    ({"type": "numeric"}, {"answer": "412.5 million"}, "413.5 million", 0),
    (check("eq"), {"gold": "Paris"}, "Paris", 1),
    (check("ne"), {"gold": "Paris"}, "Paris", 0),
    (check("like"), {"gold": "Paris"}, "in Paris", 1),
    (check("ilike"), {"gold": "PARIS"}, "in Paris", 1),
    (check("eq", TOOL, "search"), {}, "any", 1),
    (check("eq", "{{ sample.tool_calls[0].output }}", "revenue: {{ item.n }}"), {"n": 14.4}, "any", 1),
    (check("eq", "{{ sample.output_json.age }}", "{{ item.who['age'] }}"), {"who": {"age": 41}}, JSON_ANSWER, 1),
    (check("eq", "{{ sample.num_turns }}", "2"), {}, "any", 1),
    (alike("fuzzy_match"), {"gold": "sitting"}, "kitten", 8 / 13),
    (alike("bleu"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", (1 / 12) ** 0.25),
    (alike("gleu"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 11 / 18),
    (alike("meteor"), {"gold": "the cat"}, "the cats", 1 - 0.5 / 8),
    (alike("rouge_1"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 5 / 6),
    (alike("rouge_2"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 3 / 5),
    (alike("rouge_3"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 2 / 4),
    (alike("rouge_4"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 1 / 3),
    (alike("rouge_5"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 0),
    (alike("rouge_l"), {"gold": "the cat sat on a mat"}, "the cat sat on the mat", 5 / 6),
    (multi("(a + b) / 2", a=check("eq"), b=check("ilike")), {"gold": "paris"}, "Paris", 0.5),
    (multi("max(0, a - 0.5 * b)", a=check("eq"), b=check("ne", TOOL, "cat")), {"gold": "x"}, "x", 0.5),
    (multi("a ^ 2", a=alike("fuzzy_match")), {"gold": "sitting"}, "kitten", (8 / 13) ** 2),
    (multi("1 - a", a={"type": "numeric"}), {"answer": "7"}, "8", 1),
    (multi("floor(a) + log(exp(b))", a=alike("gleu"), b=check("ne")), {"gold": "x y"}, "x z", 1),
]


@pytest.mark.parametrize(("grader", "item", "answer", "reward"), TABLE)
async def test_every_deterministic_grader_has_the_value_of_the_table(grader, item, answer, reward):
    scorer = build_scorer(
        CONFIG.validate_python({"name": "g"} | grader if "input" in grader else grader), judge=NoJudge()
    )
    grade = await scorer.grade(task(**item), episode(answer))
    assert grade.reward == pytest.approx(reward, abs=1e-9)
    assert sum(grade.parts.values()) == grade.reward
    assert grade.errors == ()


class Fixed:
    """Gives the same grade to every episode, after a while; or raises. Says how it ended."""

    def __init__(self, grade: Grade | Exception, delay_s: float = 0.0) -> None:
        self.ended = ""
        self.checked: list[str] = []
        self._grade = grade
        self._delay_s = delay_s

    async def grade(self, task: Task, episode: Episode) -> Grade:
        try:
            await asyncio.sleep(self._delay_s)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "graded"
        if isinstance(self._grade, Exception):
            raise self._grade
        return self._grade

    def check(self, task: Task) -> None:
        self.checked.append(task.task_id)


class Closing(Fixed):
    """One that has something to close, and may fail to."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__(Grade(reward=1.0))
        self.num_closed = 0
        self._fault = fault

    async def aclose(self) -> None:
        self.num_closed += 1
        if self._fault:
            raise self._fault


def make(formula: str, invalid_grade: float = 0.0, **graders: Grader) -> MultiGrader:
    by_name = {name: check("eq", name=name) for name in graders}
    config = {"type": "multi", "name": "all", "calculate_output": formula, "invalid_grade": invalid_grade}
    return MultiGrader(MultiConfig.model_validate(config | {"graders": by_name}), graders)


async def test_the_grade_of_a_multi_carries_all_that_its_graders_said():
    one = Grade(
        reward=0.25,
        explanation="near",
        errors=(GraderErrorKind.SAMPLE_PARSE, GraderErrorKind.MODEL_GRADER_PARSE),
        judge_tokens={"m": 10, "n": 1},
    )
    other = Grade(reward=1.0, explanation="right", errors=(GraderErrorKind.SAMPLE_PARSE,), judge_tokens={"m": 5})
    grade = await make("a + 2 * b", a=Fixed(one), b=Fixed(other)).grade(task(), episode("x"))
    assert grade == Grade(
        reward=2.25,
        parts={"all": 2.25},
        explanation="a 0.25 (near); b 1 (right); a + 2 * b = 2.25",
        scores={"a": 0.25, "b": 1.0},
        errors=(GraderErrorKind.SAMPLE_PARSE, GraderErrorKind.MODEL_GRADER_PARSE),
        judge_tokens={"m": 15, "n": 1},
    )


async def test_a_formula_without_a_value_gives_the_invalid_grade():
    grader = make("a / b", invalid_grade=-0.5, a=Fixed(Grade(reward=1.0)), b=Fixed(Grade(reward=0.0)))
    grade = await grader.grade(task(), episode("x"))
    assert (grade.reward, grade.parts) == (-0.5, {"all": -0.5})
    assert grade.errors == (GraderErrorKind.FORMULA_PARSE,)
    assert grade.explanation.endswith("; a / b has no value (division by zero: 1 / 0): -0.5")
    assert grade.scores == {"a": 1.0, "b": 0.0}


async def test_graders_of_a_multi_run_at_once():
    slow = {name: Fixed(Grade(reward=1.0), delay_s=0.5) for name in "abcdef"}
    start = asyncio.get_running_loop().time()
    assert (await make("a + b + c + d + e + f", **slow).grade(task(), episode("x"))).reward == 6
    assert asyncio.get_running_loop().time() - start < 2.0


async def test_a_fault_of_the_world_passes_through_and_cancels_the_others():
    slow, gone = Fixed(Grade(reward=1.0), delay_s=60), Fixed(WorldError("judge gone"), delay_s=0.01)
    with pytest.raises(WorldError, match="judge gone"):
        await make("a + b", a=slow, b=gone).grade(task(), episode("x"))
    assert (slow.ended, gone.ended) == ("cancelled", "graded")


async def test_our_own_fault_goes_before_the_worlds():
    grader = make("a + b", a=Fixed(WorldError("judge gone")), b=Fixed(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        await grader.grade(task(), episode("x"))


async def test_a_cancelled_multi_cancels_its_graders():
    slow = Fixed(Grade(reward=1.0), delay_s=60)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await make("a", a=slow).grade(task(), episode("x"))
    assert slow.ended == "cancelled"


@pytest.mark.parametrize(
    ("formula", "names", "told"),
    [
        ("a", ["a", "b"], "calculate_output does not use 'b'; add it to the formula or remove it from graders"),
        ("1", ["a"], "calculate_output does not use 'a'"),
        ("a + c", ["a"], r"calculate_output: character 5: expected a grader's name \(a\), found 'c'"),
        ("a", ["a", "f1-score"], "the formula can't name 'f1-score'; use letters, digits and _"),
    ],
)
def test_a_formula_that_does_not_fit_the_graders_is_refused(formula, names, told):
    with pytest.raises(UserError, match=told):
        make(formula, **{name: Fixed(Grade(reward=1.0)) for name in names})


def test_every_grader_checks_the_task():
    one, other = Fixed(Grade(reward=1.0)), Fixed(Grade(reward=1.0))
    make("a + b", a=one, b=other).check(task())
    assert one.checked == other.checked == ["row-1"]
    config = CONFIG.validate_python({"name": "g"} | multi("a + b", a=check("eq", name="a"), b={"type": "exact"}))
    with pytest.raises(UserError, match=r"task row-1 has no \{\{ item\.gold \}\}"):
        build_scorer(config, judge=NoJudge()).check(task(answer="x"))  # type: ignore[attr-defined]


async def test_all_that_can_be_closed_are_closed():
    failing, closing = Closing(OSError("stuck")), Closing()
    with pytest.raises(OSError, match="stuck"):
        await make("a + b + c", a=failing, b=closing, c=Fixed(Grade(reward=1.0))).aclose()
    assert (failing.num_closed, closing.num_closed) == (1, 1)
    await make("a + b", a=closing, b=Closing()).aclose()
    assert closing.num_closed == 2
