"""Simulated users: who answers what the model says to them, where the environment has no user of its own.

    world:
      type: remote
      user: {type: script, target: "my_user.py:reply"}

The user hears the turns without calls, and what they say is appended as another user message; None makes the turn the
final answer. Users by URL and by function are here; those that are models are `trainer.rollouts.model_users`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from envs.base import Env, of_env
from envs.clients.http import HttpCaller, HttpLimits, HttpReply, RequestTooLarge, resolve_headers
from envs.clients.urls import server_url
from envs.errors import UserError, WorldError
from envs.reading.variables import NAME
from envs.settings import Settings, WorldSettings
from envs.types import Message, Task, Turn
from envs.user_code import TARGET_PATTERN, accepted, call_user, load_target, required_by_name

_MAX_REPLY_CHARS = 100_000
"""More would fill the episode, whose end would be booked on the model."""


class ScriptUserConfig(Settings):
    """A Python function: text of the user's, or None at the end. It gets those of its arguments that it names."""

    type: Literal["script"]
    target: str = Field(pattern=TARGET_PATTERN, description="`package.module:name` or `path/to/file.py:name`.")


class UrlUserConfig(Settings):
    """The user's own server: POST {type: rollout.respond, trace_id, item, message, messages} → {content}."""

    type: Literal["url"]
    url: str = Field(pattern=r"^(https?://|\$\{)", description="The server's address, to which is posted.")
    headers: dict[str, str] = Field(
        default={}, description="Sent with every request; ${NAME} here and in the URL is read from the environment."
    )
    timeout_s: float = Field(default=60.0, gt=0, description="Of one attempt; there are up to four.")

    def servers(self) -> dict[str, str]:
        return {"url": self.url}


class _Spoken(Settings):
    prompt: str = Field(
        min_length=1, description="Who the user is and what they want: the system message; {{ item.KEY }} is the row's."
    )
    stop: str = Field(default="###STOP###", min_length=1, description="Said by the user, it ends the episode.")
    temperature: float = Field(default=1.0, ge=0, description="Of the sampling; 0 is greedy.")
    max_tokens: int = Field(default=256, ge=1, description="Of one reply.")


class ModelUserConfig(_Spoken):
    """A model behind a server that speaks Chat Completions."""

    type: Literal["model"]
    base_url: str = Field(
        default="https://api.openai.com/v1",
        pattern=r"^(https?://|\$\{)",
        description="With /v1; ${NAME} in it is read from the environment.",
    )
    model: str = Field(min_length=1, description="Its name at the server.")
    api_key_env: str = Field(default="OPENAI_API_KEY", pattern=NAME, description="The environment variable of the key.")
    max_concurrency: int = Field(default=32, ge=1, description="Requests in flight.")
    timeout_s: float = Field(default=120.0, gt=0, description="Of one request.")
    max_retries: int = Field(default=3, ge=0, description="Further attempts at a request that failed.")

    def servers(self) -> dict[str, str]:
        return {"base_url": self.base_url}


class EngineUserConfig(_Spoken):
    """The run's own base model, with the adapter off."""

    type: Literal["engine"]


UserConfig = Annotated[
    ScriptUserConfig | UrlUserConfig | ModelUserConfig | EngineUserConfig, Field(discriminator="type")
]


@runtime_checkable
class TakesUser(Protocol):
    """Settings of a world that may be given a simulated user."""

    @property
    def user(self) -> UserConfig | None: ...


def user_of(world: WorldSettings) -> UserConfig | None:
    """The simulated user that a world's settings ask for."""
    return world.user if isinstance(world, TakesUser) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """An episode at a turn that a user is to answer."""

    task: Task
    rollout_id: str
    messages: tuple[Message, ...]
    """Everything so far; the last is what the model says to the user."""
    turns: tuple[Turn, ...]
    """The last has no reply yet."""
    seed: int
    """This reply's, derived from the rollout's."""

    @property
    def num_replies(self) -> int:
        return sum(turn.reply is not None for turn in self.turns)

    def spoken(self) -> list[tuple[Literal["user", "assistant"], str]]:
        """What user and model said to each other: no system message, no calls and results, no malformed turn."""
        prompt = self.messages[: len(self.task.messages)]
        said = [(m.role, m.content) for m in prompt if m.content and not m.tool_calls]
        for turn in self.turns:
            if not turn.message.tool_calls and not turn.malformed:
                said.append(("assistant", turn.message.content))
            if turn.reply is not None:
                said.append(("user", turn.reply))
        return [(role, text) for role, text in said if role == "user" or role == "assistant"]


