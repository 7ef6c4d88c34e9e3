"""Talking to a run's agent: the rollouts' own episode, with a person in the user's place."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from envs.errors import UserError
from envs.types import Message
from tests.support import ROOT
from tests.support.run_server import SMALL, Server, write_config
from tests.support.scripted_engine import BROKEN_CALL, Faults, call, engine_starter
from tests.support.scripts import run_script
from tests.support.servers import HANGS, scripted_policy
from tests.support.terminal import installed, terminal
from trainer.talk.agent import Options, open_agent
from trainer.talk.terminal import Talk, talk
from trainer.templates.chat import Chat

SCRIPT = str(ROOT / "scripts" / "chat.py")
SLOW_TOOL = '''import time


def wait(seconds: int) -> str:
    """Wait.

    Args:
        seconds: so long.
    """
    time.sleep(seconds)


TOOLS = [wait]
'''
in_a_terminal = pytest.mark.skipif(not installed(), reason="tmux is not installed")


@pytest.fixture(scope="module")
def finished_run(server: Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk") / "run"
    assert server.outcome(write_config(folder, tiny_model, 2, **SMALL)) == ""
    return folder


@pytest.fixture(scope="module")
def tiny_chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


def agent(prompt: str, seed: int) -> str:
    """Looks once for every question, and counts the questions that it has heard."""
    questions = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.S)
    last = questions[-1]
    if "hang" in last:
        return HANGS
    if "break" in last:
        return BROKEN_CALL
    if last.startswith("Error: your tool call"):
        return "I give up"
    if call("search", query=last[:20]) not in prompt:
        return call("search", query=last[:20])
    return f"answer {len(questions)}"


def said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: Options,
    lines: Sequence[str],
    *,
    faults: Faults | None = None,
) -> str:
    """What stands on the screen when these lines have been typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    with open_agent(options, start_engine=engine_starter(agent, faults)) as opened:
        capsys.readouterr()
        talk(opened)
    return capsys.readouterr().out


