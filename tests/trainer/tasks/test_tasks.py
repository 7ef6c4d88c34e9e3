"""Tasks from the world and from JSONL, and the order in which a run visits them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from envs.finance.config import FinanceConfig
from envs.finance.world import FinanceWorld, task_row
from envs.remote.config import RemoteConfig
from envs.remote.world import RemoteWorld
from envs.tools import offered_tools
from envs.types import Message, Task, ToolCall
from graders.hosted.view import item_of
from trainer.config import RunConfig
from trainer.tasks.load import load_tasks, tasks_of_step, train_requests

WORLD = FinanceWorld(FinanceConfig(num_companies=8, num_train_tasks=12, num_eval_tasks=4))
GOOD = {"messages": [{"role": "user", "content": "How much?"}], "answer": "1"}


def make_config(tmp_path: Path, *rows: object, **more: object) -> RunConfig:
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    data = {"train": tmp_path / "rows.jsonl", "eval": tmp_path / "rows.jsonl"}
    return RunConfig.model_validate({"output_dir": tmp_path, "grader": {"type": "numeric"}, "data": data} | more)


def refusal(tmp_path: Path, *rows: object) -> str:
    with pytest.raises(UserError) as caught:
        load_tasks(make_config(tmp_path, *rows), WORLD, "train")
    return str(caught.value)


def some_tasks(num: int) -> list[Task]:
    return [Task(task_id=str(i), messages=(Message(role="user", content="?"),)) for i in range(num)]


# --- rows


def test_without_a_data_section_the_worlds_own_tasks_are_used(tmp_path):
    config = RunConfig.model_validate({"output_dir": tmp_path, "grader": {"type": "numeric"}})
    for split in ("train", "eval"):
        assert load_tasks(config, WORLD, split) == list(WORLD.tasks(split))


def test_tasks_written_in_the_hosted_format_are_read_back(tmp_path):
    tasks = WORLD.tasks("train")
    config = make_config(tmp_path, *(task_row(t, WORLD.tools) for t in tasks))
    read = load_tasks(config, WORLD, "train")
    assert [(t.task_id, t.messages) for t in read] == [(t.task_id, t.messages) for t in tasks]
    for before, after in zip(tasks, read, strict=True):
        assert after.tools == tuple(WORLD.tools)
        assert after.item == json.loads(json.dumps(task_row(before, WORLD.tools)))


def test_a_minimal_row_offers_all_tools_and_is_named_by_its_line(tmp_path):
    (task,) = load_tasks(make_config(tmp_path, "", GOOD), WORLD, "train")
    assert task == Task(task_id="row-2", messages=(Message(role="user", content="How much?"),), item=GOOD)


def test_a_row_that_names_its_tools_keeps_their_order(tmp_path):
    tools = [WORLD.tools[name].schema() for name in ("cat", "search")]
    (task,) = load_tasks(make_config(tmp_path, GOOD | {"tools": tools}), WORLD, "train")
    assert task.tools == ("cat", "search")


def test_a_row_with_no_tools_offers_none(tmp_path):
    (task,) = load_tasks(make_config(tmp_path, GOOD | {"tools": []}), WORLD, "train")
    assert task.tools == ()


def test_the_item_is_the_whole_row(tmp_path):
    row = GOOD | {"tools": [], "parallel_tool_calls": True, "note": None}
    (task,) = load_tasks(make_config(tmp_path, row), WORLD, "train")
    assert task.item == row and item_of(task) == row


def test_a_history_with_tool_calls_is_kept_and_the_developer_speaks_as_the_system(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "cat", "arguments": '{"path": "a"}'}}
    messages = [
        # vLLM joins the parts of a text by line breaks.
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "input_text", "text": "brief."}]},
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "cat", "content": "42"},
        {"role": "user", "content": "How much?"},
    ]
    (task,) = load_tasks(make_config(tmp_path, {"messages": messages}), WORLD, "train")
    assert task.messages == (
        Message(role="system", content="Be \nbrief."),
        Message(role="user", content="Read it."),
        Message(role="assistant", tool_calls=(ToolCall(call_id="c1", name="cat", arguments='{"path": "a"}'),)),
        Message(role="tool", content="42", call_id="c1", name="cat"),
        Message(role="user", content="How much?"),
    )


REMOTE = {"type": "remote", "tools": [{"name": "stock", "server_url": "http://127.0.0.1:1/tools"}]}
STOCK = {
    "type": "function",
    "function": {
        "name": "stock",
        "description": "Pieces in store.",
        "parameters": {"type": "object", "properties": {"sku": {"type": "string"}}, "required": ["sku"]},
    },
}


def test_a_remote_tool_takes_its_schema_from_the_row(tmp_path):
    world = RemoteWorld(RemoteConfig.model_validate(REMOTE))
    (task,) = load_tasks(make_config(tmp_path, GOOD | {"tools": [STOCK]}), world, "train")
    assert offered_tools(task, world.make_env().tools)["stock"].schema() == STOCK


def test_a_rows_tool_definition_is_kept_as_it_stands(tmp_path):
    odd = {
        "type": "function",
        "function": {"name": "stock", "description": None, "parameters": None, "strict": True, "x-note": {"a": None}},
    }
    world = RemoteWorld(RemoteConfig.model_validate(REMOTE))
    (task,) = load_tasks(make_config(tmp_path, GOOD | {"tools": [odd]}), world, "train")
    assert task.definitions == {"stock": odd}


def test_a_remote_tool_whose_definition_in_the_row_is_no_schema_is_refused(tmp_path):
    world = RemoteWorld(RemoteConfig.model_validate(REMOTE))
    tools = [STOCK | {"function": {"name": "stock", "parameters": {"type": "thing"}}}]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: tools: .*parameters: not a JSON schema"):
        load_tasks(make_config(tmp_path, GOOD | {"tools": tools}), world, "train")


def test_a_row_without_tools_is_offered_none_of_those_that_only_rows_define(tmp_path):
    world = RemoteWorld(RemoteConfig.model_validate(REMOTE))
    (task,) = load_tasks(make_config(tmp_path, GOOD), world, "train")
    assert offered_tools(task, world.make_env().tools) == {}


def test_line_separators_of_unicode_do_not_split_a_row(tmp_path):
    row = GOOD | {"note": "a\u2028b\u0085c"}
    (task,) = load_tasks(make_config(tmp_path, row), WORLD, "train")
    assert task.item["note"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"messages": [', "line 2: not valid JSON: Expecting value at column 15"),
        ("[1]", "line 2: a JSON list; expected JSONL: one object a line"),
        ("3", "line 2: expected an object, got a number"),
        ({"text": "hi"}, "line 2: messages: required (a list of chat messages), or prompt"),
        ({"messages": []}, "line 2: messages: expected a list of chat messages, got an empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2: messages[0].role: expected system, developer"),
        ({"messages": [{"role": "user"}]}, "line 2: messages[0].content: expected text, but it is missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2: messages: the last message must be"),
        (GOOD | {"tools": [{"type": "function", "function": {"name": "browse"}}]}, "line 2: tools: 'browse' is not"),
        (GOOD | {"tools": ["search"]}, 'line 2: tools[0]: expected {"type": "function"'),
        (GOOD | {"task_id": "row-1"}, "line 2: task_id: 'row-1' also stands in an earlier line"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, expected):
    message = refusal(tmp_path, GOOD, row)
    assert f"{tmp_path / 'rows.jsonl'}, {expected}" in message and "\n" not in message


def test_files_that_are_missing_empty_or_no_text(tmp_path):
    config = make_config(tmp_path, "")
    with pytest.raises(UserError, match=r"data\.train .*rows\.jsonl: no rows"):
        load_tasks(config, WORLD, "train")
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n{}\n\xff\n")
    with pytest.raises(UserError, match=r"data\.eval .*rows\.jsonl, line 3: not UTF-8 text"):
        load_tasks(config, WORLD, "eval")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.train .*rows\.jsonl: No such file"):
        load_tasks(config, WORLD, "train")


# --- order


@given(num_tasks=st.integers(1, 30), per_step=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_pass_visits_each_task_once(num_tasks, per_step, seed):
    tasks = some_tasks(num_tasks)
    num_steps = 2 * num_tasks  # so many steps make 2 · per_step whole passes
    visited = [t for s in range(num_steps) for t in tasks_of_step(tasks, seed=seed, step=s, num_tasks=per_step)]
    for start in range(0, len(visited), num_tasks):
        assert Counter(t.task_id for t in visited[start : start + num_tasks]) == Counter(t.task_id for t in tasks)


def test_the_order_needs_no_cursor_and_differs_by_pass_and_seed():
    tasks = some_tasks(20)
    seeds_and_steps = [(0, 0), (0, 1), (1, 0)]
    passes = [
        [t.task_id for t in tasks_of_step(tasks, seed=seed, step=step, num_tasks=20)] for seed, step in seeds_and_steps
    ]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    alone = tasks_of_step(tasks, seed=0, step=3, num_tasks=5)
    assert [t.task_id for t in alone] == passes[0][15:], "a resumed run starts in the middle"


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), per_step=st.integers(1, 12), seed=st.integers(0, 9))
def test_stratified_steps_hold_every_value_in_its_proportion(sizes, per_step, seed):
    kinds = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    tasks = [replace(task, item={"kind": kind}) for task, kind in zip(some_tasks(len(kinds)), kinds, strict=True)]
    num_steps = len(tasks) // per_step  # the whole steps of one pass
    steps = [
        tasks_of_step(tasks, seed=seed, step=step, num_tasks=per_step, stratify_by="kind") for step in range(num_steps)
    ]
    visited = [t.task_id for step in steps for t in step]
    assert len(visited) == len(set(visited)), "no task twice in a pass"
    for kind, size in enumerate(sizes):
        share = size / len(tasks)
        for step in steps:
            assert abs(sum(t.item["kind"] == kind for t in step) - per_step * share) < 1 + len(sizes) * share


def test_requests_come_group_after_group_with_ids_and_seeds_of_their_own(tmp_path):
    config = make_config(tmp_path, GOOD, rollout={"group_size": 3, "tasks_per_step": 4})
    tasks = some_tasks(2) * 2
    requests = train_requests(config, tasks, run_id="run-1", step=5)
    assert [r.task.task_id for r in requests] == ["0"] * 3 + ["1"] * 3 + ["0"] * 3 + ["1"] * 3
    for step in (5, 6):
        requests += train_requests(config, tasks, run_id="run-1", step=step + 1)
    assert len({r.rollout_id for r in requests}) == len({r.seed for r in requests}) == 36


def test_seeds_do_not_depend_on_the_runs_id(tmp_path):
    config = make_config(tmp_path, GOOD)
    a, b = (train_requests(config, some_tasks(2), run_id=i, step=1) for i in ("run-1", "run-2"))
    assert [r.seed for r in a] == [r.seed for r in b] and not {r.rollout_id for r in a} & {r.rollout_id for r in b}
