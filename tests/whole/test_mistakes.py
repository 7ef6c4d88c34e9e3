"""Mistakes made on purpose: each is told before anything is loaded, with file, line or key and what was expected."""

import contextlib
import http.server
import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from envs.errors import UserError
from envs.reading.documents import check_writable
from tests.support.scripts import run_script
from tests.support.servers import free_port
from trainer.config import load_config
from trainer.prepare import prepare
from trainer.reports.evaluations import read_evaluations

QUESTION = {"role": "user", "content": "How much?"}
ROW = {"messages": [QUESTION], "answer": "1 million"}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
TRL = """
class Game:
    def reset(self, begin, **row): ...
    def move(self, to: int) -> str:
        '''Go.

        Args:
            to: where
        '''
class Other:
    def reset(self): ...
    def look(self) -> str:
        '''Look.'''
BOTH = {"game": Game, "other": Other}
NOTHING = {}
class Broken:
    def __init__(self):
        open("/no/such/prices.json")
class World:
    def tasks(self, split):
        return self.own
    own = ()
    def expert_episode(self, task, seed):
        return ()
    def make_env(self):
        return self
    tools = {}
    async def open(self, task, rollout_id): ...
    async def close(self, episode): ...
class Bare(World):
    def make_env(self):
        return object()
class Plain(World):
    tools = {"f": print}
class Listed(World):
    tools = [print]
class Odd(World):
    own = [{"messages": []}]
class Buggy(World):
    def tasks(self, split):
        return {}["nothing"]
def reward(completions, gold, **rest):
    return [0.0]
"""


