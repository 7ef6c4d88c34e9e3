"""Which tools the model is offered on a task, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from envs.tools import Tool, offered_tools, schema_tool
from envs.types import Task, ToolCall
from trainer.config import Answer


def tools_offered(task: Task, tools: Mapping[str, Tool], *, answer: Answer) -> dict[str, Tool]:
    """Of the tools that the environment has at the moment, those that the row names, or all.

    Where the calls are the answer no tool is run, so that the row's own definition is enough: what is offered there
    checks its arguments and does nothing. Raises `UserError` for a definition that is no schema.
    """
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
