"""`score_model` and `label_model` over a real server that speaks Chat Completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from envs.errors import UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.judges.answers import answer_of, label_of, score_of
from graders.judges.base import JudgeConfig
from graders.judges.cache import CachedJudge
from graders.judges.model_graders import LabelModelConfig, LabelModelGrader, ScoreModelConfig, ScoreModelGrader
from graders.judges.openai_judge import build_judge
from graders.types import Grade, GraderErrorKind
from tests.support.faulty_server import FaultyServer

PARSE = (GraderErrorKind.MODEL_GRADER_PARSE,)
INPUT = [
    {"role": "developer", "content": "Judge the answer. Gold: {{ item.answer }}"},
    {"role": "user", "content": [{"type": "input_text", "text": "{{sample.output_text}}"}]},
]
TASK = Task(task_id="t1", messages=(Message(role="user", content="?"),), item={"answer": "14.4", "tags": ["a"]})


def episode(answer: str = "It is 14.4.", stop_reason: StopReason = StopReason.ANSWERED) -> Episode:
    last = Message(role="assistant", content=answer)
    return Episode(
        rollout_id="r1", task_id="t1", messages=(last,), turns=(Turn(message=last),), stop_reason=stop_reason
    )


def answer(result: Any, *conclusions: str) -> str:
    return json.dumps({"steps": [{"description": "d", "conclusion": c} for c in conclusions], "result": result})


class JudgeServer:
    """Answers every question with `text`, or refuses."""

    def __init__(self, text: str | None = None, refusal: str | None = None) -> None:
        self.text = text
        self.refusal = refusal
        self.http = FaultyServer(compute=self._completion)

    def _completion(self, payload: Any) -> Any:
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total_tokens": 42}}


@pytest.fixture
async def judged() -> AsyncIterator[Callable[..., Any]]:
    """Starts a server that gives `text`; returns the judge that asks it, and the server."""
    started: list[tuple[CachedJudge, JudgeServer]] = []

    async def start(text: str | None = None, refusal: str | None = None) -> tuple[CachedJudge, JudgeServer]:
        server = JudgeServer(text, refusal)
        await server.http.start()
        url = f"http://127.0.0.1:{server.http.port}/v1"
        started.append((CachedJudge(build_judge(JudgeConfig(base_url=url, timeout_s=5, max_retries=0)), 100), server))
        return started[-1]

    yield start
    for judge, server in started:
        await judge.aclose()
        await server.http.stop()


def score_config(**settings: Any) -> ScoreModelConfig:
    return ScoreModelConfig.model_validate({"type": "score_model", "model": "judge-1", "input": INPUT, **settings})


def label_config(**settings: Any) -> LabelModelConfig:
    labels = {"labels": ["good", "bad", "odd"], "passing_labels": ["good", "odd"]}
    return LabelModelConfig.model_validate(
        {"type": "label_model", "model": "judge-1", "input": INPUT, **labels, **settings}
    )


async def test_the_judge_reads_the_filled_templates_and_must_fit_the_hosted_structure(judged):
    judge, server = await judged(answer(0.5))
    await ScoreModelGrader(score_config(sampling_params={"temperature": 0.2}), judge).grade(TASK, episode())
    (payload,) = server.http.payloads
    # To chat templates that know no developer its words would be lost.
    assert payload["messages"] == [
        {"role": "system", "content": "Judge the answer. Gold: 14.4"},
        {"role": "user", "content": "It is 14.4."},
    ]
    assert (payload["model"], payload["temperature"]) == ("judge-1", 0.2)
    schema = payload["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["steps", "result"]
    step = {
        "type": "object",
        "properties": {"description": {"type": "string"}, "conclusion": {"type": "string"}},
        "required": ["description", "conclusion"],
        "additionalProperties": False,
    }
    assert schema["properties"] == {"steps": {"type": "array", "items": step}, "result": {"type": "number"}}


async def test_a_score_comes_with_its_reasons_and_its_tokens(judged):
    judge, _ = await judged(answer(0.75, "The unit fits.", " The sign  is right. "))
    grader = ScoreModelGrader(score_config(name="quality"), judge)
    first, second = await grader.grade(TASK, episode()), await grader.grade(TASK, episode())
    assert first == Grade(
        reward=0.75,
        parts={"quality": 0.75},
        explanation="judge-1 gives 0.75: The unit fits.; The sign is right.",
        judge_tokens={"judge-1": 42},
    )
    assert second.judge_tokens == {"judge-1": 0}
    assert second.reward == 0.75


@pytest.mark.parametrize(
    ("result", "bounds", "score"),
    [
        (0.5, (0, 1), 0.5),
        (1, (0, 1), 1.0),
        (3, (0, 1), 1.0),
        (-0.1, (0, 1), 0.0),
        (7, (1, 5), 5.0),
        (0, (1, 5), 1.0),
        (-2.5, (-3, 3), -2.5),
        (10**400, (0, 1), 1.0),
    ],
)
async def test_the_result_is_clamped_to_the_range(judged, result, bounds, score):
    judge, _ = await judged(answer(result))
    grade = await ScoreModelGrader(score_config(range=bounds), judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (score, ())
    assert isinstance(grade.reward, float)
    assert ("clamped" in grade.explanation) == (result != score)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "I give it 0.9.",
        '{"steps": [], "result": 0.',
        '{"steps": [], "mark": 1}',
        '[{"result": 1}]',
        answer("nine"),
        answer(True),
        answer(None),
        '{"result": NaN}',
        '{"result": Infinity}',
        '{"result": 1e999}',
        "1" * 5000,
        '{"result": ' + "1" * 5000 + "}",
        "[" * 100_000,
        # A quotation of what is judged is no judgement.
        'The answer says {"result": 1} but that is no proof.',
        '```json\n{"result": 1}\n```\nis what it claims.',
        'First:\n```json\n{"result": 1}\n```\nthen\n```json\n{"steps": \n```',
        # Cut off, perhaps in the middle of the number.
        'I think:\n```json\n{\n  "steps": [],\n  "result": 4',
        '{\n  "steps": [],\n  "result": 4',
        "0,7",
        "between 2 and 3",
        "8/10",
        "80%",
        "seven",
        "0.7 or 0.8",
        # Under another name than the score's, or with a figure in the remark.
        "Score: 4\nConfidence: 3",
        "Style score: 3",
        "4 (or 3)",
        '{"confidence": 3}',
        'It would be {"result": 3}',
    ],
)
async def test_an_answer_without_a_number_gives_0_and_says_so(judged, text):
    judge, _ = await judged(text)
    grade = await ScoreModelGrader(score_config(range=(1, 5)), judge).grade(TASK, episode())
    assert (grade.reward, grade.parts, grade.errors) == (0.0, {"score_model": 0.0}, PARSE)
    assert grade.judge_tokens == {"judge-1": 42}
    assert 0 < len(grade.explanation) < 300


@pytest.mark.parametrize(
    "text",
    [
        ' \n{"result": 0.5, "steps": []} ',
        '{"result": 0.5}',
        '{"result": 0.5, "steps": "none", "more": 1}',
        '{"result": 0.5, "steps": [1, {"conclusion": 2}, {}]}',
        '```json\n{"result": 0.5}\n```',
        '```\n{"result": 0.5}\n```\n',
        'It claims ```json\n{"result": 1}\n``` but is half right.\n\n```json\n{"steps": [],\n "result": 0.5}\n```',
    ],
)
async def test_a_server_that_enforces_nothing_is_read_where_the_object_is_the_answer(judged, text):
    judge, _ = await judged(text)
    grade = await ScoreModelGrader(score_config(), judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (0.5, ())


@pytest.mark.parametrize(
    ("text", "bounds", "score"),
    [
        ("0.7", (0, 1), 0.7),
        (" 0.7\n", (0, 1), 0.7),
        ("0.7.", (0, 1), 0.7),
        ("+.5", (0, 1), 0.5),
        ("\u22122", (-3, 3), -2.0),
        ("7", (0, 10), 7.0),
        ("**7**", (0, 10), 7.0),
        ("`0.7`", (0, 1), 0.7),
        ('"0.7"', (0, 1), 0.7),
        ("```\n0.7\n```", (0, 1), 0.7),
        ("Score: 0.7", (0, 1), 0.7),
        ("**Score:** 7", (0, 10), 7.0),
        ("### Final score (0-10): **7**", (0, 10), 7.0),
        ("The final score is 4.", (1, 5), 4.0),
        ("Rating = 4", (1, 5), 4.0),
        ("<score>0.7</score>", (0, 1), 0.7),
        ("$\\boxed{0.7}$", (0, 1), 0.7),
        ("0.8/1", (0, 1), 0.8),
        ("8/10", (0, 1), 0.8),
        ("4 out of 5", (1, 5), 4.0),
        ("80%", (0, 1), 0.8),
        ("80 %", (0, 100), 80.0),
        ("1e-1", (0, 1), 0.1),
        ("11", (0, 10), 10.0),
        ("The unit is wrong, the rest fits.\n\nScore: 0.5", (0, 1), 0.5),
        ("The unit is wrong.\n0.5", (0, 1), 0.5),
        ("<think>At first 1. No:\n0.9</think>\n\n0.5", (0, 1), 0.5),
        ('<think>{"result": 1}</think>{"result": 0.5}', (0, 1), 0.5),
        ('{"score": 0.5}', (0, 1), 0.5),
        ('{"result": "0.5"}', (0, 1), 0.5),
        ("Rating: [[7]]", (0, 10), 7.0),
        ("The answer fits.\n\n[[7]]", (0, 10), 7.0),
        ('{"rating": 7}', (0, 10), 7.0),
        ('{"Score": 0.5, "explanation": "It fits."}', (0, 1), 0.5),
        ('{"score": 0.5, "label": "good"}', (0, 1), 0.5),
        ('The unit is wrong.\n\n{"result": 0.5}', (0, 1), 0.5),
        ('The unit is wrong.\n{\n  "steps": [{"conclusion": "}"}],\n  "result": 0.5\n}', (0, 1), 0.5),
        ("<result>\n0.5\n</result>", (0, 1), 0.5),
        ("Score: 0.5 (partly right)", (0, 1), 0.5),
        ("Score: 5 (out of 10)", (0, 1), 0.5),
        ("- **Score**: 0.5", (0, 1), 0.5),
        ("3. Score: 0.5 points", (0, 1), 0.5),
        ("So the final score is 0.5.", (0, 1), 0.5),
        ("Therefore, score = 0.5", (0, 1), 0.5),
        ("Numerical score [0-1]: 0.5", (0, 1), 0.5),
        ("Score\uff1a0.5", (0, 1), 0.5),
    ],
)
async def test_a_bare_number_is_read_as_prompts_ask_for_it(judged, text, bounds, score):
    judge, _ = await judged(text)
    grade = await ScoreModelGrader(score_config(range=bounds), judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (pytest.approx(score), ())


@pytest.mark.parametrize(
    "text",
    [
        *("good", "**good**", "Good.", "Label: good", '"good"', "It fits.\n\nVerdict: good"),
        *(
            "[[good]]",
            "(good)",
            "good)",
            "good!",
            "Category: good",
            "Judgement: **good**",
            "Final decision: good (clearly)",
        ),
        *('{"label": "good"}', 'It fits.\n{"classification": "Good"}', "<label>\ngood\n</label>"),
    ],
)
async def test_a_bare_label_is_read_as_prompts_ask_for_it(judged, text):
    judge, _ = await judged(text)
    grade = await LabelModelGrader(label_config(), judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (1.0, ())


@pytest.mark.parametrize("text", ["It is good", "good, bad", "GOOD or odd", ""])
async def test_a_label_inside_a_sentence_is_no_choice(judged, text):
    judge, _ = await judged(text)
    grade = await LabelModelGrader(label_config(), judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (0.0, PARSE)


async def test_reasons_are_kept_short(judged):
    judge, _ = await judged(answer(1, *["A long story. " * 50] * 20))
    grade = await ScoreModelGrader(score_config(), judge).grade(TASK, episode())
    assert 200 < len(grade.explanation) < 400


@pytest.mark.parametrize(
    "make", [lambda j: ScoreModelGrader(score_config(), j), lambda j: LabelModelGrader(label_config(), j)]
)
async def test_a_refusal_gives_0_and_says_so(judged, make):
    judge, _ = await judged(None, "I can't help with that.")
    grade = await make(judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (0.0, (GraderErrorKind.MODEL_GRADER_REFUSAL,))
    assert "I can't help with that." in grade.explanation


@pytest.mark.parametrize(
    ("variable", "kind"),
    [
        ("item.missing", GraderErrorKind.INVALID_VARIABLE),
        ("sample.output_tools[0].function.name", GraderErrorKind.INVALID_VARIABLE),
        ("sample.output_json.value", GraderErrorKind.SAMPLE_PARSE),
    ],
)
@pytest.mark.parametrize("make", [score_config, label_config])
async def test_a_variable_that_the_sample_lacks_gives_0_and_asks_nobody(judged, variable, kind, make):
    judge, server = await judged(answer(1))
    config = make(input=[{"role": "user", "content": f"{{{{ {variable} }}}}"}])
    grader = (ScoreModelGrader if make is score_config else LabelModelGrader)(config, judge)
    grade = await grader.grade(TASK, episode())
    assert (grade.reward, grade.errors, grade.judge_tokens) == (0.0, (kind,), {})
    assert variable in grade.explanation
    assert server.http.payloads == []


async def test_a_judge_that_is_gone_masks_the_rollout(judged):
    judge, server = await judged(answer(1))
    await server.http.stop()
    for grader in (ScoreModelGrader(score_config(), judge), LabelModelGrader(label_config(), judge)):
        with pytest.raises(WorldError, match="judge-1"):
            await grader.grade(TASK, episode())


async def test_an_episode_that_the_world_broke_off_is_not_judged(judged):
    judge, server = await judged(answer(1))
    with pytest.raises(ValueError, match="world fault"):
        await ScoreModelGrader(score_config(), judge).grade(TASK, episode(stop_reason=StopReason.WORLD_FAULT))
    assert server.http.payloads == []


async def test_what_the_model_wrote_is_not_read_as_a_template(judged):
    judge, server = await judged(answer(1))
    await ScoreModelGrader(score_config(), judge).grade(TASK, episode("{{ item.answer }}"))
    assert server.http.payloads[0]["messages"][1]["content"] == "{{ item.answer }}"


@pytest.mark.parametrize(("label", "score"), [("good", 1.0), ("bad", 0.0), ("odd", 1.0)])
async def test_a_passing_label_is_1_and_another_0(judged, label, score):
    judge, server = await judged(answer(label, "Because."))
    grade = await LabelModelGrader(label_config(name="tone"), judge).grade(TASK, episode())
    assert grade == Grade(
        reward=score,
        parts={"tone": score},
        explanation=f"judge-1 chooses {label!r}: Because.",
        judge_tokens={"judge-1": 42},
    )
    schema = server.http.payloads[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["result"] == {"type": "string", "enum": ["good", "bad", "odd"]}


@pytest.mark.parametrize("result", ["great", "goodish", 1, None, ["good"], {"good": 1}])
async def test_no_label_of_the_list_gives_0_and_says_so(judged, result):
    judge, _ = await judged(answer(result))
    grade = await LabelModelGrader(label_config(), judge).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (0.0, PARSE)


@pytest.mark.parametrize("make", [score_config, label_config])
def test_what_a_user_got_wrong_is_named_before_the_run(make, monkeypatch):
    kind = ScoreModelGrader if make is score_config else LabelModelGrader
    judge = build_judge(JudgeConfig(base_url="http://127.0.0.1:1/v1"))
    with pytest.raises(UserError, match=r"grader 'g': input\[1\]\.content: .*item"):
        bad = {"role": "user", "content": "{{ row.answer }}"}
        kind(make(name="g", input=[INPUT[0], bad]), judge)
    grader = kind(make(name="g"), judge)
    grader.check(TASK)
    with pytest.raises(UserError, match=r"input\[0\]\.content: task t2 .*item\.answer"):
        grader.check(Task(task_id="t2", messages=TASK.messages))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        kind(make(), build_judge(JudgeConfig()))


@pytest.mark.parametrize(
    "text",
    [
        *("a" + " " * 200_000 + "b", "</a>" * 50_000 + "x", "score" + " " * 200_000 + "x", "x\n" * 100_000 + "}"),
        *("{\n" * 100_000 + "}", "\\boxed{" * 30_000, "a (" * 70_000 + ")", "so " * 70_000, "[" * 200_000),
    ],
)
def test_a_judge_that_says_the_same_for_ever_is_read_at_once(text):
    start = time.thread_time()
    result = answer_of(text).get("result")
    assert score_of(result, (0, 1)) is None and label_of(result, ["yes", "no"]) is None
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("why\n" * 3000 + "</answer>\nscore: 7 </answer>", 7.0),
        ("bla" + " " * 3000 + "5", None),
        ("5" + " " * 3000, 5.0),
    ],
)
def test_of_a_long_answer_the_last_line_counts_and_no_part_of_one(text, score):
    assert score_of(answer_of(text)["result"], (0, 10)) == score
