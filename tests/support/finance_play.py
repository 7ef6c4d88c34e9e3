"""Plays finance tasks through a world's real tools, and grades what comes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from envs.base import ExpertTurn, World
from envs.finance.world import FinanceWorld
from envs.tools import call_tool
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolResult, Turn
from graders.build import build_grader
from graders.penalties import PenaltiesConfig
from graders.rules.numeric import NumericConfig
from trainer.tasks.expert import parts_of

NUMERIC = NumericConfig(type="numeric")
GRADER = build_grader(NUMERIC, PenaltiesConfig())


def all_tasks(world: FinanceWorld) -> list[Task]:
    return [*world.tasks("train"), *world.tasks("eval")]


async def use(world: FinanceWorld, name: str, **arguments: object) -> ToolResult:
    request = ToolCall(call_id="c", name=name, arguments=json.dumps(arguments))
    return await call_tool(world.make_env().tools, request, timeout_s=10)


async def replay(world: World, task: Task, script: Sequence[ExpertTurn]) -> Episode:
    """Run scripted turns through a real environment."""
    env = world.make_env()
    await env.open(task, "r")
    turns: list[Turn] = []
    messages = list(task.messages)
    for i, (reasoning, scripted) in enumerate(map(parts_of, script)):
        if isinstance(scripted, str):
            message, results = Message(role="assistant", reasoning=reasoning, content=scripted), []
        else:
            calls = [
                ToolCall(call_id=f"{i}.{j}", name=name, arguments=json.dumps(arguments))
                for j, (name, arguments) in enumerate(scripted)
            ]
            message = Message(role="assistant", reasoning=reasoning, tool_calls=tuple(calls))
            results = await asyncio.gather(*(call_tool(env.tools, c, timeout_s=10) for c in calls))
        turns.append(Turn(message=message, results=tuple(results)))
        messages += [message, *(Message(role="tool", content=r.output, call_id=r.call_id) for r in results)]
    episode = Episode(
        rollout_id="r",
        task_id=task.task_id,
        messages=tuple(messages),
        turns=tuple(turns),
        stop_reason=StopReason.ANSWERED,
    )
    await env.close(episode)
    return episode


async def score(task: Task, answer: str) -> float:
    turn = Turn(message=Message(role="assistant", content=answer))
    episode = Episode(rollout_id="r", task_id=task.task_id, messages=(), turns=(turn,), stop_reason=StopReason.ANSWERED)
    return (await GRADER.grade(task, episode)).reward


def num_calls(script: Sequence[ExpertTurn]) -> int:
    return sum(len(act) for _, act in map(parts_of, script) if not isinstance(act, str))
