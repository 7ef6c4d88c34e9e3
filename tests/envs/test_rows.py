"""Rows of files and of Hugging Face's `datasets`: as tasks, conversations and bad input. No hub is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld, task_row
from envs.messages import Reader, read_tools
from envs.reading.rows import DatasetSource, read_dataset
from envs.types import Message, Task
from graders.hosted.view import item_of
from trainer.config import RunConfig
from trainer.tasks.load import load_demonstrations, load_tasks
from trainer.types import Demonstration

pytestmark = pytest.mark.usefixtures("offline_datasets")
WORLD = FinanceWorld(FinanceConfig(num_companies=8, num_train_tasks=6, num_eval_tasks=2))
ROWS = [{"messages": [{"role": "user", "content": f"How much is {i}?"}], "answer": str(i)} for i in range(3)]


def make_config(folder: Path, train: object, **more: object) -> RunConfig:
    data = {"train": train, "eval": train}
    return RunConfig.model_validate({"output_dir": folder, "grader": {"type": "numeric"}, "data": data} | more)


def saved(folder: Path, **splits: list[dict[str, Any]]) -> str:
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    return str(folder)


def test_tasks_of_a_data_set_are_those_of_the_same_rows_in_a_file(tmp_path):
    rows = [task_row(t, WORLD.tools) for t in WORLD.tasks("train")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    of_file = load_tasks(make_config(tmp_path, str(tmp_path / "rows.jsonl")), WORLD, "train")
    folder = saved(tmp_path / "saved", train=rows)
    of_dataset = load_tasks(make_config(tmp_path, {"dataset": folder}), WORLD, "train")
    # Arrow gives each tool's schema the keys of all others; as nulls they must not reach the model.
    assert of_dataset == of_file and of_dataset[0].definitions


def test_a_folder_of_parquet_files_is_a_data_set_and_a_slice_of_it_a_split(tmp_path):
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows" / "train.parquet")
    source = {"dataset": str(tmp_path / "rows"), "split": "train[1:]"}
    tasks = load_tasks(make_config(tmp_path, source), WORLD, "train")
    assert [(t.task_id, t.item) for t in tasks] == [("row-1", ROWS[1]), ("row-2", ROWS[2])]


def test_demonstrations_may_be_a_data_set(tmp_path):
    rows = [{"messages": [*r["messages"], {"role": "assistant", "content": r["answer"]}]} for r in ROWS]
    config = make_config(
        tmp_path, {"dataset": "unused"}, warmstart={"data": {"dataset": saved(tmp_path / "saved", train=rows)}}
    )
    assert [d.messages[-1].content for d in load_demonstrations(config)] == ["0", "1", "2"]


def test_a_bad_row_of_a_data_set_is_named(tmp_path):
    folder = saved(tmp_path / "saved", valid=[*ROWS, {"messages": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(UserError, match=r"saved \(valid\), row 4: messages: the last message must be the user's"):
        load_tasks(make_config(tmp_path, {"dataset": folder, "split": "valid"}), WORLD, "train")
    dated = datasets.Dataset.from_list(ROWS).cast_column("answer", datasets.Value("binary"))
    dated.save_to_disk(tmp_path / "binary")
    with pytest.raises(UserError, match=r"row 1: .*bytes is not JSON serializable"):
        load_tasks(make_config(tmp_path, {"dataset": str(tmp_path / "binary")}), WORLD, "train")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"dataset": "SAVED", "split": "test"}, "no such split; it has train"),
        ({"dataset": "SAVED", "revision": "main"}, "neither name nor revision"),
        ({"dataset": "WHOLE", "split": "test"}, "without splits; leave split out"),
        ({"dataset": "FILES", "split": "test"}, "ValueError: Unknown split"),
        ({"dataset": "./none"}, "no such folder"),
        ({"dataset": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named_with_the_reason(tmp_path, source, expected):
    saved(tmp_path / "SAVED", train=ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "WHOLE")
    (tmp_path / "FILES").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "FILES" / "train.parquet")
    if (tmp_path / source["dataset"]).is_dir():
        source = source | {"dataset": str(tmp_path / source["dataset"])}
    with pytest.raises(UserError, match=f"data.train .*{expected}") as caught:
        read_dataset(DatasetSource(**source), key="data.train")
    assert "\n" not in str(caught.value)


# --- rows of a file, as other tools write them

QUESTION = {"role": "user", "content": "How much?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "cat", "arguments": '{"path": "a"}'}}
EMPTY = SimpleNamespace(make_env=lambda: SimpleNamespace(tools={}))


def in_file(folder: Path, row: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(row if isinstance(row, bytes) else (json.dumps(row) + "\n").encode())
    return path


def task_of(folder: Path, row: object) -> Task:
    (task,) = load_tasks(make_config(folder, str(in_file(folder, row))), EMPTY, "train")
    return task


def demonstration_of(folder: Path, row: object) -> Demonstration:
    config = make_config(folder, "unused", warmstart={"data": str(in_file(folder, row))})
    (demonstration,) = load_demonstrations(config)
    return demonstration


def says(role: str, content: str | None, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def test_nulls_as_an_sdk_dumps_them_are_read_as_missing_keys(tmp_path):
    nulls = {"name": None, "tool_calls": None, "refusal": None, "audio": None, "function_call": None, "annotations": []}
    messages = [
        {**QUESTION, "name": None, "tool_calls": None, "tool_call_id": None},
        {**says("assistant", None), **nulls, "tool_calls": [CALL | {"index": None}], "reasoning_content": None},
        {**says("tool", "42"), "tool_call_id": "c1", "name": None, "weight": None},
        QUESTION,
    ]
    plain = [{k: v for k, v in m.items() if v is not None and v != []} for m in messages]
    assert task_of(tmp_path, {"messages": messages}).messages == task_of(tmp_path, {"messages": plain}).messages
    flat = {"type": "function", "name": "cat", "description": None, "strict": None, "function": None}
    (tool,) = read_tools(Reader({"tools": [flat], "functions": None}, "row")) or ()
    assert tool["function"]["name"] == "cat" and read_tools(Reader({"tools": None}, "row")) is None


def test_a_row_with_nulls_in_its_tools_is_read_and_keeps_them(tmp_path):
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    tool = {"type": "function", "function": function}
    demonstration = demonstration_of(tmp_path, {"messages": [QUESTION, says("assistant", "1")], "tools": [tool]})
    assert demonstration.tools == (tool,)
    task = task_of(tmp_path, {"messages": [QUESTION], "tools": None, "answer": None, "task_id": None})
    assert (task.task_id, task.tools, task.item["answer"]) == ("row-1", None, None)


def test_tools_in_the_form_of_the_responses_api_or_as_json_text_are_those_of_chat_completions(tmp_path):
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    nested = {"type": "function", "function": function}
    for tools in ([nested], [{"type": "function", **function}], json.dumps([nested])):
        row = {"messages": [QUESTION, says("assistant", "1")], "tools": tools}
        assert demonstration_of(tmp_path, row).tools == (nested,)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_the_reasoning_of_a_history_is_kept_under_each_of_its_names(tmp_path, key):
    messages = [QUESTION, says("assistant", "42", **{key: "It says 42."}), QUESTION]
    assert task_of(tmp_path, {"messages": messages}).messages[1].reasoning == "It says 42."
    both = [QUESTION, says("assistant", "42", reasoning="It says 42.", reasoning_content="It says 42.")]
    assert demonstration_of(tmp_path, {"messages": both}).messages[1].reasoning == "It says 42."


def test_calls_without_ids_and_with_objects_as_arguments_are_tied_to_their_results(tmp_path):
    calls = [{"type": "function", "function": {"name": n, "arguments": {"q": "é"}}} for n in ("f", "g")]
    messages = [
        QUESTION,
        says("assistant", "", tool_calls=calls),
        says("tool", "of g", name="g"),
        says("tool", "of f"),
        QUESTION,
    ]
    read = task_of(tmp_path, {"messages": messages}).messages
    assert [c.call_id for c in read[1].tool_calls] == ["call00000", "call00001"]
    assert read[1].tool_calls[0].arguments == '{"q": "é"}'
    assert [m.call_id for m in read[2:4]] == ["call00001", "call00000"]


def test_a_result_whose_id_its_call_lacks_answers_the_call_before_it(tmp_path):
    call = {k: v for k, v in CALL.items() if k != "id"}
    messages = [QUESTION, says("assistant", None, tool_calls=[call]), says("tool", "42", tool_call_id="x"), QUESTION]
    read = task_of(tmp_path, {"messages": messages}).messages
    assert read[2].call_id == read[1].tool_calls[0].call_id == "call00000"


FUNCTION = {"name": "search", "description": "Finds it.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "functions",
    [[FUNCTION], [{"name": "search"}], FUNCTION, json.dumps([FUNCTION]), [{"type": "function", "function": FUNCTION}]],
)
@pytest.mark.parametrize("older", [{}, {"function_call": "auto"}, {"function_call": {"name": "search"}, "tools": None}])
def test_tools_in_the_apis_older_form_are_refused_rather_than_offered_to_nobody(tmp_path, functions, older):
    row = {"messages": [QUESTION], "functions": functions, **older}
    for read, more in ((task_of, []), (demonstration_of, [says("assistant", "A")])):
        with pytest.raises(UserError, match=r"rows.jsonl, line 1: functions: the older form; expected tools: \[{"):
            read(tmp_path, {**row, "messages": [QUESTION, *more]})


def test_functions_that_are_no_tools_or_stand_beside_tools_are_data(tmp_path):
    for functions in (["sin", "cos"], "sin(x)", [], None, 3, [{"label": "sin"}]):
        task = task_of(tmp_path, {"messages": [QUESTION], "functions": functions})
        assert (task.tools, task.item["functions"]) == (None, functions)
    assert task_of(tmp_path, {"messages": [QUESTION], "functions": [FUNCTION], "tools": []}).tools == ()


def test_a_task_id_is_text_or_a_whole_number(tmp_path):
    ids = [task_of(tmp_path, {"messages": [QUESTION], "task_id": given}).task_id for given in ("a b", 7, 0, None)]
    assert ids == ["a b", "7", "0", "row-1"]


def test_who_speaks_is_kept(tmp_path):
    (message,) = task_of(tmp_path, {"messages": [QUESTION | {"name": "Ann"}]}).messages
    assert message.to_openai() == QUESTION | {"name": "Ann"}


def test_a_prompt_in_trls_form_is_the_messages_and_stays_in_the_item(tmp_path):
    for prompt in ("How much?", [QUESTION]):
        task = task_of(tmp_path, {"prompt": prompt, "answer": "1"})
        assert task.messages == (Message(role="user", content="How much?"),)
        assert item_of(task) == {"prompt": prompt, "answer": "1", "messages": [QUESTION]}


def test_a_prompt_beside_messages_is_data_unless_it_is_another_conversation(tmp_path):
    assert task_of(tmp_path, {"messages": [QUESTION], "prompt": "other"}).item["prompt"] == "other"
    assert task_of(tmp_path, {"messages": [QUESTION], "prompt": [QUESTION]}).messages
    with pytest.raises(UserError, match="line 1: prompt: differs from messages"):
        task_of(tmp_path, {"messages": [QUESTION], "prompt": [says("user", "other")]})


def test_of_a_prompt_and_a_completion_in_trls_form_the_completion_is_learned(tmp_path):
    history = [QUESTION, says("assistant", "old"), says("user", "And now?")]
    for prompt, completion in ((history, "new"), (history, [says("assistant", "new")])):
        demonstration = demonstration_of(tmp_path, {"prompt": prompt, "completion": completion})
        assert [m.content for m in demonstration.messages] == ["How much?", "old", "And now?", "new"]
        assert demonstration.untrained == {0, 1, 2}
    assert demonstration_of(tmp_path, {"prompt": "Q", "completion": "A"}).messages[0].role == "user"


def test_an_assistant_message_of_weight_zero_is_context(tmp_path):
    messages = [QUESTION, says("assistant", "wrong", weight=0), QUESTION, says("assistant", "right", weight=1.0)]
    assert demonstration_of(tmp_path, {"messages": messages}).untrained == {1}
    assert demonstration_of(tmp_path, {"messages": messages[2:]}).untrained == frozenset()


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    assert task_of(tmp_path, b"\xef\xbb\xbf" + json.dumps({"messages": [QUESTION]}).encode()).task_id == "row-1"


HEAD = b'{"messages": [{"role": "user", "content": "Q"}], "data": {"n": '


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"NaN", "NaN is no JSON; expected a number or null"),
        (b"-Infinity", "-Infinity is no JSON"),
        (b"1e999", "1e999 is beyond the range of numbers"),
        (b"9" * 5000, "an integer of 5,000 digits"),
        (b"[" * 100_000, "nested more than 200 deep"),
        (b"[" * 300 + b"]" * 300, "nested more than 200 deep"),
        (b'{"a": ["b", "\\uD83d!"]}', "data.n.a[1]: holds half of a surrogate pair (\\ud83d)"),
        (b'{"\\udc00": 1}', "data.n: holds half of a surrogate pair (\\udc00)"),
    ],
)
def test_what_python_reads_and_json_or_a_tokenizer_has_not_is_refused_with_file_and_line(tmp_path, value, told):
    with pytest.raises(UserError) as caught:
        task_of(tmp_path, HEAD + value + b"}}")
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 1: {told}")


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert task_of(tmp_path, HEAD + b'"\\ud83d\\ude00 \\\\ud83d"}}').item["data"]["n"] == "😀 \\ud83d"


def test_a_number_that_is_none_is_refused_in_a_data_set_too(tmp_path):
    folder = saved(tmp_path / "saved", train=[{"messages": [QUESTION], "answer": float("nan")}])
    with pytest.raises(UserError, match=r"saved \(train\), row 1: NaN is no JSON"):
        load_tasks(make_config(tmp_path, {"dataset": folder}), EMPTY, "train")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([{"messages": [QUESTION]}], "a JSON list; expected JSONL: one object a line, without a list around them"),
        (b'{\n"messages": []}', "not valid JSON: .* at column 2; expected the whole object on one line"),
        ("text", "expected an object, got text"),
        ({"messages": {}}, "messages: expected a list, got an object"),
        ({"messages": ["Q"]}, r"messages\[0\]: expected an object, got text"),
        (
            {"messages": [says("user", 3)]},
            r"messages\[0\].content: expected text or a list of .*, got a number",
        ),
        (
            {"messages": [says("user", [{"type": "image_url", "image_url": {"url": "x"}}])]},
            r"messages\[0\].content\[0\]: a part of type 'image_url'; expected text parts",
        ),
        ({"messages": [says("user", [{"type": "input_audio"}])]}, r"content\[0\]: a part of type 'input_audio'"),
        ({"messages": [says("user", "Q", reasoning="x")]}, r"messages\[0\]: only the assistant reasons"),
        (
            {"messages": [says("assistant", "A", reasoning="x", reasoning_content="y"), QUESTION]},
            r"messages\[0\]: reasoning_content and reasoning differ",
        ),
        ({"messages": [says("assistant", "A", audio={"id": "a"}), QUESTION]}, r"messages\[0\].audio: not understood"),
        ({"messages": [says("assistant", "", refusal="No.")]}, r"messages\[0\].refusal: not understood"),
        ({"messages": [says("assistant", "A", trainable=False), QUESTION]}, r"messages\[0\].trainable: not understood"),
        (
            {"messages": [says("assistant", None, tool_calls=[CALL | {"extra": {"signature": "x"}}])]},
            r"messages\[0\].tool_calls\[0\].extra: not understood",
        ),
        (
            {"messages": [says("assistant", None, tool_calls=[{"id": "c", "type": "custom"}])]},
            r"messages\[0\].tool_calls\[0\].type: expected 'function', got 'custom'",
        ),
        ({"messages": [QUESTION], "tools": [{"type": "web_search"}]}, r"tools\[0\]: type 'web_search'; expected {"),
        ({"messages": [QUESTION], "tools": [{"name": "f", "input_schema": {}}]}, r"tools\[0\]: type None; expected {"),
        (
            {"messages": [QUESTION], "tools": [{"type": "function", "name": "f"}] * 2},
            r"tools\[1\]: a second tool of the name 'f'",
        ),
        (
            {"messages": [QUESTION], "tools": [{"type": "function", "name": "f", "parameters": "x"}]},
            r"tools\[0\].function.parameters: expected a JSON schema \(an object\), got text",
        ),
        ({"prompt": 3}, "prompt: expected a list, got a number"),
        ({"messages": [QUESTION], "task_id": ""}, "task_id: expected text or a whole number, got empty text"),
        ({"messages": [QUESTION], "task_id": " "}, "task_id: expected text or a whole number, got empty text"),
        ({"messages": [QUESTION], "task_id": ["a"]}, "task_id: expected text or a whole number, got a list"),
        ({"messages": [QUESTION], "task_id": True}, "task_id: expected text or a whole number, got true or false"),
        ({"messages": [QUESTION], "task_id": 1.5}, "task_id: expected text or a whole number, got a number"),
        (
            {"messages": [says("assistant", None, tool_calls=[CALL]), says("tool", "x", tool_call_id="c2"), QUESTION]},
            r"messages\[1\].tool_call_id: 'c2' answers no call; the calls before it are 'c1'",
        ),
        (
            {"messages": [says("tool", "x", tool_call_id="c1"), says("assistant", None, tool_calls=[CALL]), QUESTION]},
            r"messages\[0\].tool_call_id: 'c1' answers no call; the calls before it are none",
        ),
        (
            {"messages": [says("assistant", None, tool_calls=[CALL]), QUESTION | {"tool_call_id": "c1"}]},
            r"messages\[1\].tool_call_id: only a tool's message answers a call; the role is 'user'",
        ),
        (
            b'{"messages": [{"role": "user", "content": "Q", "role": "user"}]}',
            "role: the key stands twice in one object",
        ),
        (b'{"messages": [{"role": "user", "content": "Q"}], "a": 1, "b": 2, "a": 1}', "a: the key stands twice"),
    ],
)
def test_a_row_that_is_not_understood_is_named_in_the_users_words(tmp_path, row, told):
    with pytest.raises(UserError, match=f"rows.jsonl, line 1: .*{told}"):
        task_of(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"messages": [QUESTION, says("assistant", "A", weight=0.5)]},
            r"messages\[1\].weight: expected 0 or 1, got 0",
        ),
        ({"messages": [QUESTION, says("assistant", "A", weight=True)]}, r"weight: expected 0 or 1, got True"),
        (
            {"messages": [QUESTION | {"weight": 1}, says("assistant", "A")]},
            r"\[0\].weight: only the assistant's",
        ),
        ({"messages": [QUESTION, says("assistant", "A", weight=0)]}, "messages: every assistant message has weight 0"),
        ({"messages": [QUESTION, says("assistant", "A")], "weight": 0.3}, "weight: rows have no weights here"),
        ({"messages": [QUESTION], "completion": "A"}, "completion: expected messages, or prompt and completion"),
        ({"prompt": "Q"}, "completion: expected it beside prompt"),
        ({"prompt": "Q", "completion": [QUESTION]}, "messages: the last message must be the assistant's"),
    ],
)
def test_a_demonstration_that_is_not_understood_is_named_in_the_users_words(tmp_path, row, told):
    with pytest.raises(UserError, match=f"rows.jsonl, line 1: .*{told}"):
        demonstration_of(tmp_path, row)
