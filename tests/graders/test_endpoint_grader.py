"""The user's own grader behind HTTP: what it is sent, what comes of its faults, and samples that are too large."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from envs.clients.http import HttpLimits
from envs.errors import UserError, WorldError
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolResult, Turn
from graders.hosted.view import SAMPLE_KEYS, hosted_sample, item_of
from graders.types import Grade, GraderErrorKind
from graders.user.endpoint import EndpointConfig, EndpointGrader
from tests.support.faulty_server import Call, FaultyServer

HOSTED_KEYS = SAMPLE_KEYS[:5]
TASK = Task(task_id="t1", messages=(Message(role="user", content="?"),), item={"answer": "größer", "n": [1, None]})


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch):
    monkeypatch.setattr("graders.user.endpoint.HttpLimits", functools.partial(HttpLimits, backoff_s=0.005))


@pytest.fixture
async def grader() -> AsyncIterator[Callable[..., EndpointGrader]]:
    """Makes graders of a server; they are closed at the end."""
    made: list[EndpointGrader] = []

    def make(server: FaultyServer, **config: Any) -> EndpointGrader:
        made.append(EndpointGrader(EndpointConfig(type="endpoint", url=server.url, **{"timeout_s": 5.0} | config)))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


def score_server(behave: Any = lambda call: call.answer(), score: Any = 0.25) -> FaultyServer:
    return FaultyServer(behave, compute=lambda payload: {"score": score})


def episode(output: str = "found", answer: str = "It is 14.4.", arguments: str = '{"q": 1}') -> Episode:
    call = ToolCall(call_id="c0", name="search", arguments=arguments)
    turns = (
        Turn(
            message=Message(role="assistant", reasoning="Look.", tool_calls=(call,)),
            results=(ToolResult(call_id="c0", name="search", output=output),),
        ),
        Turn(message=Message(role="assistant", content=answer)),
    )
    shown = Message(role="tool", content=output, call_id="c0", name="search")
    return Episode(
        rollout_id="r1",
        task_id="t1",
        messages=(*TASK.messages, turns[0].message, shown, turns[1].message),
        turns=turns,
        stop_reason=StopReason.ANSWERED,
    )


async def test_sample_item_and_trace_id_arrive_and_the_score_is_the_reward(grader):
    async with score_server() as server:
        grade = await grader(server, name="mine").grade(TASK, episode())
    assert grade == Grade(reward=0.25, parts={"mine": 0.25}, explanation="mine gives 0.25")
    assert server.payloads == [{"sample": hosted_sample(episode()), "item": item_of(TASK), "trace_id": "r1"}]


async def test_headers_name_variables_of_the_environment(grader, monkeypatch):
    monkeypatch.setenv("GRADER_KEY", "secret")
    async with score_server() as server:
        await grader(server, headers={"Authorization": "Bearer ${GRADER_KEY}"}).grade(TASK, episode())
        assert server.headers[0]["Authorization"] == "Bearer secret"
        monkeypatch.delenv("GRADER_KEY")
        with pytest.raises(UserError, match=r"grader 'endpoint': headers: .*GRADER_KEY is not set"):
            grader(server, headers={"X": "${GRADER_KEY}"})


@pytest.mark.parametrize("fault", ["error", "garbage", "cut", "drop", "hang"])
async def test_a_fault_of_the_server_is_tried_again(grader, fault):
    async with score_server([fault, fault, "answer"]) as server:
        one = grader(server, timeout_s=1.5)
        assert (await one.grade(TASK, episode())).reward == 0.25
    assert len(server.payloads) == 3
    assert one.take_metrics()["grader/endpoint/retries"] == 2


@pytest.mark.parametrize("fault", ["error", "garbage", "drop", "hang"])
async def test_a_server_that_stays_broken_masks_the_rollout(grader, fault):
    async with score_server([fault] * 4) as server:
        with pytest.raises(WorldError, match="failed after 4 attempts"):
            await grader(server, timeout_s=0.3).grade(TASK, episode())


async def test_a_4xx_masks_the_rollout_at_once_and_tells_its_text(grader):
    async with score_server(lambda call: call.error(422)) as server:
        with pytest.raises(WorldError, match="grader 'endpoint': HTTP 422: out of order"):
            await grader(server).grade(TASK, episode())
    assert len(server.payloads) == 1


async def test_an_endless_answer_masks_the_rollout(grader):
    async with score_server(lambda call: call.huge()) as server:
        with pytest.raises(WorldError, match="above 1,000,000 bytes"):
            await grader(server).grade(TASK, episode())


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "0.5",
        "[]",
        "{}",
        '{"reward": 1}',
        '{"score": null}',
        '{"score": "1"}',
        '{"score": true}',
        '{"score": [1]}',
        '{"score": NaN}',
        '{"score": -Infinity}',
        '{"score": 1e999}',
        '{"score": 1' + "0" * 400 + "}",
    ],
)
async def test_an_answer_without_a_number_masks_the_rollout(grader, body):
    async def behave(call: Call) -> web.StreamResponse:
        return web.Response(text=body, content_type="application/json")

    async with score_server(behave) as server:
        with pytest.raises(WorldError, match=r'expected \{"score": number\}, got '):
            await grader(server).grade(TASK, episode())


@pytest.mark.parametrize("score", [0, 1, -3, 7.5])
async def test_a_score_is_taken_as_it_is(grader, score):
    async with score_server(score=score) as server:
        grade = await grader(server).grade(TASK, episode())
    assert (grade.reward, grade.errors) == (score, ())
    assert isinstance(grade.reward, float)


@pytest.mark.parametrize("text", ["x", "雪", '"'])
async def test_a_sample_that_is_too_large_is_shortened_in_its_trajectory_only(grader, text):
    large = episode(output=text * 2_000_000)
    async with score_server() as server:
        grade = await grader(server).grade(TASK, large)
    assert (grade.reward, grade.errors) == (0.25, (GraderErrorKind.TRUNCATED_OBSERVATION,))
    assert "shortened" in grade.explanation
    (payload,) = server.payloads
    assert len(json.dumps(payload, ensure_ascii=False).encode()) <= 1_000_000
    whole, sent = hosted_sample(large), payload["sample"]
    assert {key for key in SAMPLE_KEYS if sent[key] != whole[key]} == {"messages", "tool_calls"}
    assert all(sent[key] == whole[key] for key in HOSTED_KEYS)
    shown = sent["tool_calls"][0]["output"]
    assert shown == sent["messages"][2]["content"]
    kept, note = shown.rstrip("]").split("… [")
    assert kept == text * len(kept)
    assert note == f"{2_000_000 - len(kept)} characters cut"
    # Not cut to shreds: at least half of what would have fitted.
    assert len(kept) * 2 * len(json.dumps(text, ensure_ascii=False).encode()[1:-1]) > 450_000
    assert sent["messages"][-1] == whole["messages"][-1]
    assert large.turns[0].results[0].output == whole["tool_calls"][0]["output"] == text * 2_000_000


async def test_an_answer_that_is_too_large_is_never_cut(grader):
    async with score_server() as server:
        with pytest.raises(WorldError, match="above 1,000,000 bytes even with its trajectory shortened"):
            await grader(server).grade(TASK, episode(answer="x" * 1_000_001))
    assert server.payloads == []


async def test_large_arguments_stay_whole_where_the_hosted_service_shows_them(grader):
    large = episode(arguments=json.dumps({"q": "x" * 400_000}))
    async with score_server() as server:
        grade = await grader(server).grade(TASK, large)
    assert grade.errors == (GraderErrorKind.TRUNCATED_OBSERVATION,)
    sent = server.payloads[0]["sample"]
    assert sent["output_tools"] == hosted_sample(large)["output_tools"]
    assert len(sent["messages"][1]["tool_calls"][0]["function"]["arguments"]) < 400_000
    assert len(sent["tool_calls"][0]["arguments"]) < 400_000


def test_a_row_that_cannot_be_sent_is_named_before_the_run():
    one = EndpointGrader(EndpointConfig(type="endpoint", url="http://127.0.0.1:1/"))
    one.check(TASK)
    for item, told in [
        ({"text": "x" * 1_000_000}, "at most 1,000,000"),
        ({"n": float("nan")}, "as JSON"),
        ({"n": {1}}, "as JSON"),
    ]:
        with pytest.raises(UserError, match=f"task t2: .*{told}"):
            one.check(Task(task_id="t2", messages=TASK.messages, item=item))


async def test_the_rate_limit_holds(grader):
    async with score_server() as server:
        one = grader(server, rate_limit=20)
        start = time.perf_counter()
        for _ in range(5):
            await one.grade(TASK, episode())
    assert time.perf_counter() - start >= 4 / 20
