"""Judges: what is asked of their servers, what comes of each fault, and what the cache keeps."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError, WorldError
from envs.types import Message
from graders.judges.base import JudgeConfig, JudgeReply, JudgeRequest, JudgeSampling
from graders.judges.cache import CachedJudge
from graders.judges.openai_judge import OpenAIJudge, build_judge
from tests.support.faulty_server import Call, FaultyServer
from trainer.engines.base_judge import DEFAULT_MAX_TOKENS, EngineJudge

SCHEMA = {"type": "object", "properties": {"result": {"type": "number"}}, "required": ["result"]}


def completion(text: Any = '{"result": 1}', *, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42},
    }


def judge_server(behave: Any = lambda call: call.answer(), text: str = '{"result": 1}') -> FaultyServer:
    return FaultyServer(behave, compute=lambda payload: completion(text))


def failing(status: int, times: int, body: Any = None) -> Callable[[Call], Any]:
    """This status so many times, with leave to come back at once; then an answer."""

    async def behave(call: Call) -> web.StreamResponse:
        if call.number >= times:
            return await call.answer()
        error = {"error": body or {"message": "out of order"}}
        return web.json_response(error, status=status, headers={"retry-after-ms": "5"})

    return behave


def request(text: str = "How good?", model: str = "m", **sampling: Any) -> JudgeRequest:
    return JudgeRequest(
        model=model,
        messages=({"role": "user", "content": text},),
        schema=SCHEMA,
        sampling=JudgeSampling(**sampling),
    )


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., OpenAIJudge]]:
    """Makes judges that ask a test's server; they are closed at the end."""
    made: list[OpenAIJudge] = []

    def make(server: FaultyServer, **config: Any) -> OpenAIJudge:
        url = f"http://127.0.0.1:{server.port}/v1"
        made.append(build_judge(JudgeConfig(**{"base_url": url, "timeout_s": 5.0} | config)))
        return made[-1]

    yield make
    for judge in made:
        await judge.aclose()


async def test_the_server_is_asked_to_enforce_the_schema_and_only_told_what_is_set(connect, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " secret\n")
    async with judge_server() as server:
        reply = await connect(server, api_key_env="JUDGE_KEY").ask(request("Größer 雪?"))
    assert reply == JudgeReply(text='{"result": 1}', num_tokens=42)
    assert server.payloads == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "Größer 雪?"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "grade", "strict": True, "schema": SCHEMA},
            },
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_the_sampling_and_the_model_of_the_config_arrive(connect):
    sampling = {"seed": 0, "top_p": 0.5, "temperature": 0.0, "reasoning_effort": "low"}
    async with judge_server() as server:
        await connect(server, model="qwen").ask(request(max_completions_tokens=9, **sampling))
    (payload,) = server.payloads
    assert payload["model"] == "qwen"
    assert {k: v for k, v in payload.items() if k not in ("model", "messages", "response_format")} == {
        **sampling,
        "max_completion_tokens": 9,
    }


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
async def test_what_may_pass_is_tried_again(connect, status):
    async with judge_server(failing(status, 2)) as server:
        judge = connect(server)
        start = time.perf_counter()
        assert (await judge.ask(request())).text == '{"result": 1}'
        elapsed_s = time.perf_counter() - start
    assert len(server.payloads) == 3
    taken = judge.take_metrics()
    assert 0.01 < taken.pop("judge/latency_s") <= elapsed_s
    assert taken == {"judge/requests": 1, "judge/failures": 0, "judge/retries": 2, "judge/tokens": 42}
    assert judge.take_metrics() == {}


@pytest.mark.parametrize("fault", ["drop", "hang", "cut"])
async def test_a_lost_connection_is_tried_again(connect, fault):
    async with judge_server([fault, "answer"]) as server:
        assert (await connect(server, timeout_s=1.5).ask(request())).text == '{"result": 1}'
    assert len(server.payloads) == 2


