"""One tool call by the hosted protocol, and how its answer reads to the model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from envs.clients.http import HttpCaller, HttpReply, RequestTooLarge
from envs.errors import ToolError
from envs.secrets import not_kept
from envs.tools import Tool
from envs.types import ToolCall

_MAX_ERROR_CHARS = 500


def remote_tool(name: str, function: Callable[[ToolCall], Awaitable[str]]) -> Tool:
    """A tool whose description and schema are not known yet: each row brings them (see `envs.tools.offered_tools`)."""
    return Tool(
        name=name, description="", function=function, parameters={}, read_arguments=_read_arguments, is_remote=True
    )


async def call_remote(caller: HttpCaller, call: ToolCall, *, trace_id: str, item: Mapping[str, Any]) -> str:
    """Post the call; the text that the model is shown.

    Raises `ToolError` for what the model should know (a 4xx, a request or answer above the size limit), `WorldError`
    when the server failed for good. An answer of status 200 that holds no `output`, or the `call_id` of another call,
    is the server's fault and retried.
    """
    request = {
        "type": "function_call",
        "id": _function_call_id(trace_id, call.call_id),
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
        "trace_id": trace_id,
        "item": item,
    }
    try:
        reply = await caller.post(request, check=functools.partial(_check, call.call_id))
    except RequestTooLarge as e:
        raise ToolError(f"{call.name}: {e}") from None
    if reply.too_large:
        raise ToolError(f"{call.name}: the answer is too large to be shown; ask for less")
    try:
        return _output(reply)
    except ValueError:
        text = not_kept(reply.text)[:_MAX_ERROR_CHARS].strip()
        raise ToolError(f"{call.name}: HTTP {reply.status}{f': {text}' if text else ''}") from None


def _check(call_id: str, reply: HttpReply) -> None:
    if reply.status >= 400:
        return
    _output(reply)
    # Left out, it says nothing; another call's is a mix-up of the server's, or of a proxy before it.
    answered = reply.json().get("call_id") or call_id
    if answered != call_id:
        raise ValueError(f"HTTP {reply.status}, but for the call {str(answered)[:60]!r} instead of {call_id!r}")


def _output(reply: HttpReply) -> str:
    """The answer's `output`; `ValueError` where it has none."""
    answer = reply.json()
    if not isinstance(answer, dict) or "output" not in answer:
        raise ValueError(f"HTTP {reply.status}, but no JSON object with the key `output`: {reply.text[:100]!r}")
    output = answer["output"]
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    # Half of a surrogate pair is legal JSON, but no tokenizer takes it.
    return not_kept(text).encode("utf-8", "replace").decode()


def _function_call_id(trace_id: str, call_id: str) -> str:
    """The same over retries, so that a server can tell a repeated request from a new one."""
    return "fc_" + hashlib.blake2b(f"{trace_id}\x1f{call_id}".encode("utf-8", "replace"), digest_size=12).hexdigest()


def _read_arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("arguments: Input should be an object")
    return value
