"""The tool calls of a turn: which are run, in what order, and what the model reads of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from envs.base import of_env
from envs.errors import first_error
from envs.tools import call_tool, cut_output
from envs.types import Message, ToolCall, ToolErrorKind, ToolResult
from trainer.config import RolloutConfig
from trainer.rollouts.live import Live
from trainer.templates.chat import Chat

OVER_BUDGET_ANSWER = "Error: the tool call budget is used up. Answer now."


class ToolCalls:
    """Runs the calls of one turn after the other, within the episode's budget."""

    def __init__(self, chat: Chat, config: RolloutConfig) -> None:
        self._chat = chat
        self._config = config

    async def results(self, live: Live, message: Message) -> list[ToolResult]:
        """The results of the calls that `message` makes, in the order called.

        Where the calls are the answer nothing is run, and only those have a result that no tool could have taken. What
        the episode waits for here stands in `live.waiting_for`, and its place at the engine is free.
        """
        if self._config.answer == "tool_calls":
            checked = [await self._run(live, call) for call in message.tool_calls]
            return [result for result in checked if result.error]
        if not message.tool_calls:
            return []
        live.place.leave()
        allowed, refused = self._within_budget(live, message)
        over, kind = OVER_BUDGET_ANSWER, ToolErrorKind.OVER_BUDGET
        done = await self._run_all(live, allowed)
        return [*done, *(ToolResult(call_id=c.call_id, name=c.name, output=over, error=kind) for c in refused)]

    def _within_budget(self, live: Live, message: Message) -> tuple[Sequence[ToolCall], Sequence[ToolCall]]:
        """The calls that are run, and those over the budget, which are not."""
        budget_left = max(0, self._config.max_tool_calls - live.num_tool_calls)
        live.num_tool_calls += len(message.tool_calls)
        allowed, refused = message.tool_calls[:budget_left], message.tool_calls[budget_left:]
        live.over_budget |= bool(refused)
        return allowed, refused

    async def _run_all(self, live: Live, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Side by side, unless the environment wants them one after the other."""
        tools = live.tools
        live.waiting_for = next((c.name for c in calls if c.name in tools and tools[c.name].is_remote), "")
        if len(calls) <= 1 or of_env(live.env, "calls_in_order"):
            done = [await self._run(live, call) for call in calls]
        else:
            # Where one call fails for good, the others must not go on in an environment that is being closed.
            async with first_error(), asyncio.TaskGroup() as group:
                running = [group.create_task(self._run(live, call)) for call in calls]
            done = [task.result() for task in running]
        live.waiting_for = ""
        return done

    async def _run(self, live: Live, call: ToolCall) -> ToolResult:
        result = await call_tool(live.tools, call, timeout_s=self._config.tool_timeout_s)
        output = cut_output(result.output, self._config.max_tool_output_chars)
        special = self._chat.special.num_in(output)
        return replace(result, output=output, num_tokens=self._chat.num_tokens(output), num_special_tokens=special)