class Users(Protocol):
    """Plays the user of every rollout. It may also be what `envs.base` describes as `Checks`, `Counts`, `Closes`."""

    async def reply(self, exchange: Exchange) -> str | None:
        """The user's next words; None where they have no more to say. Raises `WorldError` where they can't be had."""
        ...


async def hear(env: Env, users: Users | None, exchange: Exchange) -> str | None:
    """What the run's users say, or else the environment's own; None where there is nobody or nothing more to say.

    Raises `WorldError` for a reply that no episode could hold.
    """
    if users is not None:
        reply = await users.reply(exchange)
    elif (respond := of_env(env, "respond")) is not None:
        reply = await respond(exchange.messages[-1])
    else:
        return None
    if reply is not None and not isinstance(reply, str):
        raise TypeError(f"the simulated user gave {type(reply).__name__}; expected the user's words, or None")
    if reply is not None and len(reply) > _MAX_REPLY_CHARS:
        raise WorldError(f"the simulated user said {len(reply):,} characters; at most {_MAX_REPLY_CHARS:,} are heard")
    # Half of a surrogate pair, which JSON can smuggle in, no tokenizer takes.
    return None if reply is None else reply.encode("utf-8", "replace").decode()


class ScriptUsers:
    """A function of the user's own; sync code runs in a thread. Its errors are bugs and stop the run, `WorldError` not.

    It may name: `message` (the text said to it), `messages` (Chat Completions JSON of the whole episode), `item`,
    `num_replies`, `seed`, `trace_id`.
    """

    def __init__(self, config: ScriptUserConfig) -> None:
        """Raises `UserError` for a target that can't be loaded, is no function or wants what there is not."""
        where = f"world.user.target {config.target!r}"
        self._function = load_target(config.target, key="world.user.target")
        if not callable(self._function) or isinstance(self._function, type):
            raise UserError(f"{where}: expected a function, got {type(self._function).__name__}")
        known = ("message", "messages", "item", "num_replies", "seed", "trace_id")
        if unknown := [name for name in required_by_name(self._function, where) if name not in known]:
            raise UserError(f"{where}: {unknown[0]!r} can't be given; a user may ask for {', '.join(known)}")

    async def reply(self, exchange: Exchange) -> str | None:
        offered = {
            **_event(exchange),
            "num_replies": exchange.num_replies,
            "seed": exchange.seed,
        }
        reply: str | None = await call_user(self._function, **accepted(self._function, offered))
        return reply


class UrlUsers:
    """A server of the user's own. A 5xx or no answer is retried; what remains, and a 4xx, is a fault of the world."""

    def __init__(self, config: UrlUserConfig, *, limits: HttpLimits | None = None) -> None:
        self._caller = HttpCaller(
            url=server_url(config.url, "world.user.url"),
            headers=resolve_headers(config.headers, "world.user.headers"),
            limits=limits or HttpLimits(timeout_s=config.timeout_s),
        )

    async def reply(self, exchange: Exchange) -> str | None:
        try:
            answer = await self._caller.post({"type": "rollout.respond", **_event(exchange)}, check=_check)
        except RequestTooLarge as e:
            raise WorldError(f"rollout.respond: {e}") from None
        if answer.status >= 400 or answer.too_large:
            said = "the answer is too large" if answer.too_large else f"HTTP {answer.status}: {answer.text[:200]}"
            raise WorldError(f"rollout.respond: {said.strip()}")
        return _content(answer)

    def take_metrics(self) -> dict[str, float]:
        return {f"user/{name}": value for name, value in self._caller.take_metrics().items()}

    async def aclose(self) -> None:
        await self._caller.aclose()


def _event(exchange: Exchange) -> dict[str, Any]:
    return {
        "trace_id": exchange.rollout_id,
        "item": exchange.task.item,
        "message": exchange.messages[-1].content,
        "messages": [message.to_openai() for message in exchange.messages],
    }


def _check(answer: HttpReply) -> None:
    if answer.status < 400:
        _content(answer)


def _content(answer: HttpReply) -> str | None:
    """The answer's `content`. Raises `ValueError` where it has none."""
    value = answer.json()
    content = value.get("content", 0) if isinstance(value, Mapping) else 0
    if content is not None and not isinstance(content, str):
        raise ValueError(f"expected a JSON object with `content`, text or null: {answer.text[:100]!r}")
    return content