class Job:
    """A config with its files; each test spoils one thing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mine.py").write_text(TRL)
        self.config: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "model": {"name": str(folder / "model")},
            "grader": {"type": "exact"},
            "data": {"train": self.rows(ROW), "eval": self.rows(ROW)},
        }

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> str:
        return self.file(name, "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))

    def file(self, name: str, content: Any) -> str:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def train_on(self, *rows: Any) -> None:
        self.config["data"] = {"train": self.rows(*rows, name="train.jsonl"), "eval": self.rows(ROW)}

    def custom(self, name: str) -> dict[str, Any]:
        return {"type": "custom", "target": f"{self.folder / 'mine.py'}:{name}"}

    def told(self, *overrides: str) -> str:
        path = self.file("config.yaml", yaml.safe_dump(self.config))
        with pytest.raises(UserError) as caught:
            prepare(load_config(Path(path), list(overrides)))
        assert not {"_world_type", ".cc:", "pydantic", "Value error"} & set(str(caught.value).split())
        return str(caught.value)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


# ---- rows


def test_a_row_without_what_reset_asks_for(job):
    job.config["world"] = job.custom("Game")
    job.train_on(ROW | {"begin": 1}, ROW | {"beginn": 2})
    message = job.told()
    assert "train.jsonl, line 2: " in message and "mine.py:Game" in message
    assert "has no key 'begin', which the reset() of the environment needs" in message
    assert message.endswith("; did you mean 'beginn'?")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "environment: required, one of 'game', 'other'; the row does not name it"),
        ({"environment": "gmae"}, "environment: expected one of 'game', 'other', got 'gmae'; did you mean 'game'?"),
        ({"environment": 3}, "environment: expected one of 'game', 'other', got 3"),
        ({"environment": "game"}, "has no key 'begin'"),
    ],
)
def test_a_row_of_no_known_environment(job, row, told):
    job.config["world"] = job.custom("BOTH")
    job.train_on(ROW | {"environment": "other"}, ROW | row)
    assert "train.jsonl, line 2: " in (message := job.told()) and told in message


@pytest.mark.parametrize(
    ("grader", "told"),
    [
        ({"type": "exact", "answer_key": "anser"}, "no gold answer under answer_key 'anser'"),
        ({"type": "numeric", "answer_key": "x"}, "no gold answer under answer_key 'x'"),
        (
            {
                "type": "string_check",
                "operation": "eq",
                "input": "a",
                "reference": "{{item.anwer}}",
            },
            "has no {{ item.anwer }}; its item's keys are: answer, messages; did you mean 'answer'?",
        ),
        (
            {"type": "score_model", "model": "m", "input": [{"role": "user", "content": "{{item.rubric}}"}]},
            "has no {{ item.rubric }}",
        ),
    ],
)
def test_a_row_without_what_the_grader_reads(job, grader, told):
    job.config |= {"grader": grader, "judge": {"base_url": "http://127.0.0.1:1/v1"}}
    job.train_on(ROW | {"answer": "2", "anser": "2", "x": "2", "anwer": "2", "rubric": "r"}, ROW)
    message = job.told()
    assert "train.jsonl, line 2: " in message and told in message


def test_a_row_without_a_reward_functions_column(job):
    job.config["grader"] = job.custom("reward")
    job.train_on(ROW | {"golden": "1"})
    message = job.told()
    assert "train.jsonl, line 1: " in message and "has no key 'gold', which the function needs" in message
    assert "did you mean 'golden'?" in message


def test_the_watching_grader_is_told_from_the_one_that_is_trained_on(job):
    job.config["watch_grader"] = {"type": "exact", "answer_key": "gold"}
    assert job.told().startswith("watch_grader: ")


def test_a_misspelt_keyword_in_a_rows_tool(job):
    job.config["rollout"] = {"answer": "tool_calls"}
    about = {"name": "search", "parameters": {"type": "object", "properties": {"n": {"type": "integer", "minimun": 1}}}}
    job.train_on(ROW | {"tools": [{"type": "function", "function": about}]})
    message = job.told()
    assert "train.jsonl, line 1: tools: tool 'search': parameters: not a JSON schema: properties.n.minimun" in message
    assert message.endswith("did you mean 'minimum'?")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "rows.csv",
            "question,answer\nHow much?,1\n",
            "rows.csv, line 1: .*expected a JSONL file, or a folder of ",
        ),
        ("rows.parquet", "PAR1", "rows.parquet, line 1: .*or a folder of Parquet, JSON or CSV files"),
        ("row.jsonl", "", "row.jsonl: no rows"),
    ],
)
def test_files_that_hold_no_rows_as_jsonl(job, name, content, told):
    import re

    job.config["data"] = {"train": job.file(name, content), "eval": job.rows(ROW)}
    assert re.search(told, job.told())


def test_a_folder_in_place_of_a_file_and_a_misspelt_file(job):
    job.config["data"]["train"] = str(job.folder)
    assert "Is a directory; expected a JSONL file, or a folder of Parquet" in job.told()
    job.config["data"]["train"] = str(job.folder / "rowz.jsonl")
    assert "No such file or directory; did you mean 'rows.jsonl'?" in job.told()


def test_calls_as_the_answer_where_nothing_can_be_called(job):
    job.config["rollout"] = {"answer": "tool_calls"}
    assert "rollout.answer: tool_calls, but neither rows nor world offer a tool" in job.told()


def test_an_adapter_in_place_of_a_model(job):
    (job.folder / "model").mkdir()
    job.file("model/adapter_config.json", {})
    assert "holds an adapter, not the model that it goes with" in job.told()


def test_tools_over_http_that_no_row_offers(job):
    job.config["world"] = {"type": "remote", "tools": [{"name": "search", "server_url": "http://127.0.0.1:1/call"}]}
    assert "world.tools: no row offers search, so no model would ever see them" in job.told()


# ---- the user's own code


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NOTHING", "expected a world (make_env), an environment"),
        ("Broken", "raised FileNotFoundError: [Errno 2] No such file or directory: '/no/such/prices.json' ("),
        ("Bare", "make_env() gives object, which has no tools; see envs/base.py: Env"),
        ("Plain", "Plain.tools['f']: expected a Tool, as envs.tools.tool makes it of a function, got builtin_function"),
        ("Listed", "Listed.tools: expected tools by name, got list"),
    ],
)
def test_a_target_that_is_no_world(job, name, told):
    job.config["world"] = job.custom(name)
    assert told in job.told()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("World", "tasks('train'): expected a list of envs.types.Task, with one at least, got ()"),
        ("Odd", "tasks('train'): expected a list of envs.types.Task"),
        ("Buggy", "tasks('train'): raised KeyError: 'nothing' ("),
    ],
)
def test_a_world_whose_tasks_are_none(job, name, told):
    job.config |= {"world": job.custom(name), "data": None}
    assert told in job.told()


def test_a_grader_that_cannot_be_made(job):
    job.config["grader"] = job.custom("Broken")
    assert "raised FileNotFoundError: [Errno 2] No such file or directory: '/no/such/prices.json' (" in job.told()


# ---- the warm start and the curriculum


def test_a_warm_start_with_nothing_to_imitate(job):
    assert "warmstart: there is nothing to imitate: warmstart.data names no" in job.told("warmstart.num_steps=2")
    job.config["world"] = job.custom("World")
    assert "warmstart: there is nothing to imitate: warmstart.data names no" in job.told("warmstart.num_steps=2")


def test_a_preflight_of_other_tasks(job):
    row = {"n": 4, "mean": 0.5, "best": 1, "worst": 0, "std": 0.5}
    job.config["curriculum"] = {"preflight": job.file("preflight.json", {"tasks": {"task-9": row}})}
    assert "preflight.json: knows none of the training tasks (it has 'task-9', the run has 'row-1')" in job.told()


# ---- graders in files


@pytest.mark.parametrize(
    ("grader", "told"),
    [
        ({"type": "string_check", "operation": "eq", "input": "x"}, "grader.reference: required, but not given; in "),
        ({"type": "string_chek"}, "grader.type: expected one of 'exact', 'numeric', "),
        (
            {"type": "string_check", "operation": "eq", "input": "{{x}}", "reference": "y"},
            "can't read the variable",
        ),
        ({"type": "python", "source": "def grade(sample):\n    return 1"}, "line 1: expected grade(sample, item)"),
        (
            {
                "type": "multi",
                "graders": {"a": {"type": "exact"}},
                "calculate_output": "a + b",
            },
            "calculate_output: character 5: expected a grader's name (a)",
        ),
    ],
)
def test_the_file_of_a_bad_grader_is_named(job, grader, told):
    job.config["grader"] = job.file("grader.json", grader)
    message = job.told()
    assert str(job.folder / "grader.json") in message and str(job.folder / "config.yaml") in message
    assert told in message


def test_tools_in_a_file_are_named_with_it(job):
    job.config["world"] = {"type": "remote", "tools": job.file("tools.json", [{"name": "a", "server_ulr": "http://x"}])}
    message = job.told()
    assert "world.tools.0.server_ulr: unknown key; did you mean server_url?; in " in message
    assert message.count(str(job.folder / "tools.json")) == 2


# ---- servers


def test_servers_that_are_not_there_are_named_with_key_and_url(job):
    port = free_port()
    url = f"http://user:pa55word@127.0.0.1:{port}"
    job.config["world"] = {
        "type": "remote",
        "tools": [{"name": "search", "server_url": f"{url}/call"}],
        "close_url": f"{url}/close",
        "user": {"type": "url", "url": f"{url}/user"},
    }
    judged = {"type": "score_model", "model": "m", "input": [{"role": "user", "content": "?"}]}
    job.config |= {
        "grader": {"type": "multi", "graders": {"e": {"type": "endpoint", "url": f"{url}/grade"}, "j": judged}},
        "judge": {"base_url": f"{url}/v1"},
    }
    job.config["grader"]["calculate_output"] = "e + j"
    job.train_on(ROW | {"tools": [SEARCH]})
    message = job.told()
    for key in ("world.tools.0.server_url", "world.close_url", "world.user.url", "grader.graders.e.url"):
        assert f"{key} http" in message
    assert "judge.base_url http" in message and message.count("nobody answers there (Connection refused)") == 5
    assert f":{port}/v1" in message and "pa55word" not in message


def test_a_judge_that_no_grader_asks_is_not_looked_for(job):
    job.config["judge"] = {"base_url": f"http://127.0.0.1:{free_port()}/v1"}
    assert (message := job.told()).startswith("model.name") and "judge.base_url" not in message


def test_a_key_that_the_judge_refuses(job, monkeypatch):
    asked: list[tuple[str, str | None]] = []

    class Judge(http.server.BaseHTTPRequestHandler):
        status = 401

        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(self.status)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setenv("MY_KEY", "k3y")
    judged = {"type": "score_model", "model": "m", "input": [{"role": "user", "content": "?"}]}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        job.config |= {"grader": judged, "judge": {"base_url": url, "api_key_env": "MY_KEY"}}
        assert job.told().startswith(f"judge.api_key_env: {url} refuses the key in MY_KEY (HTTP 401)")
        for Judge.status in (200, 307, 403, 404, 500):
            assert job.told().startswith("model.name")
        server.shutdown()
    assert set(asked) == {("/v1/models", "Bearer k3y")}


def test_a_judge_that_sends_a_byte_now_and_then_does_not_keep_the_run_from_starting(job, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k3y")
    monkeypatch.setattr("trainer.reachable._CONNECT_S", 0.5)
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        while not ended.is_set():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                while not ended.wait(0.1):
                    connection.send(b"H")

    judged = {"type": "score_model", "model": "m", "input": [{"role": "user", "content": "?"}]}
    with socket.create_server(("127.0.0.1", 0)) as server:
        dripping = threading.Thread(target=drip, args=(server,), daemon=True)
        dripping.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        job.config |= {"grader": judged, "judge": {"base_url": url, "api_key_env": "MY_KEY"}}
        assert job.told().startswith("model.name")
        ended.set()
        dripping.join()


def test_a_server_that_listens_is_asked_nothing(job):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/grade"
        job.config["grader"] = {"type": "endpoint", "url": url}
        assert "model.name" in job.told()
        connection, _ = server.accept()
        with connection:
            assert connection.recv(100) == b""


def test_an_mcp_server_that_ends_at_once_is_named_with_key_and_what_it_said(job):
    script = "import sys; sys.exit('no database at /data')"
    server = {"name": "files", "command": sys.executable, "args": ["-c", script], "start_timeout_s": 600}
    job.config["world"] = {"mcp": [server]}
    message = job.told()
    assert message.startswith("world.mcp.0: MCP server 'files' can't be reached: ")
    assert "it said: no database at /data" in message
    job.config["world"] = {"mcp": [{"name": "web", "url": f"http://127.0.0.1:{free_port()}/mcp"}]}
    assert (message := job.told()).startswith("world.mcp.0, http://127.0.0.1:") and "'web' can't be reached" in message


# ---- the config and what is beside it


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("eval={num_tasks: 1, num_tasks: 2}", "the key 'num_tasks' stands twice in one mapping"),
        ("=5", "override '=5': expected KEY=VALUE"),
        ("optim.=5", "override 'optim.=5': expected KEY=VALUE"),
        ("data.train.0=5", "train is not a section but '"),
        ("optim.learning_rate=.inf", "optim.learning_rate: Input should be a finite number"),
        ("world=finance", "world: expected settings, such as {type: finance, ...} (got 'finance')"),
        ("grader=numeric", "grader: expected settings or the path of a file, such as {type: numeric, ...}"),
        ("world={type: finanse}", "world.type: expected one of 'finance', 'remote', 'custom' (got 'finanse'); did you"),
        ("grader={answer_key: a}", "grader.type: required, one of 'exact', 'numeric', "),
        ("model=3", "model: Input should be a valid dictionary (got 3)"),
        ("judge.base_url=localhost:8000", "judge.base_url: expected a URL that begins with http:// or https://"),
        ("judge.base_url=http://h/v1/chat/completions", "judge.base_url: expected the URL up to /v1"),
        ("grader={type: custom, target: my_rewards}", "grader.target: expected `package.module:Name` or `path/to/file"),
        ("grader={type: label_model}", "grader.type: expected one of "),
        (
            "world.user={type: modle}",
            "world.user.type: expected one of 'script', 'url', 'model', 'engine' (got",
        ),
        ("data.train={dataset: a, splt: b}", "data.train.splt: unknown key; did you mean split?"),
    ],
)
def test_settings_that_cannot_be_meant(job, override, told):
    assert told in job.told(override)


def test_a_user_who_may_never_speak(job):
    job.config["world"] = {"user": {"type": "url", "url": "http://127.0.0.1:1"}}
    assert "world.user: rollout.max_user_turns is 0" in job.told("rollout.max_user_turns=0")


def test_sections_that_say_nothing_are_as_if_they_were_not_there(job):
    path = job.file("config.yaml", yaml.safe_dump(job.config) + "optim:\nrollout:\npenalties:\njudge:\nworld:\n")
    assert load_config(Path(path)) == load_config(Path(job.file("plain.yaml", yaml.safe_dump(job.config))))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "seed"], "--set 'seed': expected KEY=V1,V2"),
        (["--set", "seed=0,,1"], "--set 'seed=0,,1': expected KEY=V1,V2"),
        (["--set", "seed=0,0"], "--set 'seed=0,0': 0 stands twice; expected each value once"),
        (["--set", "seed=0", "--set", "seed=1"], "--set 'seed=1': its values stand twice"),
        (["--set", "output_dir=a,b"], "--set 'output_dir=a,b': each run has a folder of its own"),
        (["--set", "sed=0,1"], "sed: unknown key; did you mean seed?"),
        (["--launch", "acelerate launch"], "--launch 'acelerate launch': no such command"),
        (["--launch", "'"], '--launch "\'": No closing quotation'),
    ],
)
def test_sweeps_that_cannot_be_meant(job, arguments, told):
    config = job.file("config.yaml", yaml.safe_dump(job.config))
    done = run_script("sweep", "--config", config, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr


# ---- what is written in the end


@pytest.mark.parametrize(
    ("name", "is_folder", "told"),
    [
        ("mine.py", True, "--out .*mine.py: is a file; expected a folder"),
        ("mine.py/a/b", True, "--out .*: .*mine.py is a file; expected a folder"),
        (".", False, "--out .*: is a folder; expected a file"),
        ("none/graded.jsonl", False, "--out .*: there is no folder .*none"),
        # Root may do anything there by its modes, and yet nothing can be made.
        ("/proc/a", True, "--out /proc/a: can't be written: /proc takes no files: No such file"),
        ("/proc/graded.jsonl", False, "--out /proc/graded.jsonl: can't be written: /proc takes no files"),
        ("a" * 300, True, "--out .*: can't be written: .*: File name too long"),
        ("gone/run", True, "--out .*gone/run: .*gone is a link to what is not there"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(job, name, is_folder, told):
    (job.folder / "gone").symlink_to(job.folder / "unmounted")
    with pytest.raises(UserError, match=told):
        check_writable(job.folder / name, "--out", is_folder=is_folder)
    check_writable(job.folder / "new" / "er", "--out", is_folder=True)
    check_writable(job.folder / "graded.jsonl", "--out")
    assert not (job.folder / "new").exists() and not (job.folder / "graded.jsonl").exists()


def test_a_preflight_without_its_rollouts_is_no_policy(job):
    job.file("preflight.json", {})
    with pytest.raises(UserError, match=r"rollouts\.jsonl: no such file; expected the rollouts of a run or of a pref"):
        read_evaluations([f"a={job.folder}", f"b={job.folder}"])
