"""A sample in the hosted form, read back into an episode."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from envs.errors import UserError
from envs.messages import Reader, read_call, read_message
from envs.types import MALFORMED_NOTES, Episode, Message, StopReason, ToolCall, ToolErrorKind, ToolResult, Turn


def episode_from_sample(sample: Mapping[str, Any], *, rollout_id: str) -> Episode:
    """An episode from a sample in the hosted form; `output_text` alone suffices.

    With `messages` the trajectory is theirs: the last `num_turns` assistant messages, or those after the last user
    message where that key is missing. A user message among them answers a malformed call where it begins as such an
    answer does, and is the user's reply otherwise. Without `messages` it is made of `tool_calls` (or `output_tools`, or
    the message in `choices`, or the first of `outputs`, as exports of graded samples have it) and `output_text`. Its
    `task_id` is empty.

    Covered: `hosted_sample` gives the same sample again for one that it made. Not covered: tokens by turn (the totals
    stand on the last), the times of generation and of replies. Raises `UserError` naming the key for a sample that
    can't be read.
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
    gradable = [reason for reason in StopReason if not reason.is_masked]
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
