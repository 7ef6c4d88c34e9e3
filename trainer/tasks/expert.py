"""Scripted expert episodes, played in real environments as a rollout plays the model's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from envs.base import Act, Env, ExpertTurn, Thinks, World, of_env
from envs.errors import WorldError
from envs.limits.clocks import blocking_limit, time_limit
from envs.tools import Tool, call_tool, cut_output
from envs.types import Message, Task, ToolCall, ToolResult, Turn
from envs.users import Exchange, ScriptUsers, Users, hear
from trainer.config import RolloutConfig
from trainer.seeds import derive_seed
from trainer.tasks.offer import tools_offered
from trainer.types import Demonstration, LiveRollouts


@dataclass(slots=True)
class _Play:
    """An expert's episode in the making."""

    env: Env
    task: Task
    rollout: RolloutConfig
    users: Users | None
    messages: list[Message]
    turns: list[Turn] = field(default_factory=list)
    tools: dict[str, Tool] = field(default_factory=dict)
    earlier: list[Demonstration] = field(default_factory=list)
    start: int = 0
    """The first message under the tools that are offered now."""
    num_calls: int = 0

    def look_at_tools(self) -> None:
        tools = tools_offered(self.task, self._of_env("tools"), self.rollout)
        if self.turns and _schemas(tools) != _schemas(self.tools):
            self.earlier.append(self.shown())
            self.start = len(self.messages)
        self.tools = tools

    def shown(self) -> Demonstration:
        return Demonstration(
            messages=tuple(self.messages),
            tools=_schemas(self.tools),
            untrained=frozenset(range(len(self.task.messages), self.start)),
        )

    def _of_env(self, member: Literal["tools", "observation", "is_over"]) -> Any:
        return of_env(self.env, member, limit_s=self.rollout.episode_timeout_s)

    async def call(self, turn: Sequence[tuple[str, Mapping[str, object]]], reasoning: str) -> None:
        calls = tuple(
            ToolCall(call_id=f"call{self.num_calls + i:05d}", name=name, arguments=json.dumps(dict(arguments)))
            for i, (name, arguments) in enumerate(turn)
        )
        message = Message(role="assistant", reasoning=reasoning, tool_calls=calls)
        self.messages.append(message)
        self.num_calls += len(calls)
        if self.rollout.answer == "tool_calls":
            self.turns.append(Turn(message=message))
            return
        results = tuple([await self._run(call) for call in calls])
        self.messages += [Message(role="tool", content=r.output, call_id=r.call_id, name=r.name) for r in results]
        self.turns.append(Turn(message=message, results=results))

    async def _run(self, call: ToolCall) -> ToolResult:
        result = await call_tool(self.tools, call, timeout_s=self.rollout.tool_timeout_s)
        return replace(result, output=cut_output(result.output, self.rollout.max_tool_output_chars))

    async def say(self, text: str, reasoning: str) -> None:
        self.messages.append(Message(role="assistant", reasoning=reasoning, content=text))
        self.turns.append(Turn(message=self.messages[-1]))

    async def is_answered(self, rollout_id: str, seed: int) -> bool:
        """Whether the user goes on after what was said to them."""
        num_replies = sum(turn.reply is not None for turn in self.turns)
        exchange = Exchange(
            task=self.task,
            rollout_id=rollout_id,
            messages=tuple(self.messages),
            turns=tuple(self.turns),
            seed=derive_seed(seed, "user", num_replies),
        )
        reply = await hear(self.env, self.users, exchange)
        if reply is None:
            return False
        self.messages.append(Message(role="user", content=reply))
        self.turns[-1] = replace(self.turns[-1], reply=reply)
        return True

    async def all(self, turns: Sequence[ExpertTurn], rollout_id: str, seed: int) -> None:
        """Open the environment and do what there is to do, until one of the ends."""
        await self.env.open(self.task, rollout_id)
        if observation := self._of_env("observation"):
            self.messages[-1] = replace(self.messages[-1], content=self.messages[-1].content + observation)
        for number, turn in enumerate(turns, start=1):
            self.look_at_tools()
            reasoning, act = parts_of(turn)
            if isinstance(act, str):
                await self.say(act, reasoning)
            else:
                await self.call(act, reasoning)
            if number == len(turns) or self._of_env("is_over"):
                return
            if not isinstance(act, str) and self.rollout.answer == "tool_calls":
                return
            if isinstance(act, str) and not await self.is_answered(rollout_id, seed):
                return


def expert_turns(world: World, task: Task, seed: int, *, limit_s: float) -> Sequence[ExpertTurn]:
    """The world's. Raises `WorldError` where it is not done in time."""
    with blocking_limit(limit_s, "expert_episode"):
        return world.expert_episode(task, seed)


async def play_expert(
    task: Task,
    turns: Sequence[ExpertTurn],
    *,
    world: World,
    users: Users | None = None,
    rollout: RolloutConfig | None = None,
    rollout_id: str | None = None,
    live: LiveRollouts | None = None,
    seed: int = 0,
) -> Demonstration:
    """Play the scripted turns in a real environment. Without turns there is only the prompt, and none is opened.

    `rollout_id` is what the environment goes by, which two at a time may not have alike; `seed` is the user's.

    As in a rollout, a turn of text is said to the user, whose reply goes on with the episode; the tools are looked at
    before every turn. The demonstration ends where the turns do, or earlier: where the user has no more to say, the
    environment is over or the calls are the answer. Users that are models can't be asked before the run has its engine
    and event loop: to them a text is the end. What the world fails at, or does not do within a rollout's limits, is
    played again, as a rollout is; raises `WorldError` where that helps nothing.
    """
    rollout, name = rollout or RolloutConfig(), rollout_id or f"expert-{task.task_id}"
    limit_s = rollout.episode_timeout_s
    for attempt in itertools.count():
        try:
            with blocking_limit(limit_s, "make_env"):
                env = world.make_env()
            play = _Play(
                env=env,
                task=task,
                rollout=rollout,
                users=users if isinstance(users, ScriptUsers) else None,
                messages=list(task.messages),
            )
            if not turns:
                play.look_at_tools()
                return play.shown()
            played_as = f"{name}-retry{attempt}" if attempt else name
            if live:
                live.opened(played_as)
            try:
                await _within(limit_s, play.all(turns, played_as, seed))
            finally:
                await _within(min(rollout.settle_timeout_s, limit_s), env.close(None))
                if live:
                    live.closed(played_as)
        except WorldError as e:
            if attempt == rollout.world_retries:
                raise WorldError(f"the expert's episode of task {task.task_id!r}: {e}") from e
        else:
            break
    return replace(play.shown(), earlier=tuple(play.earlier))


async def _within(limit_s: float, work: Awaitable[None]) -> None:
    try:
        async with time_limit(limit_s) as limit:
            await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise WorldError(f"its environment was not done within {limit_s:g} s") from None


def parts_of(turn: ExpertTurn) -> tuple[str, Act]:
    """Its reasoning, empty where there is none, and what it does."""
    return (turn.reasoning, turn.then) if isinstance(turn, Thinks) else ("", turn)


def _schemas(tools: Mapping[str, Tool]) -> tuple[Mapping[str, Any], ...]:
    return tuple(t.schema() for t in tools.values())
