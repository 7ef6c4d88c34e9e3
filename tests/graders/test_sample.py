"""What graders see of an episode, and the way back from a hosted sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.hosted.reader import episode_from_sample
from graders.hosted.sample_file import SampleRow, read_samples
from graders.hosted.view import SAMPLE_KEYS, hosted_sample, item_of, own_data

SEARCH = ToolCall(call_id="c0", name="search", arguments='{"q": "revenue"}')
CAT = ToolCall(call_id="c1", name="cat", arguments='{"path": 3}')
LIST = ToolCall(call_id="c2", name="list", arguments="{}")


def episode(**changes: Any) -> Episode:
    """Two tools in one turn (one refused), a malformed call, a third tool, then the answer."""
    turns = (
        Turn(
            message=Message(role="assistant", content="Looking.", reasoning="Need the file.", tool_calls=(SEARCH, CAT)),
            results=(
                ToolResult(call_id="c0", name="search", output="report.txt", latency_s=0.25),
                ToolResult(call_id="c1", name="cat", output="Error: path", error=ToolErrorKind.BAD_ARGUMENTS),
            ),
            num_tokens=20,
            num_reasoning_tokens=5,
        ),
        Turn(message=Message(role="assistant", content="<tool_call>oops"), malformed=True, num_tokens=4),
        Turn(
            message=Message(role="assistant", tool_calls=(LIST,)),
            results=(ToolResult(call_id="c2", name="list", output="a\nb", latency_s=0.5),),
            num_tokens=6,
        ),
        Turn(
            message=Message(role="assistant", content=' {"value": 14.4} ', reasoning="Subtract."),
            num_tokens=10,
            num_reasoning_tokens=3,
        ),
    )
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content="How much?"))
    answers = [
        [Message(role="tool", content=r.output, call_id=r.call_id, name=r.name) for r in t.results] for t in turns
    ]
    answers[1] = [Message(role="user", content="Error: your tool call could not be parsed.")]
    body = [m for turn, given in zip(turns, answers, strict=True) for m in (turn.message, *given)]
    whole = Episode(
        rollout_id="r1",
        task_id="",
        messages=(*prompt, *body),
        turns=turns,
        stop_reason=StopReason.ANSWERED,
        latency_s=2.5,
    )
    return replace(whole, **changes)


def cut(num_turns: int, stop_reason: StopReason) -> Episode:
    whole = episode()
    last = whole.turns[num_turns - 1].message if num_turns else None
    end = whole.messages.index(last) + 1 if last else 2
    return replace(whole, messages=whole.messages[:end], turns=whole.turns[:num_turns], stop_reason=stop_reason)


def test_a_sample_has_the_hosted_keys_and_ours():
    sample = hosted_sample(episode())
    assert tuple(sample) == SAMPLE_KEYS
    assert sample["output_text"] == '{"value": 14.4}'
    assert sample["output_json"] == {"value": 14.4}
    # The last message that made calls, not the answer and not the first.
    assert sample["output_tools"] == [
        {"id": "c2", "type": "function", "function": {"name": "list", "arguments": "{}"}},
    ]
    assert sample["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ' {"value": 14.4} ', "tool_calls": []},
            "finish_reason": "stop",
        }
    ]
    assert sample["output_reasoning_summary"] == "Need the file.\n\nSubtract."
    assert [m["role"] for m in sample["messages"]] == [
        *("system", "user"),
        *("assistant", "tool", "tool"),
        *("assistant", "user"),
        *("assistant", "tool"),
        "assistant",
    ]
    assert sample["messages"][3] == {"role": "tool", "content": "report.txt", "tool_call_id": "c0", "name": "search"}
    assert sample["tool_calls"][1] == {
        "call_id": "c1",
        "name": "cat",
        "arguments": '{"path": 3}',
        "output": "Error: path",
        "error": "bad_arguments",
        "latency_s": 0.0,
        "turn": 0,
    }
    assert [(c["name"], c["turn"], c["latency_s"]) for c in sample["tool_calls"]] == [
        ("search", 0, 0.25),
        ("cat", 0, 0.0),
        ("list", 2, 0.5),
    ]
    counts = {k: sample[k] for k in SAMPLE_KEYS if k.startswith("num_")}
    assert counts == {
        "num_tokens": 40,
        "num_reasoning_tokens": 8,
        "num_tool_calls": 4,
        "num_invalid_calls": 2,
        "num_turns": 4,
    }
    assert (sample["stop_reason"], sample["latency_s"]) == ("answered", 2.5)
    assert sample["rollout_id"] == sample["trace_id"] == "r1"


def test_a_sample_is_json_and_built_once():
    one = episode()
    assert json.loads(json.dumps(hosted_sample(one), allow_nan=False)) == hosted_sample(one)
    assert hosted_sample(one) is hosted_sample(one)
    assert hosted_sample(replace(one, rollout_id="r2"))["trace_id"] == "r2"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("[1, 2]", [1, 2]),
        ("{}", {}),
        ("14.4", None),
        ('"text"', None),
        ("null", None),
        ("", None),
        ("{oops", None),
        ('{"x": NaN}', None),
        ('{"x": -Infinity}', None),
        ('{"x": 1e999}', None),
        ('{"x": ' + "9" * 5000 + "}", None),
        ("[" * 100_000, None),
    ],
)
def test_only_objects_and_lists_are_output_json(text, parsed):
    turn = Turn(message=Message(role="assistant", content=text))
    assert hosted_sample(episode(turns=(turn,)))["output_json"] == parsed


@pytest.mark.parametrize(
    ("num_turns", "stop_reason", "finish_reason"),
    [
        (1, StopReason.MAX_TOOL_CALLS, "tool_calls"),
        (1, StopReason.WALL_CLOCK, "tool_calls"),
        (2, StopReason.MAX_TURN_TOKENS, "length"),
        (2, StopReason.MAX_TURNS, "stop"),
        (0, StopReason.MAX_EPISODE_TOKENS, "length"),
    ],
)
def test_an_episode_without_an_answer_has_no_output_text(num_turns, stop_reason, finish_reason):
    sample = hosted_sample(cut(num_turns, stop_reason))
    assert (sample["output_text"], sample["output_json"]) == ("", None)
    assert sample["choices"][0]["finish_reason"] == finish_reason
    assert sample["num_turns"] == num_turns


def test_a_call_that_had_not_come_back_has_no_output():
    whole = cut(1, StopReason.WALL_CLOCK)
    waiting = replace(whole, turns=(replace(whole.turns[0], results=()),))
    assert [(c["output"], c["error"]) for c in hosted_sample(waiting)["tool_calls"]] == [(None, None), (None, None)]


def test_an_episode_that_the_world_broke_off_is_refused():
    with pytest.raises(ValueError, match="r1 ended in a world fault"):
        hosted_sample(episode(stop_reason=StopReason.WORLD_FAULT))


def test_the_item_of_a_worlds_own_task_has_its_messages_and_tools_too():
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    task = Task(task_id="t", messages=(Message(role="user", content="?"),), definitions={"f": tool}, item={"answer": 3})
    whole = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "answer": 3}
    assert item_of(task) == whole
    assert own_data(replace(task, item=whole)) == own_data(task) == {"answer": 3}
    odd = whole | {"messages": [{"role": "user", "content": "?", "name": None}]}
    assert item_of(replace(task, item=odd)) == odd and own_data(replace(task, item=odd))["messages"] == odd["messages"]
    item_of(task)["answer"] = 4
    assert task.item == {"answer": 3}


@pytest.mark.parametrize(
    "before",
    [
        episode(),
        cut(1, StopReason.WALL_CLOCK),
        cut(3, StopReason.MAX_TOOL_CALLS),
        cut(0, StopReason.MAX_EPISODE_TOKENS),
    ],
    ids=lambda e: e.stop_reason.value,
)
def test_our_own_sample_comes_back_as_the_same(before):
    if before.turns:
        # Results stand in the messages, so an episode cut off before them has none.
        known = {m.call_id for m in before.messages if m.role == "tool"}
        last = before.turns[-1]
        kept = tuple(r for r in last.results if r.call_id in known)
        before = replace(before, turns=(*before.turns[:-1], replace(last, results=kept)))
    sample = json.loads(json.dumps(hosted_sample(before)))
    after = episode_from_sample(sample, rollout_id="r1")
    assert hosted_sample(after) == sample
    assert after.messages == before.messages


def test_the_answers_text_alone_makes_a_sample():
    sample = hosted_sample(episode_from_sample({"output_text": "14.4"}, rollout_id="r9"))
    assert (sample["output_text"], sample["stop_reason"], sample["trace_id"]) == ("14.4", "answered", "r9")
    assert (sample["num_turns"], sample["output_tools"], sample["num_tool_calls"]) == (1, [], 0)


def test_a_hosted_sample_keeps_its_calls():
    call = {"id": "x", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    given: list[dict[str, Any]] = [
        {"output_text": "", "output_tools": [call]},
        {"output_text": None, "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]},
    ]
    for one in given:
        sample = hosted_sample(episode_from_sample(one, rollout_id="r"))
        assert (sample["output_tools"], sample["num_tool_calls"], sample["output_text"]) == ([call], 1, "")
        assert sample["choices"][0]["message"]["tool_calls"] == [call]


def test_calls_by_turn_precede_the_answer():
    calls = [
        {"call_id": "a", "name": "list", "arguments": "{}", "output": "x", "turn": 0},
        {"call_id": "b", "name": "cat", "arguments": "{}", "output": "Error: no", "error": "refused", "turn": 1},
        {"call_id": "c", "name": "cat", "arguments": "{}", "output": "y", "latency_s": 1.5, "turn": 1},
    ]
    after = episode_from_sample({"output_text": "14.4", "tool_calls": calls, "num_tokens": 9}, rollout_id="r")
    assert [[c.call_id for c in t.message.tool_calls] for t in after.turns] == [["a"], ["b", "c"], []]
    assert after.turns[1].results[0].error is ToolErrorKind.REFUSED
    assert (after.num_tokens, after.answer) == (9, "14.4")
    assert [c["latency_s"] for c in hosted_sample(after)["tool_calls"]] == [0.0, 0.0, 1.5]


def test_messages_without_counts_begin_after_the_last_user_message():
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": "4"},
    ]
    after = episode_from_sample({"messages": messages}, rollout_id="r")
    assert (len(after.turns), after.answer, after.num_tool_calls) == (1, "4", 0)
    assert after.messages[2].content == "2 + 2?"


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ({}, r"^sample\.output_text: expected text"),
        ({"output_text": 3}, r"^sample\.output_text: expected text, got a number"),
        ({"output_text": "x", "output_tools": {}}, r"^sample\.output_tools: expected a list, got an object"),
        ({"output_text": "x", "output_tools": ["y"]}, r"^sample\.output_tools\[0\]: expected an object, got text"),
        ({"output_text": "x", "output_tools": [{"id": "c"}]}, r"^sample\.output_tools\[0\]\.function\.name: .*missing"),
        ({"output_text": "x", "tool_calls": [{"call_id": "c"}]}, r"^sample\.tool_calls\[0\]\.name: .*missing"),
        ({"output_text": "x", "stop_reason": "bored"}, r"^sample\.stop_reason: expected one of answered, .*'bored'"),
        ({"output_text": "x", "stop_reason": "world_fault"}, r"^sample\.stop_reason: expected one of answered"),
        (
            {"output_text": "x", "stop_reason": "max_turns"},
            r"^sample\.output_text: expected .* or '' without an answer",
        ),
        ({"output_text": "x", "num_tokens": -1}, r"^sample\.num_tokens: expected a number from 0"),
        ({"output_text": "x", "num_tokens": True}, r"^sample\.num_tokens: expected a number, got true or false"),
        ({"output_text": "x", "latency_s": float("nan")}, r"^sample\.latency_s: expected a number from 0"),
        ({"messages": [{"role": "user", "content": "?"}]}, r"^sample\.messages: expected an assistant message"),
        ({"messages": [{"role": "robot"}]}, r"^sample\.messages\[0\]\.role: expected system, .*'robot'"),
        ({"messages": [{"content": "x"}]}, r"^sample\.messages\[0\]\.role: .*missing"),
        (
            {"messages": [{"role": "assistant", "content": "4"}], "num_turns": 2},
            r"^sample\.num_turns: expected at most",
        ),
        ({"messages": [{"role": "assistant", "content": "4"}], "output_text": "5"}, r"^sample\.output_text: expected"),
    ],
)
def test_a_sample_that_can_not_be_read_is_named_by_key(sample, told):
    with pytest.raises(UserError, match=told):
        episode_from_sample(sample, rollout_id="r")


def test_an_unknown_tool_error_is_named():
    call = {"call_id": "c", "name": "cat", "arguments": "{}", "output": "", "error": "boom"}
    with pytest.raises(UserError, match=r"^sample\.tool_calls\[0\]\.error: expected one of unknown_tool, .*'boom'"):
        episode_from_sample({"output_text": "x", "tool_calls": [call]}, rollout_id="r")


TASK, PLAYED = {"task_id": "t", "messages": [], "item": {}}, {"rollout_id": "r", "task_id": "t"}
PLAYED |= {"messages": [], "turns": [], "stop_reason": "answered"}


def test_the_rollout_of_a_run_is_read_with_the_ids_behind_its_prompt(tmp_path):
    ledgers = [{"token_ids": [1, 2, 3, 4, 5], "sampled": [[1, 2, 0], [3, 4, 0]]}, {"token_ids": [7], "sampled": []}]
    assert read(tmp_path, {"task": TASK, "episode": PLAYED, "ledgers": ledgers}).episode.completion_ids == (2, 3, 4)
    assert read(tmp_path, {"task": TASK, "episode": PLAYED}).episode.completion_ids is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": 3}, r"task: Input should be a dictionary"),
        ({"episode": {}}, r"episode\.rollout_id: required"),
        ({"ledgers": 3}, r"ledgers: Input should be a valid list \(got 3\)"),
        ({"ledgers": [{"token_ids": [1]}]}, r"ledgers\.0\.sampled: required"),
        ({"ledgers": [{"token_ids": [1], "sampled": [3]}]}, r"ledgers\.0\.sampled\.0: Input should be a valid list"),
        ({"ledgers": [{"token_ids": [1], "sampled": [["a", 1]]}]}, r"ledgers\.0\.sampled\.0\.0: Input should be"),
        ({"ledgers": [{"token_ids": [1], "sampled": [[0]]}]}, r"ledgers\.0\.sampled\.0: List should have at least 2"),
    ],
)
def test_a_rollout_that_is_none_is_told_by_line_and_key(tmp_path, changes, told):
    with pytest.raises(UserError, match=rf"samples\.jsonl, line 1: \d problems?\n  {told}"):
        read(tmp_path, {"task": TASK, "episode": PLAYED} | changes)


def read(folder: Path, line: Any) -> SampleRow:
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    (row,) = read_samples(folder / "samples.jsonl")
    return row