async def test_a_judge_that_stays_away_is_the_worlds_fault_and_is_named(connect):
    async with judge_server(failing(503, 99)) as server:
        judge = connect(server, max_retries=2)
        with pytest.raises(
            WorldError, match=rf"'m' at http://127.0.0.1:{server.port}/v1: Error code: 503 - out of order"
        ):
            await judge.ask(request())
        assert len(server.payloads) == 3
        await server.stop()
        with pytest.raises(WorldError, match="Connection error"):
            await connect(server, max_retries=0, timeout_s=300).ask(request())
    assert judge.take_metrics() == {"judge/requests": 1, "judge/failures": 1, "judge/retries": 0, "judge/tokens": 0}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>sign in</html>",
        '{"choices": ',
        "null",
        "[]",
        "{}",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": "1"}]}',
        json.dumps(completion(["no", "text"])),
        json.dumps(completion() | {"usage": {"total_tokens": "many"}}),
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
async def test_an_answer_that_is_no_completion_is_the_worlds_fault(connect, body, content_type):
    async def behave(call: Call) -> web.StreamResponse:
        return web.Response(text=body, content_type=content_type)

    async with judge_server(behave) as server:
        with pytest.raises(WorldError, match="no chat completion"):
            await connect(server).ask(request())


async def test_an_answer_without_usage_is_an_answer(connect):
    async def behave(call: Call) -> web.StreamResponse:
        return web.json_response({"choices": [{"message": {"content": "{}"}}]})

    async with judge_server(behave) as server:
        assert await connect(server).ask(request()) == JudgeReply(text="{}")


async def test_a_server_that_trickles_ends_in_time(connect):
    async def behave(call: Call) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(call.request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    async with judge_server(behave) as server:
        async with asyncio.timeout(60):
            with pytest.raises(WorldError, match="no answer within"):
                await connect(server, timeout_s=0.3, max_retries=0).ask(request())


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_what_no_rollout_could_be_graded_with_is_the_users_to_mend(connect, status):
    async with judge_server(failing(status, 99, {"message": "The model `m` does not exist"})) as server:
        with pytest.raises(UserError, match=rf"model 'm' .*code: {status}.*does not exist.*judge\.base_url"):
            await connect(server).ask(request())
    assert len(server.payloads) == 1


@pytest.mark.parametrize("status", [400, 422])
async def test_a_request_that_never_worked_stops_the_run_but_one_odd_prompt_does_not(connect, status):
    async def behave(call: Call) -> web.StreamResponse:
        return await (call.answer() if call.number == 1 else call.error(status))

    async with judge_server(behave) as server:
        judge = connect(server)
        with pytest.raises(UserError, match=f"code: {status} out of order.*sampling_params"):
            await judge.ask(request())
        await judge.ask(request())
        with pytest.raises(WorldError, match=f"code: {status}"):
            await judge.ask(request())


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "This model's maximum context length is 8192 tokens.", "code": "context_length_exceeded"}),
        (400, {"message": "The decoder prompt (length 9) is longer than the maximum model length of 8.", "code": 400}),
        (400, {"message": "the request exceeds the available context size"}),
        (413, {"message": "Request Entity Too Large"}),
    ],
)
async def test_a_prompt_too_long_for_the_judge_masks_the_rollout(connect, status, error):
    async with judge_server(failing(status, 99, error)) as server:
        with pytest.raises(WorldError, match="too long for the judge"):
            await connect(server).ask(request())


async def test_refusals_and_content_filters_are_refusals(connect):
    answers = [
        web.json_response(completion(None, refusal="I can't judge that.")),
        web.json_response(completion("{", finish_reason="content_filter")),
        web.json_response({"error": {"message": "filtered", "code": "content_filter"}}, status=400),
    ]

    async def behave(call: Call) -> web.StreamResponse:
        return answers[call.number]

    async with judge_server(behave) as server:
        judge = connect(server)
        replies = [await judge.ask(request()) for _ in answers]
    assert [r.refusal for r in replies] == [
        "I can't judge that.",
        "the server's content filter stopped the answer",
        "the server's content filter stopped the prompt: Error code: 400 - filtered",
    ]


