"""A real vLLM server as the judge of `score_model` and `label_model`.

The judge is the taught model: what it finds is worth nothing. What can be tested is that the
server enforces the structure, and that what comes back is read, counted and cached.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from envs.errors import UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.judges.base import Judge, JudgeConfig, JudgeReply, JudgeRequest
from graders.judges.cache import CachedJudge
from graders.judges.model_graders import LabelModelConfig, LabelModelGrader, ScoreModelConfig, ScoreModelGrader
from graders.judges.openai_judge import build_judge
from graders.types import Grade, Grader, GraderErrorKind

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]
MAX_MODEL_LEN = 2048
NUM_SEEDS = 8
QUESTION = [
    {
        "role": "system",
        "content": "You grade answers. Reply with JSON: a short list of steps, then the result. Be brief.",
    },
    {"role": "user", "content": "Gold answer: {{ item.answer }}. Answer: {{ sample.output_text }}"},
]
TASK = Task(task_id="t", messages=(Message(role="user", content="?"),), item={"answer": "14.4"})


def episode(answer: str = "It is 14.4.") -> Episode:
    last = Message(role="assistant", content=answer)
    return Episode(
        rollout_id="r", task_id="t", messages=(last,), turns=(Turn(message=last),), stop_reason=StopReason.ANSWERED
    )


class Recorder:
    """Passes one grader's questions on and keeps what was asked and answered."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.seen: list[tuple[JudgeRequest, JudgeReply]] = []

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        reply = await self._judge.ask(request)
        self.seen.append((request, reply))
        return reply

    async def aclose(self) -> None:
        await self._judge.aclose()


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A grade, and the one question that it took."""

    grade: Grade
    request: JudgeRequest
    reply: JudgeReply
    is_complete: bool


@pytest.fixture(scope="module")
def found(judge_url: str) -> dict[str, list[Judged]]:
    """What graders of both kinds and of several seeds find, all asked at once."""

    async def ask() -> dict[str, list[Judged]]:
        judge = build_judge(JudgeConfig(base_url=judge_url))
        try:
            scores, labels = await asyncio.gather(
                judged(judge, lambda seed, judge: ScoreModelGrader(score_config(seed), judge)),
                judged(judge, lambda seed, judge: LabelModelGrader(label_config(seed), judge)),
            )
        finally:
            await judge.aclose()
        return {"score": scores, "label": labels}

    return asyncio.run(ask())


async def judged(judge: Judge, build: Callable[[int, Judge], Grader]) -> list[Judged]:
    """Every answer fits the structure, one at least is complete."""
    recorders = [Recorder(judge) for _ in range(NUM_SEEDS)]
    grades = await asyncio.gather(
        *(build(seed, recorder).grade(TASK, episode()) for seed, recorder in enumerate(recorders))
    )
    found = []
    for grade, recorder in zip(grades, recorders, strict=True):
        ((request, reply),) = recorder.seen
        found.append(Judged(grade=grade, request=request, reply=reply, is_complete=assert_structured(request, reply)))
    assert any(x.is_complete for x in found), found
    for x in found:
        assert x.grade.errors == (() if x.is_complete else (GraderErrorKind.MODEL_GRADER_PARSE,))
        assert 0 <= x.grade.reward <= 1
    return found


def sampling(seed: int) -> dict[str, Any]:
    return {"seed": seed, "temperature": 1.0, "max_completions_tokens": 400}


def score_config(seed: int) -> ScoreModelConfig:
    return ScoreModelConfig.model_validate(
        {"type": "score_model", "model": "judge", "input": QUESTION, "sampling_params": sampling(seed)}
    )


def label_config(seed: int) -> LabelModelConfig:
    return LabelModelConfig.model_validate(
        {
            "type": "label_model",
            "model": "judge",
            "input": QUESTION,
            "labels": ["right", "nearly right", "wrong"],
            "passing_labels": ["right"],
            "sampling_params": sampling(seed),
        }
    )


def assert_structured(request: JudgeRequest, reply: JudgeReply) -> bool:
    """That the text fits the schema as far as it goes; True where it is complete."""
    assert reply.num_tokens > 20 and not reply.refusal
    try:
        value = json.loads(reply.text)
    except json.JSONDecodeError:
        # Cut off at its limit, inside the structure.
        assert "".join(reply.text.split()).startswith('{"steps":[')
        return False
    jsonschema.validate(value, dict(request.schema))
    return True


def test_a_score_fits_the_structure_and_lies_in_the_range(found: dict[str, list[Judged]]) -> None:
    for x in found["score"]:
        assert x.grade.judge_tokens == {"judge": x.reply.num_tokens}


def test_a_label_is_one_of_the_list(found: dict[str, list[Judged]]) -> None:
    for x in found["label"]:
        if x.is_complete:
            assert x.grade.reward == float(json.loads(x.reply.text)["result"] == "right")


async def test_the_second_time_the_cache_answers(judge_url: str) -> None:
    judge = CachedJudge(build_judge(JudgeConfig(base_url=judge_url)), 100)
    grader = ScoreModelGrader(score_config(0), judge)
    try:
        first, *others = await asyncio.gather(*(grader.grade(TASK, episode()) for _ in range(3)))
        later = await grader.grade(TASK, episode())
    finally:
        await judge.aclose()
    taken = judge.take_metrics()
    assert first.judge_tokens == {"judge": taken["judge/tokens"]}
    for grade in (*others, later):
        assert (grade.reward, grade.errors, grade.judge_tokens) == (first.reward, first.errors, {"judge": 0})
    assert (taken["judge/requests"], taken["judge/cache_hits"], taken["judge/retries"]) == (1, 3, 0)
    assert taken["judge/latency_s"] > 0


async def test_what_the_server_refuses_is_told_apart(judge_url: str) -> None:
    judge, other = (build_judge(JudgeConfig(base_url=judge_url, model=model)) for model in (None, "gpt-unknown"))
    try:
        with pytest.raises(WorldError, match="too long for the judge"):
            await ScoreModelGrader(score_config(0), judge).grade(TASK, episode("word " * 2 * MAX_MODEL_LEN))
        with pytest.raises(UserError, match=r"gpt-unknown.*judge\.base_url"):
            await ScoreModelGrader(score_config(0), other).grade(TASK, episode())
    finally:
        await judge.aclose()
        await other.aclose()
