"""The graders' judgement, and the law that penalties obey."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.build import build_grader
from graders.config import GraderConfig
from graders.penalties import PenalisedGrader, PenaltiesConfig, PenaltyConfig, check_penalties, penalty
from graders.rules.numbers import find_numbers
from graders.rules.plain_text import plain
from graders.types import Grade, Grader


def task(answer: object = "412.5 million", **item: object) -> Task:
    return Task(task_id="t", messages=(Message(role="user", content="?"),), item={"answer": answer, **item})


def episode(
    answer: str,
    *,
    stop_reason: StopReason = StopReason.ANSWERED,
    tool_calls: int = 0,
    invalid_calls: int = 0,
    reasoning_tokens: int = 0,
) -> Episode:
    """An episode with this many calls in its first turn, the last ones invalid, and this answer."""
    calls = tuple(ToolCall(call_id=f"c{i}", name="cat", arguments="{}") for i in range(tool_calls))
    results = tuple(
        ToolResult(
            call_id=c.call_id,
            name="cat",
            output="",
            error=ToolErrorKind.BAD_ARGUMENTS if i >= tool_calls - invalid_calls else None,
        )
        for i, c in enumerate(calls)
    )
    turns = (
        Turn(message=Message(role="assistant", tool_calls=calls), results=results),
        Turn(message=Message(role="assistant", content=answer), num_reasoning_tokens=reasoning_tokens),
    )
    return Episode(rollout_id="r", task_id="t", messages=(), turns=turns, stop_reason=stop_reason)


CONFIG: TypeAdapter[GraderConfig] = TypeAdapter(GraderConfig)


def make_grader(score: str = "numeric", settings: Mapping[str, Any] | None = None, **penalties: Any) -> Grader:
    config = CONFIG.validate_python({"type": score, **(settings or {})})
    return build_grader(config, PenaltiesConfig.model_validate(penalties))


async def grade(answer: str, gold: object = "412.5 million", score: str = "numeric") -> Grade:
    return await make_grader(score).grade(task(gold), episode(answer))


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("412.5 million", "412.5 million"),
        ("$412.5 million", "412.5 million"),
        ("412.50", "412.5 million"),
        ("412,500,000", "412.5 million"),
        ("$412,500 thousand", "412.5 million"),
        ("0.4125 billion", "412.5 million"),
        ("412.5M", "412.5 million"),
        ("The revenue was **412.5 million** dollars.", "412.5 million"),
        ("In 2015, the revenue was 412.5 million.", "412.5 million"),
        ("412.5 million in 2015", "412.5 million"),
        ("412.5 million (up 3.6% from 2014)", "412.5 million"),
        ("412.5 - 398.1 = 14.4 million", "14.4 million"),
        ("412.5 (in millions)", "412.5 million"),
        ("(14.4) million", "-14.4 million"),
        ("($14.4 million)", "-14.4 million"),
        ("−14.4", "-14.4 million"),
        ("-$14.4 million", "-14.4 million"),
        ("It decreased by 14.4 million", "-14.4 million"),
        ("a decrease of 14.4 million", "14.4 million"),
        ("12.5", "12.5%"),
        ("12.5 per cent", "12.5%"),
        ("12.5 percentage points", "12.5%"),
        ("412.5 million", 412.5),
        ("412.5 million", 412500000),
        ("1,234", 1234),
        ("2015", "2015"),
        ("634 employees", "634"),
        ("0.56 dollars", "$0.56"),
        ("12.5% of the dollars", "12.5%"),
        ("4.125e8", "412.5 million"),
    ],
)
async def test_numeric_gives_full_score_whatever_the_unit_and_format(answer: str, gold: object) -> None:
    result = await grade(answer, gold)
    assert result.reward == 1.0, result.explanation


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("412.6 million", "412.5 million"),
        ("412.1 million", "412.5 million"),
        ("413 million", "412.5 million"),
        ("0.41 billion", "412.5 million"),
        ("3.6%", "3.62%"),
        ("-3.6%", "-3.62%"),
        ("8.3 million", "8325 thousand"),
    ],
)
async def test_numeric_gives_half_for_rounding_and_for_a_thousandth(answer: str, gold: str) -> None:
    assert (await grade(answer, gold)).parts == {"numeric": 0.5}


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("", "412.5 million"),
        ("I do not know.", "412.5 million"),
        ("413.5 million", "412.5 million"),
        ("411 million", "412.5 million"),
        ("412.5 thousand", "412.5 million"),
        ("412.5 billion", "412.5 million"),
        ("-412.5 million", "412.5 million"),
        ("412.5%", "412.5 million"),
        ("12.5 million", "12.5%"),
        ("$12.5", "12.5%"),
        ("12.5 dollars", "12.5%"),
        ("0.56%", "$0.56"),
        ("14.4 million", "-14.4 million"),
        ("fell to 14.4 million", "-14.4 million"),
        ("4%", "3.62%"),
        ("0.0", "0.04"),
        ("412.5 million or 398.1 million", "412.5 million"),
        ("101, 102, 103, 104, 412.5 million", "412.5 million"),
        ("101,102,103,104,412.5", "412.5"),
        ("2014", "634"),
        ("412.5 million was in maple-foods/2015.txt, see 7", "412.5 million"),
    ],
)
async def test_numeric_gives_nothing_for_a_wrong_number_unit_sign_or_a_list_of_guesses(answer: str, gold: str) -> None:
    assert (await grade(answer, gold)).parts == {"numeric": 0.0}


async def test_partial_credit_can_be_turned_off() -> None:
    grader = make_grader("numeric", {"partial_credit": 0})
    assert (await grader.grade(task(), episode("412.6 million"))).reward == 0.0
    assert (await grader.grade(task(), episode("412.5 million"))).reward == 1.0


async def test_the_gold_answer_is_read_from_the_key_that_the_config_names() -> None:
    result = await make_grader("numeric", {"answer_key": "gold"}).grade(task("7", gold="8"), episode("8"))
    assert result.reward == 1.0


async def test_exact_compares_text_without_regard_to_space_and_by_default_to_case() -> None:
    assert (await grade(" maple\n foods ", "Maple Foods", "exact")).reward == 1.0
    assert (await grade("Maple Foods Asia", "Maple Foods", "exact")).reward == 0.0
    strict = make_grader("exact", {"ignore_case": False})
    assert (await strict.grade(task("Maple"), episode("maple"))).reward == 0.0
    assert (await strict.grade(task("Maple"), episode("Maple"))).reward == 1.0


@pytest.mark.parametrize(
    "stop_reason", [s for s in StopReason if s not in (StopReason.ANSWERED, StopReason.CALLED) and not s.is_masked]
)
@pytest.mark.parametrize("score", ["exact", "numeric"])
async def test_an_episode_that_ended_without_an_answer_scores_nothing(score: str, stop_reason: StopReason) -> None:
    result = await make_grader(score).grade(task("7"), episode("7", stop_reason=stop_reason))
    assert result.reward == 0.0
    assert str(stop_reason) in result.explanation


@pytest.mark.parametrize("stop_reason", [s for s in StopReason if s.is_masked])
@pytest.mark.parametrize("score", ["exact", "numeric"])
async def test_an_episode_that_was_broken_off_is_refused(score: str, stop_reason: StopReason) -> None:
    with pytest.raises(ValueError, match="mask it"):
        await make_grader(score).grade(task("7"), episode("7", stop_reason=stop_reason))


@pytest.mark.parametrize(
    ("score", "item", "message"),
    [
        ("numeric", {}, "no gold answer under answer_key 'answer'; its keys are: question"),
        ("exact", {}, "no gold answer"),
        ("exact", {"answer": "  "}, "must be text or a number"),
        ("exact", {"answer": True}, "must be text or a number"),
        ("exact", {"answer": ["7"]}, "must be text or a number"),
        ("numeric", {"answer": "many"}, "exactly one number under 'answer', found 0"),
        ("numeric", {"answer": "5 to 7"}, "found 2"),
    ],
)
def test_a_task_that_cannot_be_graded_is_named_before_the_run(
    score: str, item: dict[str, object], message: str
) -> None:
    bad = Task(task_id="row-9", messages=(), item={"question": "?", **item})
    with pytest.raises(UserError, match=message) as caught:
        build_grader(CONFIG.validate_python({"type": score}), PenaltiesConfig(), tasks=[task("7"), bad])
    assert "row-9" in str(caught.value)


async def test_each_penalty_is_a_part_of_its_own_and_the_reward_is_their_sum() -> None:
    grader = make_grader(
        tool_calls={"free": 2, "slope": 0.04, "floor": -0.2},
        invalid_calls={"slope": 0.02, "floor": -0.1},
        reasoning_tokens={"free": 100, "slope": 0.001, "floor": -0.1},
    )
    result = await grader.grade(task(), episode("412.5 million", tool_calls=4, invalid_calls=1, reasoning_tokens=150))
    assert result.parts == pytest.approx(
        {"numeric": 1.0, "tool_calls": -0.08, "invalid_calls": -0.02, "reasoning_tokens": -0.05}
    )
    assert result.reward == sum(result.parts.values())
    assert "4 tool calls, 2 free: -0.08" in result.explanation


def test_a_penalty_starts_above_the_free_units_and_ends_at_its_floor() -> None:
    setting = PenaltyConfig(free=2, slope=0.125, floor=-0.5)
    assert [penalty(n, setting) for n in (0, 2, 3, 4, 6, 7, 1000)] == [0, 0, -0.125, -0.25, -0.5, -0.5, -0.5]


async def test_a_penalty_for_passing_rollouts_spares_the_others() -> None:
    grader = make_grader(tool_calls={"slope": 0.1, "floor": -0.3, "only_passing": True})
    assert (await grader.grade(task(), episode("412.5 million", tool_calls=2))).reward == pytest.approx(0.8)
    assert (await grader.grade(task(), episode("412.6 million", tool_calls=2))).reward == 0.5
    assert (await grader.grade(task(), episode("7", tool_calls=2))).reward == 0.0


async def test_malformed_turns_count_as_calls_and_as_invalid_calls() -> None:
    grader = make_grader(tool_calls={"slope": 0.01, "floor": -0.1}, invalid_calls={"slope": 0.02, "floor": -0.1})
    broken = Turn(message=Message(role="assistant", content="<tool_call>{"), malformed=True)
    good = episode("412.5 million", tool_calls=1)
    result = await grader.grade(
        task(),
        Episode(rollout_id="r", task_id="t", messages=(), turns=(broken, *good.turns), stop_reason=StopReason.ANSWERED),
    )
    assert result.parts == pytest.approx({"numeric": 1.0, "tool_calls": -0.02, "invalid_calls": -0.02})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "nummeric"}, "'exact', 'numeric'"),
        ({"type": "exact", "partial_credit": 0.5}, "Extra inputs"),
        ({"type": "numeric", "partial_credit": 1.0}, "less than 1"),
        ({"type": "numeric", "answer_key": ""}, "at least 1 character"),
    ],
)
def test_a_grader_config_that_breaks_a_rule_is_refused_with_the_reason(settings: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CONFIG.validate_python(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slope": 0.1, "floor": 0.2}, "less than 0"),
        ({"slope": 0, "floor": -0.2}, "greater than 0"),
        ({"slope": 0.1, "floor": float("nan")}, "finite"),
        ({"slope": 0.1}, "Field required"),
        ({"slope": 0.1, "floor": -0.2, "free": -1}, "greater than or equal to 0"),
    ],
)
def test_a_penalty_that_makes_no_sense_is_refused_with_the_reason(settings: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PenaltiesConfig.model_validate({"tool_calls": settings})


@pytest.mark.parametrize(
    ("score", "floors", "gap"),
    [("exact", [-1.0], 1), ("exact", [-0.6, -0.4], 1), ("numeric", [-0.5], 0.5), ("numeric", [-0.3, -0.3], 0.5)],
)
def test_floors_that_could_reverse_a_judgement_are_refused_and_a_little_less_is_not(
    score: str, floors: list[float], gap: float
) -> None:
    names = ("tool_calls", "invalid_calls")
    with pytest.raises(UserError, match=f"floors sum to {sum(floors):g}, .* differ by only {gap:g}"):
        make_grader(score, **{n: {"slope": 1, "floor": f} for n, f in zip(names, floors, strict=False)})
    scale = 0.99 * gap / -sum(floors)
    make_grader(score, **{n: {"slope": 1, "floor": f * scale} for n, f in zip(names, floors, strict=False)})


PENALTY = st.none() | st.fixed_dictionaries(
    {
        "free": st.integers(0, 5),
        "slope": st.floats(1e-4, 5),
        "floor": st.floats(-1, -1e-6),
        "only_passing": st.booleans(),
    }
)
SCORE = st.just({"type": "exact"}) | st.builds(
    lambda c: {"type": "numeric", "partial_credit": c}, st.just(0) | st.floats(0, 0.99)
)
COST = st.fixed_dictionaries(
    {
        "tool_calls": st.integers(0, 30),
        "invalid_calls": st.integers(0, 30),
        "reasoning_tokens": st.integers(0, 100_000),
    }
)
ANSWERS = {1.0: "412.5 million", 0.5: "412.6 million", 0.0: "7"}


@given(
    score=SCORE,
    penalties=st.fixed_dictionaries(dict.fromkeys(("tool_calls", "invalid_calls", "reasoning_tokens"), PENALTY)),
    costs=st.tuples(COST, COST),
    answers=st.permutations([1.0, 0.5, 0.0]),
)
async def test_no_penalty_that_validates_lifts_a_worse_answer_over_a_better_one(
    score: dict[str, Any], penalties: dict[str, Any], costs: tuple[dict[str, int], ...], answers: list[float]
) -> None:
    floors = -sum(p["floor"] for p in penalties.values() if p)
    try:
        grader = make_grader(score["type"], score, **penalties)
    except UserError:
        # Refused only where the floors really could reverse a judgement.
        partial = score.get("partial_credit", 0)
        assert floors > (min(partial, 1 - partial) if partial else 1.0) - 2e-6
        return
    grades = [
        await grader.grade(task(), episode(ANSWERS[answer], **cost))
        for answer, cost in zip(answers, costs, strict=False)
    ]
    first, second = sorted(grades, key=lambda g: g.parts[score["type"]])
    assert all(g.reward == sum(g.parts.values()) for g in grades)
    assert all(p <= 0 for g in grades for name, p in g.parts.items() if name != score["type"])
    if first.parts[score["type"]] < second.parts[score["type"]]:
        assert first.reward < second.reward


SIMILARITY = {
    "type": "text_similarity",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
}


def test_penalties_on_continuous_scores_need_a_threshold() -> None:
    config = CONFIG.validate_python(SIMILARITY)
    penalties = PenaltiesConfig.model_validate({"tool_calls": {"slope": 0.1, "floor": -0.2}})
    with pytest.raises(UserError, match=r"set grader\.pass_threshold"):
        check_penalties(config, penalties)
    check_penalties(config, PenaltiesConfig())
    check_penalties(CONFIG.validate_python(SIMILARITY | {"pass_threshold": 0.8}), penalties)


@given(
    threshold=st.floats(0.05, 0.95),
    scores=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    penalties=st.fixed_dictionaries(dict.fromkeys(("tool_calls", "invalid_calls", "reasoning_tokens"), PENALTY)),
    costs=st.tuples(COST, COST),
)
async def test_no_penalty_takes_a_right_answer_of_a_continuous_score_below_a_wrong_one(
    threshold: float,
    scores: tuple[float, float],
    penalties: dict[str, Any],
    costs: tuple[dict[str, int], dict[str, int]],
) -> None:
    class Fixed:
        def __init__(self, score: float) -> None:
            self._score = score

        async def grade(self, task: Task, episode: Episode) -> Grade:
            return Grade(reward=self._score, parts={"fixed": self._score})

    settings = PenaltiesConfig.model_validate(penalties)
    grades = [
        await PenalisedGrader(Fixed(score), settings, threshold=threshold, floor=threshold).grade(
            task(), episode("7", **cost)
        )
        for score, cost in zip(scores, costs, strict=True)
    ]
    for score, given_ in zip(scores, grades, strict=True):
        assert given_.passed == (score >= threshold)
        assert given_.reward <= score
        assert not given_.passed or given_.reward >= threshold - 1e-9
    wrong, right = sorted(grades, key=lambda g: g.passed or False)
    if right.passed and not wrong.passed:
        assert wrong.reward < right.reward + 1e-9


AMOUNTS = st.decimals(min_value=0, max_value=10**9, places=2, allow_nan=False, allow_infinity=False)


@given(amount=AMOUNTS, negative=st.booleans())
def test_a_number_is_read_alike_in_every_format(amount: Decimal, negative: bool) -> None:
    plain, separated = f"{amount:f}", f"{amount:,f}"
    forms = [plain, separated, f"${separated}", f"The result is {plain}.", f"**{separated}**"]
    if negative:
        forms = [f"-{plain}", f"−{separated}", f"-${plain}", f"$-{plain}", f"({separated})", f"is (${plain})"]
    for form in forms:
        (number,) = find_numbers(form)
        assert number.full == (-amount if negative else amount), form


@given(amount=AMOUNTS, unit=st.sampled_from([("thousand", 3), ("k", 3), ("million", 6), ("M", 6), ("bn", 9)]))
def test_a_scale_word_multiplies(amount: Decimal, unit: tuple[str, int]) -> None:
    (number,) = find_numbers(f"about {amount:,f} {unit[0]} dollars")
    assert number.full == amount * 10 ** unit[1]


@given(amount=AMOUNTS)
def test_per_cent_is_told_from_amounts(amount: Decimal) -> None:
    (number,) = find_numbers(f"{amount}%")
    assert number.percent
    assert number.value == amount


@given(text=st.text(max_size=300))
def test_any_text_can_be_searched_for_numbers(text: str) -> None:
    for number in find_numbers(text):
        assert number.value.is_finite()
        assert number.text in plain(text)


@given(text=st.text(alphabet="0123456789.,-+()$%eE mk−", max_size=60))
async def test_any_number_like_answer_is_graded_without_an_error(text: str) -> None:
    assert (await grade(text)).reward in (0.0, 0.5, 1.0)


@given(values=st.lists(st.integers(100, 899), min_size=5, max_size=12, unique=True))
async def test_naming_many_numbers_never_scores_even_with_the_gold_among_them(values: list[int]) -> None:
    assert (await grade(", ".join(map(str, values)), gold=str(values[-1]))).reward == 0.0