async def test_no_more_requests_are_in_flight_than_allowed(connect):
    async def behave(call: Call) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return await call.answer()

    async with judge_server(behave) as server:
        judge = connect(server, max_concurrency=3)
        await asyncio.gather(*(judge.ask(request(str(i))) for i in range(12)))
    assert server.most_in_flight == 3
    assert judge.take_metrics()["judge/requests"] == 12


def test_a_missing_key_is_named_only_where_one_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"judge\.api_key_env: .*OPENAI_API_KEY.*judge\.base_url"):
        CachedJudge(build_judge(JudgeConfig()), 10).check(JudgeSampling())
    build_judge(JudgeConfig(base_url="http://127.0.0.1:1/v1")).check(JudgeSampling())
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    build_judge(JudgeConfig()).check(JudgeSampling())


class CountingJudge:
    """Answers each request with its number, when `gate` is open."""

    def __init__(self, *, faults: Mapping[int, Exception] | None = None, is_open: bool = True) -> None:
        self.asked: list[JudgeRequest] = []
        self.cancelled = 0
        self.closed = False
        self.gate = asyncio.Event()
        self._faults = faults or {}
        if is_open:
            self.gate.set()

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        self.asked.append(request)
        number = len(self.asked)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if number in self._faults:
            raise self._faults[number]
        return JudgeReply(text=str(number), num_tokens=7)

    async def aclose(self) -> None:
        self.closed = True


async def test_the_same_question_is_answered_from_the_cache_at_no_cost():
    judge = CountingJudge()
    cached = CachedJudge(judge, 10)
    first, second = await cached.ask(request()), await cached.ask(request())
    assert (first, second) == (JudgeReply(text="1", num_tokens=7), JudgeReply(text="1"))
    assert cached.take_metrics() == {"judge/cache_hits": 1}
    assert cached.take_metrics() == {}


@pytest.mark.parametrize(
    "other",
    [
        request("Other?"),
        request(model="other"),
        request(seed=1),
        request(temperature=0.5),
        JudgeRequest(model="m", messages=request().messages, schema={}, sampling=JudgeSampling()),
        JudgeRequest(
            model="m",
            messages=({"role": "system", "content": "How good?"},),
            schema=SCHEMA,
            sampling=JudgeSampling(),
        ),
    ],
)
async def test_another_question_is_asked_anew(other):
    judge = CountingJudge()
    cached = CachedJudge(judge, 10)
    replies = [(await cached.ask(r)).text for r in (request(), other, request(), other)]
    assert replies == ["1", "2", "1", "2"]


@given(questions=st.lists(st.integers(0, 4), max_size=30), size=st.integers(1, 4))
def test_the_cache_keeps_the_most_recently_used_answers(questions: Sequence[int], size: int):
    kept: OrderedDict[int, None] = OrderedDict()
    misses = []
    for question in questions:
        if question not in kept:
            misses.append(str(question))
        kept[question] = None
        kept.move_to_end(question)
        if len(kept) > size:
            kept.popitem(last=False)

    async def ask_all() -> list[str]:
        judge = CountingJudge()
        cached = CachedJudge(judge, size)
        for question in questions:
            await cached.ask(request(str(question)))
        return [r.messages[0]["content"] for r in judge.asked]

    assert asyncio.run(ask_all()) == misses


async def test_a_cache_of_size_0_is_off():
    judge = CountingJudge()
    cached = CachedJudge(judge, 0)
    replies = await asyncio.gather(*(cached.ask(request()) for _ in range(3)))
    assert [r.num_tokens for r in replies] == [7, 7, 7]
    assert cached.take_metrics() == {}


