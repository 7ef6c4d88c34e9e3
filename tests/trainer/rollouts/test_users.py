"""Simulated users: functions, servers and models; what they are asked and what becomes of what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from envs.clients.http import HttpLimits
from envs.custom.world import CustomEnvConfig, CustomWorld
from envs.errors import UserError, WorldError
from envs.remote.config import RemoteConfig
from envs.types import Message, StopReason, Task, Turn
from envs.users import Exchange, ScriptUserConfig, ScriptUsers, UrlUserConfig, UrlUsers, Users, hear
from graders.hosted.view import hosted_sample
from tests.support.episodes import TASK, LengthGrader, note
from tests.support.episodes import World as PlainWorld
from tests.support.scripted_engine import BROKEN_CALL, Writer, call
from tests.support.servers import completion, scripted_judge
from tests.support.template_play import DIALECTS, TOY_TEMPLATE
from tests.trainer.rollouts.test_episodes import Talks
from trainer.config import RolloutConfig, RunConfig
from trainer.engines.base_judge import EngineJudge
from trainer.prepare import prepare
from trainer.rollouts.live import NotMade
from trainer.rollouts.model_users import ModelUsers, build_users
from trainer.rollouts.worker import RolloutWorker
from trainer.seeds import derive_seed
from trainer.templates.chat import Chat
from trainer.types import Rollout, RolloutRequest

SHOPPER = Task(
    task_id="t",
    messages=(
        Message(role="system", content="You sell mugs."),
        Message(role="user", content="Hello."),
    ),
    item={"wish": "a red mug"},
)
PROMPT = "You want {{ item.wish }}. Say ###STOP### when you have it."


@pytest.fixture(scope="session")
def chat(smollm2: Path) -> Chat:
    return Chat(smollm2)


async def play(chat: Chat, turns: list[str], users: Users, **settings: Any) -> tuple[Rollout, Writer]:
    engine = Writer(chat, turns)
    worker = RolloutWorker(
        world=PlainWorld({"note": note}),
        grader=LengthGrader(),
        chat=chat,
        engine=engine,
        config=RolloutConfig(max_turn_tokens=64, max_episode_tokens=900, world_retries=0, **settings),
        users=users,
    )
    (rollout,) = await worker.run([RolloutRequest(task=SHOPPER, rollout_id="r0", seed=3)], temperature=1.0)
    return rollout, engine


def said(*turns: Turn, prompt: tuple[Message, ...] = SHOPPER.messages) -> Exchange:
    messages = [*prompt]
    for turn in turns:
        messages.append(turn.message)
        if turn.reply is not None:
            messages.append(Message(role="user", content=turn.reply))
    task = Task(task_id="t", messages=prompt, item=SHOPPER.item)
    return Exchange(task=task, rollout_id="r0", messages=tuple(messages), turns=turns, seed=7)


def turn(text: str, reply: str | None = None, **more: Any) -> Turn:
    return Turn(message=Message(role="assistant", content=text), reply=reply, **more)


# --- what a user hears


def test_a_user_hears_what_is_said_aloud_and_nothing_else() -> None:
    calls = Turn(message=call_message(), reply=None)
    exchange = said(turn("Which colour?", "Red."), calls, turn("<tool_call>oops", malformed=True), turn("One moment."))
    assert exchange.spoken() == [
        ("user", "Hello."),
        ("assistant", "Which colour?"),
        ("user", "Red."),
        ("assistant", "One moment."),
    ]
    assert exchange.num_replies == 1


def call_message() -> Message:
    from envs.types import ToolCall

    return Message(role="assistant", content="I look.", tool_calls=(ToolCall(call_id="c", name="f", arguments="{}"),))


# --- functions


def script(tmp_path: Path, text: str) -> ScriptUsers:
    path = tmp_path / "my_user.py"
    path.write_text(text)
    return ScriptUsers(ScriptUserConfig(type="script", target=f"{path}:reply"))


async def test_a_function_plays_the_user_and_gets_what_it_names(chat: Chat, tmp_path: Path) -> None:
    users = script(
        tmp_path,
        "def reply(message, messages, item, num_replies, seed, trace_id):\n"
        "    assert messages[-1]['content'] == message and messages[0]['role'] == 'system'\n"
        "    return None if num_replies == 2 else f'{trace_id}: {item[\"wish\"]} {num_replies} {seed}'\n",
    )
    rollout, engine = await play(chat, ["Yes?", BROKEN_CALL, call("note", text="x"), "Noted.", "Bye."], users)
    episode = rollout.episode
    assert episode.stop_reason is StopReason.ANSWERED and episode.answer == "Bye."
    assert [t.reply for t in episode.turns if t.reply] == [
        f"r0: a red mug {n} {derive_seed(3, 'user', n)}" for n in range(2)
    ]
    assert episode.turns[0].reply_s > 0
    assert "r0: a red mug 1" in chat.decode(engine.requests[-1][0])


async def test_a_function_may_be_async_and_its_bugs_stop_the_run(chat: Chat, tmp_path: Path) -> None:
    users = script(tmp_path, "async def reply(message, **others):\n    return {}[message]\n")
    with pytest.raises(KeyError):
        await play(chat, ["Yes?"], users)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def reply(message, /): ...", "parameter 'message' is given by its name; expected none before a /"),
        ("def reply(message, mood): ...", "'mood' can't be given; a user may ask for message, messages, item"),
        ("class reply: ...", "expected a function, got type"),
        ("reply = 3", "expected a function, got int"),
        ("def answer(): ...", "has no 'reply'"),
    ],
)
def test_a_function_that_cannot_be_the_user_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=r"^world\.user\.target") as caught:
        script(tmp_path, text)
    assert told in str(caught.value)


# --- servers


@contextmanager
def server(answer: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []

    async def respond(request: web.Request) -> web.Response:
        asked.append(await request.json())
        given = answer(asked[-1])
        return given if isinstance(given, web.Response) else web.json_response(given)

    with scripted_judge(respond) as url:
        yield f"{url}/chat/completions", asked


async def by_url(url: str, *exchanges: Exchange) -> list[str | None]:
    users = UrlUsers(UrlUserConfig(type="url", url=url), limits=HttpLimits(timeout_s=5, max_retries=1, backoff_s=0.01))
    try:
        return [await users.reply(exchange) for exchange in exchanges]
    finally:
        assert users.take_metrics()["user/requests"] > 0
        await users.aclose()


async def test_a_server_plays_the_user() -> None:
    with server(lambda request: {"content": "Red." if request["message"] == "Which?" else None}) as (url, asked):
        assert await by_url(url, said(turn("Which?")), said(turn("Which?", "Red."), turn("Here."))) == ["Red.", None]
    assert asked[0] == {
        "type": "rollout.respond",
        "trace_id": "r0",
        "item": {"wish": "a red mug"},
        "message": "Which?",
        "messages": [
            {"role": "system", "content": "You sell mugs."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Which?"},
        ],
    }


@pytest.mark.parametrize(
    "answer", [{"text": "Red."}, {"content": 3}, ["Red."], web.Response(status=503), web.Response(status=404)]
)
async def test_a_server_that_gives_no_reply_is_the_worlds_fault(answer: Any) -> None:
    again = [answer.status if isinstance(answer, web.Response) else answer]

    def give(request: dict[str, Any]) -> Any:
        return web.Response(status=again[0], text="no") if isinstance(again[0], int) else again[0]

    with server(give) as (url, asked), pytest.raises(WorldError):
        await by_url(url, said(turn("Which?")))
    assert len(asked) == (1 if again[0] == 404 else 2)


# --- models


@contextmanager
def model(*texts: str) -> Iterator[tuple[ModelUsers, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    left = list(texts)

    async def answer(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return completion("shopper", left.pop(0))

    with scripted_judge(answer) as url:
        user = {"type": "model", "base_url": url, "model": "shopper", "prompt": PROMPT, "max_tokens": 40}
        users = build_users(RemoteConfig.model_validate({"user": user}))
        assert isinstance(users, ModelUsers)
        yield users, asked


async def test_a_model_plays_the_user_until_it_says_the_stop_word(chat: Chat) -> None:
    with model("Red, please.", "Thanks. ###STOP###") as (users, asked):
        rollout, _ = await play(chat, ["Which colour?", "Here is your red mug."], users)
        metrics = users.take_metrics()
        await users.aclose()
    assert rollout.episode.answer == "Here is your red mug."
    assert [t.reply for t in rollout.episode.turns] == ["Red, please.", None]
    assert asked[1]["messages"] == [
        {"role": "system", "content": "You want a red mug. Say ###STOP### when you have it."},
        {"role": "user", "content": "Hello. What can I do for you?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Red, please."},
        {"role": "user", "content": "Here is your red mug."},
    ]
    assert [a["seed"] for a in asked] == [derive_seed(3, "user", 0), derive_seed(3, "user", 1)]
    assert asked[0]["max_completion_tokens"] == 40 and "response_format" not in asked[0]
    assert metrics["user/requests"] == 2 and metrics["user/tokens"] == 84


async def test_a_model_that_says_nothing_loses_the_rollout_to_the_world(chat: Chat) -> None:
    with model("") as (users, _):
        rollout, _ = await play(chat, ["Which colour?"], users)
        await users.aclose()
    assert rollout.episode.stop_reason is StopReason.WORLD_FAULT and rollout.grade is None
    assert rollout.episode.error == "the simulated user said nothing"


def test_the_roles_of_what_a_model_user_is_shown_alternate() -> None:
    from trainer.rollouts.model_users import _turned

    prompt = (Message(role="user", content="a"), Message(role="user", content="b"))
    shown = _turned(said(turn("c"), prompt=prompt))
    assert [m["role"] for m in shown] == ["user", "assistant", "user"] and shown[1]["content"] == "a\n\nb"
    prompt = (Message(role="assistant", content="Welcome."), Message(role="user", content="a"))
    shown = _turned(said(turn("c"), prompt=prompt))
    assert [(m["role"], m["content"]) for m in shown] == [("user", "Welcome."), ("assistant", "a"), ("user", "c")]


def test_a_prompt_that_asks_for_what_the_user_cannot_know_is_named() -> None:
    config = {"type": "model", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    with pytest.raises(UserError, match=r"world\.user\.prompt: sample\.output_text is not known to the user"):
        build_users(RemoteConfig.model_validate({"user": config | {"prompt": "{{ sample.output_text }}"}}))
    users = build_users(RemoteConfig.model_validate({"user": config | {"prompt": "{{ item.mood }}"}}))
    assert isinstance(users, ModelUsers)
    with pytest.raises(UserError, match=r"world\.user\.prompt: task t has no \{\{ item\.mood \}\}"):
        users.check(SHOPPER)


async def test_the_runs_own_base_model_plays_the_user_without_its_reasoning(smollm2: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TOY_TEMPLATE.replace("CALL_FORMAT", DIALECTS["hermes"]))
    chat = Chat(smollm2, chat_template=str(template), reasoning_parser="qwen3")

    class Base:
        async def generate_base(self, prompt_ids: Any, **sampling: Any) -> list[int]:
            self.prompt, self.sampling = chat.decode(prompt_ids), sampling
            return [*chat._encode("<think>\nI want it red.\n</think>\n\nRed, please."), chat._answer_end.token_id]

    user = {"type": "engine", "prompt": PROMPT, "temperature": 0.5}
    users = build_users(RemoteConfig.model_validate({"user": user}))
    assert isinstance(users, ModelUsers) and isinstance(users.engine, EngineJudge)
    base = Base()
    users.engine.bind(base, chat)
    assert await users.reply(said(turn("Which colour?"))) == "Red, please."
    assert base.prompt.index("You want a red mug.") < base.prompt.index("Which colour?")
    assert base.sampling == {"max_tokens": 256, "temperature": 0.5, "top_p": 1.0, "seed": 7, "schema": None}


# --- the config


def config(tmp_path: Path, world: dict[str, Any], **more: Any) -> RunConfig:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}], "answer": "1"}))
    data = {"train": tmp_path / "rows.jsonl", "eval": tmp_path / "rows.jsonl"}
    base = {"output_dir": tmp_path / "run", "grader": {"type": "exact"}, "data": data}
    return RunConfig.model_validate(base | {"world": world} | more)


def test_the_base_model_can_be_the_user_only_beside_an_adapter(tmp_path: Path) -> None:
    world = {"user": {"type": "engine", "prompt": "Buy."}}
    with pytest.raises(ValueError, match=r"world\.user: engine needs the base model beside the adapter"):
        config(tmp_path, world, engine={"publish": "merged"})


def test_two_users_of_one_episode_are_refused_and_keys_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text("def reply(message): ...\n")
    user = {"type": "script", "target": f"{tmp_path / 'users.py'}:reply"}
    with pytest.raises(UserError, match=r"world\.user: the environment has a user of its own"):
        prepare(config(tmp_path, {"type": "custom", "target": f"{__file__}:Talker", "user": user}))
    asks = {"type": "model", "base_url": "http://127.0.0.1:1/v1", "model": "m", "prompt": "{{ item.mood }}"}
    with pytest.raises(UserError, match=r"task row-1 has no \{\{ item\.mood \}\}"):
        prepare(config(tmp_path, {"user": asks}))


class Talker(Talks):
    async def open(self, task: Task, rollout_id: str) -> None: ...

    async def close(self, episode: object) -> None: ...


# --- TRL-style classes


class Bartender:
    """Talks, keeps a tab, and closes the bar."""

    def __init__(self) -> None:
        self.tab: list[str] = []
        self.done = False

    def reset(self, **row: object) -> None: ...

    def pour(self, drink: str) -> str:
        """Pour a drink.

        Args:
            drink: which
        """
        self.tab.append(drink)
        self.done = len(self.tab) == 2
        return "poured"

    def respond(self, message: str) -> str | None:
        return "Another." if "?" in message else None

    def final_state(self) -> dict[str, Any]:
        return {"tab": self.tab}


class Parrot:
    """A tool that happens to be called respond."""

    def reset(self) -> None: ...

    def respond(self, words: str) -> str:
        """Say it to the user.

        Args:
            words: what
        """
        return words


async def of_trl(chat: Chat, name: str, turns: list[str]) -> Rollout:
    world = CustomWorld(CustomEnvConfig(type="custom", target=f"{__file__}:{name}"))
    config = RolloutConfig(max_turn_tokens=64, max_episode_tokens=900)
    worker = RolloutWorker(world=world, grader=LengthGrader(), chat=chat, engine=Writer(chat, turns), config=config)
    (rollout,) = await worker.run([RolloutRequest(task=TASK, rollout_id="r", seed=0)], temperature=1.0)
    return rollout


async def test_a_trl_style_class_may_have_a_user_an_end_and_a_state(chat: Chat) -> None:
    rollout = await of_trl(chat, "Bartender", [call("pour", drink="tea"), "Anything else?", "Here.", "never"])
    assert rollout.episode.stop_reason is StopReason.ANSWERED and rollout.episode.answer == "Here."
    assert [t.reply for t in rollout.episode.turns] == [None, "Another.", None]
    assert hosted_sample(rollout.episode)["state"] == {"tab": ["tea"]}
    rollout = await of_trl(chat, "Bartender", [call("pour", drink="tea"), call("pour", drink="ale"), "never"])
    assert rollout.episode.stop_reason is StopReason.ENDED
    assert hosted_sample(rollout.episode)["state"] == {"tab": ["tea", "ale"]}


async def test_a_method_called_respond_that_takes_no_message_stays_a_tool(chat: Chat) -> None:
    rollout = await of_trl(chat, "Parrot", [call("respond", words="hi"), "42"])
    assert rollout.episode.turns[0].results[0].output == "hi" and rollout.episode.answer == "42"


@pytest.mark.parametrize(("num_chars", "is_heard"), [(100_000, True), (100_001, False)])
async def test_a_reply_that_no_episode_could_hold_is_the_worlds_fault(num_chars: int, is_heard: bool) -> None:
    class Talkative:
        async def reply(self, exchange: Exchange) -> str | None:
            return "x" * num_chars

    task = Task(task_id="t", messages=(Message(role="user", content="Go on."),))
    said = (*task.messages, Message(role="assistant", content="What then?"))
    exchange = Exchange(task=task, rollout_id="r", messages=said, turns=(), seed=0)
    if is_heard:
        assert await hear(NotMade(), Talkative(), exchange) == "x" * num_chars
    else:
        with pytest.raises(WorldError, match="the simulated user said 100,001 characters"):
            await hear(NotMade(), Talkative(), exchange)
