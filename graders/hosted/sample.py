"""What graders see of an episode: the hosted service's `sample` and `item`, and the way back.

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
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from envs.errors import UserError
from envs.messages import Reader, read_call, read_message
from envs.reading.json_text import read_json
from envs.types import MALFORMED_NOTES, Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
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
def sample_of(episode: Episode) -> dict[str, Any]:
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


def episode_from_sample(sample: Mapping[str, Any], *, rollout_id: str) -> Episode:
    """An episode from a sample in the hosted form; `output_text` alone suffices.

    With `messages` the trajectory is theirs: the last `num_turns` assistant messages, or those after the last user
    message where that key is missing. A user message among them answers a malformed call where it begins as such an
    answer does, and is the user's reply otherwise. Without `messages` it is made of `tool_calls` (or `output_tools`, or
    the message in `choices`, or the first of `outputs`, as exports of graded samples have it) and `output_text`. Its
    `task_id` is empty.

    Covered: `sample_of` gives the same sample again for one that it made. Not covered: tokens by turn (the totals stand
    on the last), the times of generation and of replies. Raises `UserError` naming the key for a sample that can't be
    read.
    """
    read = Reader(sample, "sample")
    messages = read.items("messages")
    if messages is not None:
        turns, everything = _turns_of_messages(read, [read_message(m) for m in messages])
    else:
        turns = _turns_of_outputs(read)
        everything = tuple(_history(turns))
    turns = [replace(turn, results=_results(turn, read)) for turn in turns]
    num_tokens, num_reasoning_tokens = int(read.number("num_tokens")), int(read.number("num_reasoning_tokens"))
    if turns:
        turns[-1] = replace(turns[-1], num_tokens=num_tokens, num_reasoning_tokens=num_reasoning_tokens)
    text, stop = read.text("output_text"), _stop_reason(read, turns)
    episode = Episode(
        rollout_id=rollout_id,
        task_id="",
        messages=everything,
        turns=tuple(turns),
        stop_reason=stop,
        state=read.inner("state").value,
        latency_s=read.number("latency_s"),
    )
    if text is not None and text.strip() != (episode.answer or ""):
        raise UserError("sample.output_text: expected the text of the last assistant message, or '' without an answer")
    return episode


def _own_call(read: Reader) -> ToolCall:
    return ToolCall(call_id=read.required("call_id"), name=read.required("name"), arguments=read.required("arguments"))


def _turns_of_messages(read: Reader, messages: list[Message]) -> tuple[list[Turn], tuple[Message, ...]]:
    places = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if read.get("num_turns", int, "a whole number") is not None:
        num_turns = int(read.number("num_turns"))
        if num_turns > len(places):
            raise UserError(f"sample.num_turns: expected at most the {len(places)} assistant messages of messages")
        places = places[len(places) - num_turns :]
    else:
        last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        places = [i for i in places if i > last_user]
    turns: list[Turn] = []
    for place, end in itertools.pairwise([*places, len(messages)]):
        answers = messages[place + 1 : end]
        results = tuple(
            ToolResult(call_id=m.call_id, name=m.name, output=m.content) for m in answers if m.role == "tool"
        )
        said = next((m.content for m in answers if m.role == "user"), None)
        malformed = said is not None and said.startswith(MALFORMED_NOTES)
        reply = None if malformed else said
        turns.append(Turn(message=messages[place], results=results, malformed=malformed, reply=reply))
    return turns, tuple(messages)


def _turns_of_outputs(read: Reader) -> list[Turn]:
    choices, exported = read.items("choices"), read.items("outputs") or read.items("output")
    message = read_message(choices[0].inner("message")) if choices else None
    if message is None and exported:
        message = read_message(Reader({"role": "assistant", **exported[0].value}, exported[0].where))
    text = read.text("output_text")
    if text is None and message is None:
        raise UserError("sample.output_text: expected text; without it, messages, choices or outputs are needed")
    if text is None:
        assert message is not None
        text = message.content
    reasoning = read.text("output_reasoning_summary") or ""
    own = read.items("tool_calls")
    if own is None:
        hosted = read.items("output_tools")
        calls = tuple(read_call(c) for c in hosted) if hosted is not None else message.tool_calls if message else ()
        return [Turn(message=Message(role="assistant", content=text, reasoning=reasoning, tool_calls=calls))]
    by_turn: dict[int, list[ToolCall]] = {}
    for entry in own:
        by_turn.setdefault(int(entry.number("turn")), []).append(_own_call(entry))
    turns = [Turn(message=Message(role="assistant", tool_calls=tuple(by_turn[n]))) for n in sorted(by_turn)]
    return [*turns, Turn(message=Message(role="assistant", content=text, reasoning=reasoning))]


def _results(turn: Turn, read: Reader) -> tuple[ToolResult, ...]:
    """The turn's results with what `tool_calls` knows of them."""
    known = {entry.required("call_id"): entry for entry in read.items("tool_calls") or ()}
    shown = {result.call_id: result for result in turn.results}
    results: list[ToolResult] = []
    for call in turn.message.tool_calls:
        entry, result = known.get(call.call_id), shown.get(call.call_id)
        output = entry.text("output") if entry else None
        if output is None and result is not None:
            output = result.output
        if output is None:
            continue
        results.append(
            ToolResult(
                call_id=call.call_id,
                name=call.name,
                output=output,
                error=_error(entry) if entry else None,
                latency_s=entry.number("latency_s") if entry else 0.0,
            )
        )
    return tuple(results)


def _error(entry: Reader) -> ToolErrorKind | None:
    text = entry.text("error")
    if text is not None and text not in tuple(ToolErrorKind):
        raise UserError(f"{entry.where}.error: expected one of {', '.join(ToolErrorKind)}, got {text!r}")
    return None if text is None else ToolErrorKind(text)


def _stop_reason(read: Reader, turns: Sequence[Turn]) -> StopReason:
    text = read.text("stop_reason")
    gradable = [reason for reason in StopReason if reason is not StopReason.WORLD_FAULT]
    if text is not None and text not in gradable:
        raise UserError(f"sample.stop_reason: expected one of {', '.join(gradable)}, got {text!r}")
    if text is not None:
        reason = StopReason(text)
    else:
        has_messages = read.get("messages", list, "a list") is not None
        waits = has_messages and bool(turns and turns[-1].message.tool_calls) and not read.text("output_text")
        reason = StopReason.MAX_TURNS if waits else StopReason.ANSWERED
    if reason in (StopReason.ANSWERED, StopReason.CALLED) and not turns:
        raise UserError("sample.messages: expected an assistant message after the last of the user's")
    return reason


def _history(turns: Sequence[Turn]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        messages.append(turn.message)
        messages += [Message(role="tool", content=r.output, call_id=r.call_id, name=r.name) for r in turn.results]
    return messages