async def test_the_same_question_at_the_same_time_is_asked_once_and_paid_once():
    judge = CountingJudge(is_open=False)
    cached = CachedJudge(judge, 10)
    asking = [asyncio.create_task(cached.ask(request())) for _ in range(5)]
    await asyncio.sleep(0)
    judge.gate.set()
    replies = await asyncio.gather(*asking)
    assert {r.text for r in replies} == {"1"}
    assert sum(r.num_tokens for r in replies) == 7
    assert cached.take_metrics() == {"judge/cache_hits": 4}


async def test_a_fault_is_told_to_all_who_wait_and_is_not_kept():
    judge = CountingJudge(faults={1: WorldError("gone")}, is_open=False)
    cached = CachedJudge(judge, 10)
    asking = [asyncio.create_task(cached.ask(request())) for _ in range(3)]
    await asyncio.sleep(0)
    judge.gate.set()
    assert [type(e) for e in await asyncio.gather(*asking, return_exceptions=True)] == [WorldError] * 3
    assert (await cached.ask(request())).text == "2"


async def test_who_asks_along_gets_the_answer_when_the_first_is_cancelled():
    judge = CountingJudge(is_open=False)
    cached = CachedJudge(judge, 10)
    first, second = (asyncio.create_task(cached.ask(request())) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    judge.gate.set()
    assert await second == JudgeReply(text="1", num_tokens=7)
    assert await cached.ask(request()) == JudgeReply(text="1")
    assert (len(judge.asked), judge.cancelled) == (1, 0)


async def test_the_judge_stops_when_nobody_waits_any_more():
    judge = CountingJudge(is_open=False)
    cached = CachedJudge(judge, 10)
    asking = [asyncio.create_task(cached.ask(request())) for _ in range(2)]
    await asyncio.sleep(0.01)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert judge.cancelled == 1
    judge.gate.set()
    assert (await cached.ask(request())).text == "2"


async def test_closing_ends_what_is_under_way():
    judge = CountingJudge(is_open=False)
    cached = CachedJudge(judge, 10)
    asking = asyncio.create_task(cached.ask(request()))
    await asyncio.sleep(0.01)
    await cached.aclose()
    assert (judge.cancelled, judge.closed) == (1, True)
    assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError)


async def test_the_cache_adds_its_figures_to_the_judges(connect):
    async with judge_server() as server:
        cached = CachedJudge(connect(server), 10)
        for _ in range(3):
            await cached.ask(request())
    taken = cached.take_metrics()
    assert (taken["judge/requests"], taken["judge/cache_hits"], taken["judge/tokens"]) == (1, 2, 42)


