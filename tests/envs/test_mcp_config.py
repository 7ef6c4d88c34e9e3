"""MCP servers as they are set up: secrets, rollouts and rows in their settings, state of their own, odd answers."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from envs.base import HasState
from envs.errors import UserError, WorldError
from envs.remote.config import RemoteConfig
from envs.remote.mcp_config import McpServerConfig
from envs.remote.world import RemoteWorld
from envs.types import Message, Task, ToolErrorKind
from tests.support import ROOT
from tests.support.mcp_play import call, opened, world_with

SERVER = ROOT / "tests" / "support" / "odd_mcp_server.py"
ITEM = {"owner": "ann", "n": 3, "nested": {"list": [{"a": "x"}]}, "text": "${SECRET}"}
TASK = Task(task_id="t", messages=(Message(role="user", content="q"),), item=ITEM)


def server(answer: str = "", name: str = "odd", **settings: Any) -> dict[str, Any]:
    args = [str(SERVER), answer, *settings.pop("args", [])]
    return {"name": name, "command": sys.executable, "args": args, "start_timeout_s": 300, "timeout_s": 60, **settings}


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        *(("surrogate", "a? b"), ("latin", "caf\ufffd"), ("unstructured", "as text"), ("mismatched", "as text")),
        *(
            ("structured", '{"result": [1, 2]}'),
            ("hologram", "[hologram]\nas text\n[int]"),
            ("null", ""),
            ("one", "as text"),
        ),
    ],
)
async def test_an_odd_answer_is_shown_as_far_as_it_can_be_read(answer, shown):
    async with opened(TASK, server(answer)) as (env,):
        result = await call(env, "tell")
        assert (result.output, result.error) == (shown, None)
        assert (await call(env, "notes")).output == "[]", "the session goes on"


@pytest.mark.parametrize("form", ["printed", "by lines", "listed"])
async def test_an_answer_over_several_lines_or_in_a_list_is_read(form):
    async with opened(TASK, server(form, timeout_s=600)) as (env,):
        start = time.monotonic()
        assert json.loads((await call(env, "tell")).output)["argv"] == [form]
        assert time.monotonic() - start < 60
        assert (await call(env, "notes")).output == "[]", "the session goes on"


@pytest.mark.parametrize("form", ["unmarked", "unmarked error"])
async def test_an_answer_that_is_not_marked_as_one_is_a_fault_at_once(form):
    async with opened(TASK, server(form, timeout_s=600)) as (env,):
        start = time.monotonic()
        told = r"""MCP server 'odd': tell: an answer that can't be read \(it has no "jsonrpc": "2\.0"\): \{'co"""
        with pytest.raises(WorldError, match=told):
            await call(env, "tell")
        assert time.monotonic() - start < 60


@pytest.mark.parametrize("answer", ["string", "list", "nothing", "cut", "deep", "endless"])
async def test_an_answer_that_cannot_be_read_is_a_fault_of_the_world_at_once(answer):
    async with opened(TASK, server(answer, timeout_s=600)) as (env,):
        start = time.monotonic()
        with pytest.raises(WorldError, match="MCP server 'odd': tell: an answer that can't be read: "):
            await call(env, "tell")
        assert time.monotonic() - start < 60
        assert (await call(env, "notes")).output == "[]", "the session goes on"


async def test_what_the_model_writes_reaches_the_server_whatever_it_is():
    async with opened(TASK, server(cwd="${ROLLOUT_DIR}")) as (env,):
        await call(env, "note", text="\ud83d", owner="ann")
        assert json.loads((await call(env, "notes")).output) == [{"text": "?", "owner": "ann"}]


async def test_one_odd_tool_costs_a_server_nothing():
    async with opened(TASK, server(cwd="${ROLLOUT_DIR}")) as (env,):
        assert list(env.tools) == ["note", "notes", "tell", "refuse", "bare", "strange", "loose"]
        assert (await call(env, "strange", any=1)).error is None
        assert (await call(env, "loose", q=1)).error is None
        assert (await call(env, "note", text=1, owner="")).error is ToolErrorKind.BAD_ARGUMENTS
        assert (await call(env, "refuse")).output == "Error: locked"


async def test_variables_stand_for_secrets_and_for_the_rollout(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.setenv("WHERE", str(tmp_path))
    settings = {"args": ["--db", "${WHERE}/${TRACE_ID}.db"], "env": {"GIVEN": "${SECRET}/${TRACE_ID}"}}
    config = server(**settings, cwd="${WHERE}")
    assert "s3cret" not in RemoteConfig.model_validate({"type": "remote", "mcp": [config]}).model_dump_json()
    async with opened(TASK, config, rollouts=("r-1", "r-2")) as envs:
        for env, rollout_id in zip(envs, ("r-1", "r-2"), strict=True):
            told = json.loads((await call(env, "tell")).output)
            assert told["argv"] == ["", "--db", f"{tmp_path}/{rollout_id}.db"]
            assert (told["env"], told["cwd"]) == (f"s3cret/{rollout_id}", str(tmp_path))
            assert (told["meta"]["trace_id"], told["meta"]["item"]) == (rollout_id, ITEM), "the row is told as it is"


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        *(({"args": ["${UNSET_KEY}"]}, "args"), ({"env": {"TOKEN": "${UNSET_KEY}"}}, "env.TOKEN")),
        *(({"cwd": "${UNSET_KEY}"}, "cwd"), ({"command": "${UNSET_KEY}"}, "command")),
        ({"command": None, "args": [], "url": "http://127.0.0.1:1/${UNSET_KEY}"}, "url"),
        (
            {"command": None, "args": [], "url": "http://h", "headers": {"Authorization": "Bearer ${UNSET_KEY}"}},
            "headers",
        ),
    ],
)
def test_a_variable_that_is_not_set_is_named_with_its_place(settings, place):
    config = {**server(), **settings}
    with pytest.raises(UserError, match=f"MCP server 'odd': {place}: the environment variable UNSET_KEY is not set"):
        world_with(config)


def test_what_belongs_to_a_rollout_cannot_stand_where_one_server_is_for_all():
    for settings in ({"args": ["${TRACE_ID}"]}, {"cwd": "${ROLLOUT_DIR}"}, {"bind": {"x": "${ROLLOUT_DIR}"}}):
        with pytest.raises(ValidationError, match="are a rollout's"):
            RemoteConfig.model_validate({"type": "remote", "mcp": [server(per_rollout=False, **settings)]})
    shared = server(per_rollout=False, open_call={"tool": "note", "arguments": {"owner": "${TRACE_ID}"}})
    RemoteConfig.model_validate({"type": "remote", "mcp": [shared]})


async def test_state_in_files_is_a_rollouts_own_in_a_folder_of_its_own():
    async with opened(TASK, server(cwd="${ROLLOUT_DIR}"), rollouts=("r-1", "r-2")) as (one, two):
        await call(one, "note", text="a", owner="ann")
        assert (await call(two, "notes")).output == "[]"
        assert json.loads((await call(one, "notes")).output) == [{"text": "a", "owner": "ann"}]
        folder = Path(json.loads((await call(one, "tell")).output)["cwd"])
        assert folder.is_dir()
        await one.close(None)
        assert not folder.exists()
        assert (await call(two, "notes")).output == "[]"


async def test_a_server_is_prepared_with_the_row_and_asked_for_its_state():
    settings = {
        "cwd": "${ROLLOUT_DIR}",
        "tools": ["tell"],
        "open_call": {
            "tool": "note",
            "arguments": {"text": "{{ item.nested.list[0].a }} of ${TRACE_ID}", "owner": "{{item.n}}"},
        },
        "state_call": {"tool": "notes"},
    }
    plain = server("unstructured", "plain", tools=["bare"], state_call={"tool": "tell"})
    async with opened(TASK, server(**settings), plain) as (env,):
        assert list(env.tools) == ["tell", "bare"] and isinstance(env, HasState)
        assert await env.final_state() == {"odd": [{"text": "x of r", "owner": 3}], "plain": "as text"}


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"open_call": {"tool": "nothing"}}, UserError, "open_call: no tool named 'nothing'; it has note, notes, "),
        ({"state_call": {"tool": "nothing"}}, UserError, "state_call: no tool named 'nothing'"),
        ({"open_call": {"tool": "refuse"}}, WorldError, "MCP server 'odd': open_call: refuse: locked"),
        ({"bind": {"colour": 1}}, UserError, "bind: no tool of it has an argument named 'colour'"),
        (
            {"open_call": {"tool": "note", "arguments": {"text": "{{item.gone}}"}}},
            UserError,
            r"has no \{\{item.gone\}\}; its keys",
        ),
    ],
)
async def test_calls_of_ours_that_cannot_be_made_are_named(settings, error, said):
    with pytest.raises(error, match=said):
        async with opened(TASK, server(cwd="${ROLLOUT_DIR}", **settings)):
            pass


async def test_bound_arguments_are_given_by_the_config_and_hidden_from_the_model():
    bound = {"owner": "{{item.text}} ${TRACE_ID}", "level": "{{item.nested}}"}
    async with opened(TASK, server(cwd="${ROLLOUT_DIR}", bind=bound)) as (env,):
        parameters = env.tools["note"].schema()["function"]["parameters"]
        assert parameters == {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
        await call(env, "note", text="a")
        await call(env, "note", text="b", owner="somebody else's")
        noted = json.loads((await call(env, "notes")).output)
        assert [n["text"] for n in noted] == ["a", "b"]
        assert all(n["owner"] == "${SECRET} r" and n["level"] == ITEM["nested"] for n in noted), "rows name no secrets"


async def test_two_servers_may_have_one_tool_where_a_prefix_tells_them_apart():
    with pytest.raises(UserError, match=r"'note' is offered by two servers; .* a prefix"):
        world_with(server(), server(name="other"))
    both = (server(tools=["notes"], prefix="a_"), server(name="other", tools=["notes", "tell"], prefix="b."))
    async with opened(TASK, *both) as (env,):
        assert list(env.tools) == ["a_notes", "b.notes", "b.tell"]
        assert env.tools["b.tell"].schema()["function"]["name"] == "b.tell"
        assert json.loads((await call(env, "b.tell")).output)["meta"]["trace_id"] == "r"
        assert (await call(env, "tell")).error is ToolErrorKind.UNKNOWN_TOOL


def test_tools_and_servers_may_stand_in_files_as_other_programs_have_them(tmp_path):
    tools = [{"name": "a", "server_url": "https://h/call", "headers": {"K": "${KEY}"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    (tmp_path / "job.json").write_text(json.dumps({"tools": tools}))
    odd, web = {"type": "stdio", "command": "x", "args": ["y"]}, {"type": "http", "url": "http://h", "autoApprove": []}
    servers = {"odd": odd, "web": web, "off": {**odd, "disabled": True}}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
    for name in ("tools.json", "job.json"):
        config = RemoteConfig.model_validate({"tools": str(tmp_path / name), "mcp": str(tmp_path / "mcp.json")})
        assert [tool.model_dump(include={"name", "server_url", "headers"}) for tool in config.tools] == tools
        assert [(s.name, s.command, s.url) for s in config.mcp] == [("odd", "x", None), ("web", None, "http://h")]
        assert RemoteConfig.model_validate_json(config.model_dump_json()) == config, "as the run folder keeps it"
    (tmp_path / "bad.json").write_text("[")
    for wrong, told in (("gone.json", "No such file"), ("bad.json", "not valid JSON")):
        with pytest.raises(ValidationError, match=told):
            RemoteConfig.model_validate({"mcp": str(tmp_path / wrong)})
    with pytest.raises(ValidationError, match="two servers are named 'odd'"):
        RemoteConfig.model_validate({"mcp": [server(), server()]})


def test_headers_and_urls_are_read_from_the_environment_when_they_are_used(monkeypatch):
    monkeypatch.setenv("MCP_KEY", "s3cret")
    web = {"name": "web", "url": "http://h/${MCP_KEY}", "headers": {"Authorization": "Bearer ${MCP_KEY}"}}
    config = RemoteConfig.model_validate({"mcp": [web]})
    used = config.mcp[0].resolved({})
    assert (used.url, used.headers) == ("http://h/s3cret", {"Authorization": "Bearer s3cret"})
    assert "s3cret" not in config.model_dump_json()
    with pytest.raises(UserError, match="the environment variable UNSET_KEY is not set"):
        RemoteWorld(RemoteConfig.model_validate({"tools": [{"name": "a", "server_url": "${UNSET_KEY}/call"}]}))
    with pytest.raises(UserError, match="the environment variable UNSET_KEY is not set"):
        RemoteWorld(RemoteConfig.model_validate({"open_url": "https://h/${UNSET_KEY}"}))


def test_variables_are_read_as_other_programs_write_them(monkeypatch):
    monkeypatch.setenv("MCP_KEY", "s3cret")
    env = {"A": "${env:MCP_KEY}", "B": "${MCP_KEY:-none}", "C": "${UNSET_KEY:-a b}", "D": "${UNSET_KEY:-}"}
    config = McpServerConfig(name="a", command="x", env=env)
    assert config.resolved({}).env == {"A": "s3cret", "B": "s3cret", "C": "a b", "D": ""}
    with pytest.raises(UserError, match=r"env.K: \$\{input:key\}: nobody can be asked here"):
        McpServerConfig(name="a", command="x", env={"K": "${input:key}"}).resolved({})


@pytest.mark.parametrize("wrap", [lambda s: {"mcpServers": s}, lambda s: {"servers": s, "inputs": []}, lambda s: s])
def test_lists_of_servers_are_read_in_each_programs_form(tmp_path, wrap):
    servers = {"a": {"transport": "stdio", "command": "x", "args": None, "env": None}, "b": {"url": "http://h"}}
    (tmp_path / "mcp.json").write_text(json.dumps(wrap(servers)))
    config = RemoteConfig.model_validate({"mcp": str(tmp_path / "mcp.json")})
    assert [(s.name, s.command, s.url) for s in config.mcp] == [("a", "x", None), ("b", None, "http://h")]
    (tmp_path / "mcp.json").write_text(json.dumps(wrap({"a": {"type": "sse", "url": "http://h/sse"}})))
    with pytest.raises(ValidationError, match=r"a: 'sse' is not spoken here; expected .* streamable HTTP"):
        RemoteConfig.model_validate({"mcp": str(tmp_path / "mcp.json")})
