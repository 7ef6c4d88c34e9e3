"""Which tools the model is offered on a task, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from envs.errors import UserError
from envs.tools import Tool, offered_tools, schema_tool
from envs.types import Task, ToolCall
from trainer.config import Answer, RolloutConfig
from trainer.config.response_format import schema_text


def tools_offered(task: Task, tools: Mapping[str, Tool], rollout: RolloutConfig) -> dict[str, Tool]:
    """Of the tools that the environment has at the moment, those that the row names, or all.

    Where the calls are the answer no tool is run, so that the row's own definition is enough: what is offered there
    checks its arguments and does nothing. Raises `UserError` for a definition that is no schema, and for any tool where
    answers have a form, which leaves no room for a call. (Under `vllm serve` it depends on the parser which gives way.)
    """
    offered = _offered(task, tools, rollout.answer)
    if offered and schema_text(rollout.response_format) is not None:
        raise UserError(
            f"rollout.response_format: task {task.task_id!r} offers tools ({', '.join(list(offered)[:5])}), but the "
            'form of its answers leaves no room for a call; expected tasks without tools (a row\'s "tools": []), or '
            "response_format left out"
        )
    return offered


def _offered(task: Task, tools: Mapping[str, Tool], answer: Answer) -> dict[str, Tool]:
    if answer == "text":
        return offered_tools(task, tools)
    defined = {
        name: schema_tool(definition, _do_nothing, is_remote=True)
        for name, definition in task.definitions.items()
        if name not in tools
    }
    offered = offered_tools(task, {**tools, **defined})
    return {name: replace(tool, function=_do_nothing, is_remote=True) for name, tool in offered.items()}


async def _do_nothing(call: ToolCall) -> str:
    return ""