def digests(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_conversation_shows_calls_and_results_remembers_and_begins_anew_after_reset(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    before = digests(finished_run)
    lines = ["revenue of Mercury?", "and debt?", "/reset", "break it", "/nonsense", "/quit", "never read"]
    screen = said(monkeypatch, capsys, Options(run=finished_run), lines)
    first, _, rest = screen.partition("agent> answer 1")
    assert "tools: " in first and '→ search(query="revenue of Mercury?")' in first and "mercury-" in first
    second, _, rest = rest.partition("agent> answer 2")
    assert '→ search(query="and debt?")' in second
    assert f"agent> {BROKEN_CALL}" in rest and "told> Error: your tool call could not be parsed" in rest
    assert "agent> I give up" in rest and "/nonsense: no such command" in rest and "never read" not in screen
    assert digests(finished_run) == before


def test_a_task_of_the_run_is_played_and_graded_as_the_run_grades(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    options = Options(run=finished_run, step=2, task=1, grades=True)
    screen = said(monkeypatch, capsys, options, ["/tasks", "/task 99", "/task 2", "/reset"])
    assert re.search(r"^told> What was|^told> How many", screen, re.M) and "agent> answer 1" in screen
    assert re.search(r"^   1  held out  .*\n   2  held out", screen, re.M) and "   6  training" in screen
    assert "task 99: expected a number from 1 to 6" in screen
    assert len(re.findall(r"^reward 0\.000 \(numeric", screen, re.M)) == 2


def test_a_lost_turn_ends_the_conversation_and_not_the_program(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    screen = said(
        monkeypatch, capsys, Options(run=finished_run), ["one?", "two?"], faults=Faults(failing_requests=frozenset({2}))
    )
    assert "the world failed, and the conversation is over: request 2 failed" in screen
    assert "agent> answer 1" in screen.partition("request 2 failed")[2]


def test_a_conversation_that_is_full_says_so(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    options = Options(run=finished_run, overrides=["rollout.max_episode_tokens=400"])
    screen = said(monkeypatch, capsys, options, ["revenue of Mercury?", "debt? " * 200])
    assert "the conversation is over: its tokens are used up (rollout.max_episode_tokens)" in screen


def test_nothing_that_is_said_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\x9b31mred\u202e\x00 [bold]end[/bold]"
    shown = object.__new__(Talk)
    from envs.terminal import console

    shown._console = console()
    for role in ("assistant", "tool", "user", "system"):
        shown._tell(Message(role=role, content=hostile, reasoning=hostile))
    printed = capsys.readouterr().out
    assert printed.count("[bold]end[/bold]") == 8 and not {*"\x1b\x07\x9b\x00\u202e"} & {*printed}


@contextlib.contextmanager
def edited(run: Path, folder: Path, change: Callable[[dict[str, object]], object]) -> Iterator[Path]:
    copy = shutil.copytree(run, folder / "copy")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    change(config)
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    yield copy


def test_what_cannot_be_had_is_told_before_anything_is_loaded(finished_run: Path, tmp_path: Path) -> None:
    def refusal(**given: object) -> str:
        with pytest.raises(UserError) as told, open_agent(Options(**{"run": finished_run} | given)):  # type: ignore[arg-type]
            pass
        return str(told.value)

    (tmp_path / "young").mkdir()
    shutil.copy(finished_run / "config.yaml", tmp_path / "young")
    assert "there is no such folder" in refusal(run=tmp_path / "nowhere")
    assert "holds no config.yaml" in refusal(run=tmp_path)
    assert "holds neither a final adapter nor a checkpoint yet" in refusal(run=tmp_path / "young")
    assert "keeps no checkpoint of that step; it keeps those of" in refusal(step=77)
    assert "--step: only without --url" in refusal(step=2, url="http://127.0.0.1:1")
    assert "--model: only with --url" in refusal(model="policy")
    assert "nobody answers there" in refusal(url="http://127.0.0.1:9")
    assert "not the URL of a server" in refusal(url="ftp://x")
    assert "expected a number from 1 to 6" in refusal(task=0)
    assert "--temperature nan" in refusal(temperature=float("nan"))
    assert "rollout.max_turnz" in refusal(overrides=["rollout.max_turnz=3"])


def test_a_server_is_asked_with_its_key_for_a_model_that_it_serves(
    finished_run: Path, tiny_chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_policy(tiny_chat, agent, key="sesame-0123") as url:
        options = Options(run=finished_run, url=f"{url}/v1", api_key_env="MY_KEY")
        with pytest.raises(UserError, match=r"refuses the key in MY_KEY \(HTTP 401\)"), open_agent(options):
            pass
        monkeypatch.setenv("MY_KEY", "sesame-0123")
        with pytest.raises(UserError, match="serves no model 'other'; name one of base, policy with --model"):
            open_agent(Options(run=finished_run, url=url, api_key_env="MY_KEY", model="other")).__enter__()
        screen = said(monkeypatch, capsys, options, ["one?", "two?", "/quit"])
    assert f"policy at {url}/v1" in screen and "agent> answer 1" in screen and "agent> answer 2" in screen


@in_a_terminal
def test_on_a_terminal_ctrl_c_ends_a_turn_and_the_conversation_goes_on(finished_run: Path, tiny_chat: Chat) -> None:
    with scripted_policy(tiny_chat, agent) as url:
        command = [sys.executable, SCRIPT, str(finished_run), "--url", url]
        with terminal(command, width=100, height=40) as window:
            window.wait(lambda text: "you>" in text)
            window.keys("please hang", "Enter")
            window.wait(lambda text: "please hang\n" in text)
            window.keys("C-c")
            window.wait(lambda text: re.search(r"\(interrupted\)\s+you>", text))
            window.keys("now?", "Enter")
            shown = window.wait(lambda text: "agent> answer 2" in text)
            assert '→ search(query="now?")' in shown
            window.keys("/quit", "Enter")
            window.wait(lambda text: "ended: 0" in text)


@in_a_terminal
def test_a_second_ctrl_c_ends_the_program_whatever_it_waits_for(finished_run: Path, tiny_chat: Chat) -> None:
    with scripted_policy(tiny_chat, agent) as url:
        command = [sys.executable, SCRIPT, str(finished_run), "--url", url]
        with terminal(command, width=100, height=40) as window:
            window.wait(lambda text: "you>" in text)
            window.keys("C-c")
            window.wait(lambda text: "Ctrl-C once more" in text)
            window.keys("C-c")
            window.wait(lambda text: "ended: 130" in text)


@in_a_terminal
def test_a_tool_that_hangs_holds_up_the_turn_and_not_the_end_of_the_program(
    finished_run: Path, tmp_path: Path, tiny_chat: Chat
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_TOOL)
    row = {"messages": [{"role": "user", "content": "wait"}], "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def waiting(config: dict[str, object]) -> None:
        config["world"] = {"type": "custom", "target": f"{tmp_path / 'slow.py'}:TOOLS"}
        config["data"] = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")}
        config["grader"] = {"type": "exact"}

    with (
        edited(finished_run, tmp_path, waiting) as run,
        scripted_policy(tiny_chat, lambda *_: call("wait", seconds=100)) as url,
    ):
        command = [sys.executable, SCRIPT, str(run), "--url", url, "--task", "1"]
        with terminal(command, width=100, height=40) as window:
            window.wait(lambda text: "→ wait(seconds=100)" in text)
            window.keys("C-c")
            window.wait(lambda text: "ending the turn" in text)
            window.keys("C-c")
            window.wait(lambda text: "ended: 130" in text, timeout_s=50)


@pytest.mark.parametrize("typed", ["", "please hang\n"])
def test_what_ends_other_programs_ends_this_one_at_once_at_its_prompt_and_in_a_turn(
    finished_run: Path, tiny_chat: Chat, typed: str
) -> None:
    is_asked = threading.Event()

    def hangs(prompt: str, seed: int) -> str:
        if "hang" in prompt:
            is_asked.set()
        return agent(prompt, seed)

    pipe = subprocess.PIPE
    with scripted_policy(tiny_chat, hangs) as url:
        command = [sys.executable, SCRIPT, str(finished_run), "--url", url]
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdin and process.stdout
            while "/help names the commands" not in process.stdout.readline():
                assert process.poll() is None
            process.stdin.write(typed)
            process.stdin.flush()
            assert not typed or is_asked.wait(60)
            process.terminate()
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted") and "once more" not in out


def test_the_script_ends_with_one_clear_line(finished_run: Path) -> None:
    done = run_script("chat", finished_run, "--url", "http://127.0.0.1:9")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --url http://127.0.0.1:9: nobody")
    assert not done.loaded, "a server that is not there is told before anything takes long"


def test_a_world_with_a_simulated_user_has_the_person_in_its_place(
    finished_run: Path,
    tmp_path: Path,
    tiny_chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    system, user = {"role": "system", "content": "You count."}, {"role": "user", "content": "the row's own"}
    rows.write_text(json.dumps({"messages": [system, user], "answer": "1"}) + "\n")

    def served(config: dict[str, object]) -> None:
        config["world"] = {"type": "remote", "user": {"type": "url", "url": "http://127.0.0.1:9/gone"}}
        config["data"] = {"train": str(rows), "eval": str(rows)}
        config["grader"] = {"type": "exact"}

    def counts(prompt: str, seed: int) -> str:
        return f"{prompt.count('<|im_start|>user')} {'You count.' in prompt} {'own' in prompt}"

    with edited(finished_run, tmp_path, served) as run, scripted_policy(tiny_chat, counts) as url:
        screen = said(monkeypatch, capsys, Options(run=run, url=url), ["one?", "two?", "/task 1"])
    assert "agent> 1 True False" in screen and "agent> 2 True False" in screen and "agent> 1 True True" in screen
    assert "system> You count." in screen
