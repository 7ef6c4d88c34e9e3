"""What graders see of an episode: the hosted service's `sample` and `item`.

The hosted keys speak of one answer, where an episode has many turns:

    output_text               the final answer; "" where the episode ended without one, whatever its last turn says
    output_json               the answer parsed, where it is a JSON object or list; None otherwise
    output_tools              the tool calls of the last assistant message that made any: that is where a grader written
                              for one turn looks for them; `tool_calls` has all
    choices                   the last assistant message, as the model wrote it
    output_reasoning_summary  the reasoning of all turns, a blank line between them

The other keys are ours; they carry the whole episode.
"""

from __future__ import annotations

import functools
from typing import Any

from envs.reading.json_text import read_json
from envs.types import Episode, Message, StopReason, Task, Turn
from graders.answers import final_answer

SAMPLE_KEYS = (
    "output_text",
    "output_json",
    "output_tools",
    "choices",
    "output_reasoning_summary",
    "messages",
    "tool_calls",
    "state",
    "stop_reason",
    "num_tokens",
    "num_reasoning_tokens",
    "num_tool_calls",
    "num_invalid_calls",
    "num_turns",
    "latency_s",
    "rollout_id",
    "trace_id",
)
"""The keys of every sample."""

_CUT_OFF = (StopReason.MAX_TURN_TOKENS, StopReason.MAX_EPISODE_TOKENS)
_NO_TURN = Message(role="assistant")


# The graders inside a `multi` ask for the same episode one after the other.
@functools.lru_cache(maxsize=64)
def hosted_sample(episode: Episode) -> dict[str, Any]:
    """The episode as JSON values, under `SAMPLE_KEYS`. Shared by all who ask for this episode: do not change it.

    Raises `ValueError` for an episode that the world broke off.
    """
    text = final_answer(episode) or ""
    last = episode.turns[-1].message if episode.turns else _NO_TURN
    callers = [turn.message for turn in episode.turns if turn.message.tool_calls]
    finish_reason = "length" if episode.stop_reason in _CUT_OFF else "tool_calls" if last.tool_calls else "stop"
    choice = {"role": "assistant", "content": last.content, "tool_calls": _hosted_calls(last)}
    return {
        "output_text": text,
        "output_json": _parsed(text),
        "output_tools": _hosted_calls(callers[-1]) if callers else [],
        "choices": [{"index": 0, "message": choice, "finish_reason": finish_reason}],
        "output_reasoning_summary": "\n\n".join(t.message.reasoning for t in episode.turns if t.message.reasoning),
        "messages": [message.to_openai() for message in episode.messages],
        "tool_calls": [call for number, turn in enumerate(episode.turns) for call in _calls_of(turn, number)],
        "state": dict(episode.state),
        "stop_reason": episode.stop_reason.value,
        "num_tokens": episode.num_tokens,
        "num_reasoning_tokens": episode.num_reasoning_tokens,
        "num_tool_calls": episode.num_tool_calls,
        "num_invalid_calls": episode.num_invalid_calls,
        "num_turns": len(episode.turns),
        "latency_s": episode.latency_s,
        "rollout_id": episode.rollout_id,
        "trace_id": episode.rollout_id,
    }


def item_of(task: Task) -> dict[str, Any]:
    """The whole row, as the hosted service hands it to graders: its data, `messages`, and `tools` where it has any."""
    return {**_prompt_of(task), **task.item}


def own_data(task: Task) -> dict[str, Any]:
    """The item without what stands in the task's own `messages` and `definitions` already; `item_of` adds it again."""
    known = _prompt_of(task)
    return {key: value for key, value in task.item.items() if key not in known or value != known[key]}


def _prompt_of(task: Task) -> dict[str, Any]:
    prompt = {"messages": [m.to_openai() for m in task.messages], "tools": list(task.definitions.values())}
    return {key: value for key, value in prompt.items() if value}


def _hosted_calls(message: Message) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = message.to_openai().get("tool_calls", [])
    return calls


def _calls_of(turn: Turn, number: int) -> list[dict[str, Any]]:
    """Calls that had not come back when the episode ended have `output` None."""
    results = {result.call_id: result for result in turn.results}
    return [
        {
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "output": result.output if (result := results.get(call.call_id)) else None,
            "error": result.error.value if result and result.error else None,
            "latency_s": result.latency_s if result else 0.0,
            "turn": number,
        }
        for call in turn.message.tool_calls
    ]


def _parsed(text: str) -> dict[str, Any] | list[Any] | None:
    try:
        value = read_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None