class LetterEngine:
    """Token ids are code points; ends with the stop token 0, or is cut off."""

    def __init__(self, text: str, *, stops: bool = True, fault: WorldError | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answer = [ord(c) for c in text] + [0] * stops
        self._fault = fault

    async def generate_base(self, prompt_ids: Sequence[int], **settings: Any) -> list[int]:
        self.asked.append({"prompt": "".join(map(chr, prompt_ids)), **settings})
        if self._fault:
            raise self._fault
        return self._answer


def letter_chat() -> Any:
    def open_chat(messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        assert not tools
        return [ord(c) for m in messages for c in f"{m.role}:{m.content}|"]

    return SimpleNamespace(open=open_chat, decode=lambda ids: "".join(map(chr, ids)), stop_token_ids=frozenset({0}))


@pytest.mark.parametrize("stops", [True, False])
async def test_the_runs_own_engine_judges_in_the_requests_words(stops):
    engine = LetterEngine('{"result": 1}', stops=stops)
    judge = EngineJudge()
    judge.bind(engine, letter_chat())
    messages = ({"role": "developer", "content": "Be fair."}, {"role": "user", "content": "Well?"})
    asked = JudgeRequest(
        model="m", messages=messages, schema=SCHEMA, sampling=JudgeSampling(seed=3, temperature=0.5, top_p=0.9)
    )
    prompt = "system:Be fair.|user:Well?|"
    assert await judge.ask(asked) == JudgeReply(text='{"result": 1}', num_tokens=len(prompt) + 13 + stops)
    sampling = {"max_tokens": DEFAULT_MAX_TOKENS, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert engine.asked == [{"prompt": prompt, "schema": SCHEMA, **sampling}]


async def test_without_settings_the_engine_judges_greedily():
    engine = LetterEngine("{}")
    judge = EngineJudge()
    judge.bind(engine, letter_chat())
    await judge.ask(request(max_completions_tokens=5))
    assert {k: engine.asked[0][k] for k in ("max_tokens", "temperature", "top_p", "seed")} == {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": None,
    }
    assert judge.take_metrics()["judge/requests"] == 1


async def test_a_request_that_the_engine_fails_is_counted_and_passed_on():
    judge = EngineJudge()
    judge.bind(LetterEngine("", fault=WorldError("vLLM failed a request")), letter_chat())
    with pytest.raises(WorldError, match="vLLM failed"):
        await judge.ask(request())
    assert judge.take_metrics()["judge/failures"] == 1


def test_a_reasoning_effort_without_effect_is_refused():
    with pytest.raises(UserError, match="reasoning_effort"):
        CachedJudge(EngineJudge(), 1).check(JudgeSampling(reasoning_effort="low"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("has_answered", [False, True])
async def test_no_redirect_takes_the_prompt_to_another_host(connect, status, has_answered):
    async with judge_server() as elsewhere:
        location = f"http://localhost:{elsewhere.port}/v1/chat/completions"

        async def behave(call: Call) -> web.StreamResponse:
            if has_answered and call.number == 0:
                return await call.answer()
            return web.Response(status=status, headers={"Location": location})

        async with judge_server(behave) as server:
            judge = connect(server)
            if has_answered:
                await judge.ask(request())
            with pytest.raises(
                WorldError if has_answered else UserError, match=r"redirects to .*, which is not followed"
            ):
                await judge.ask(request("secret"))
    assert elsewhere.payloads == []


@pytest.mark.parametrize("form", ["chunked", "length", "events", "gzip"])
@pytest.mark.parametrize("status", [200, 400])
async def test_an_answer_without_a_bound_is_not_read(connect, form, status):
    async def behave(call: Call) -> web.StreamResponse:
        if form == "gzip":
            return web.Response(
                body=gzip.compress(b"x" * 50_000_000), status=status, headers={"Content-Encoding": "gzip"}
            )
        return await call.huge(form)

    async with judge_server(behave) as server:
        with pytest.raises(WorldError, match=r"too large|compressed"):
            await connect(server, max_retries=0, timeout_s=300).ask(request())
    assert server.bytes_written < 30_000_000


async def test_a_judge_is_asked_for_plain_answers_each_on_a_connection_of_its_own(connect):
    async with judge_server() as server:
        judge = connect(server)
        await judge.ask(request("one"))
        await judge.ask(request("two"))
    asked = [(headers["Accept-Encoding"], headers["Connection"]) for headers in server.headers]
    assert asked == [("identity", "close")] * 2


@pytest.mark.parametrize(
    "usage", [[1], "many", {"total_tokens": "x"}, {"total_tokens": [1]}, {"total_tokens": float("inf")}, 7]
)
async def test_a_usage_that_is_none_is_no_chat_completion(connect, usage):
    async with judge_server(lambda call: call.answer(completion() | {"usage": usage})) as server:
        with pytest.raises(WorldError, match="no chat completion"):
            await connect(server).ask(request())


@pytest.mark.parametrize("total", [10**400, -5, 10**12])
async def test_tokens_that_no_server_can_have_counted_are_none(connect, total):
    answer = completion("half \ud800") | {"usage": {"total_tokens": total}}
    async with judge_server(lambda call: call.answer(answer)) as server:
        assert await connect(server).ask(request()) == JudgeReply(text="half ?", num_tokens=0)
