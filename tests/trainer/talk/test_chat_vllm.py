"""Talking to a run's agent on a real engine, in a real terminal."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from envs.errors import UserError
from tests.support import ROOT
from tests.support.run_server import SMALL, Server, write_config
from tests.support.servers import ENVIRONMENT
from tests.support.terminal import installed, terminal
from tests.trainer.talk.test_chat import said
from trainer.talk.agent import Options, open_agent

pytestmark = pytest.mark.vllm
START_S = 400.0


def test_a_server_that_serves_the_policy_is_asked_by_token_ids(
    served: str,
    server: Server,
    taught_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert server.outcome(write_config(tmp_path / "run", taught_model, 1, **SMALL)) == ""
    options = Options(run=tmp_path / "run", url=served, temperature=0.0)
    shown = said(monkeypatch, capsys, options, ["/task 1", "And the year before?", "/quit"])
    # What it has learned by heart has the right form, and need not lead to an answer.
    assert f"policy at {served}" in shown and len(re.findall(r"^agent> |^  → ", shown, re.M)) >= 2
    assert "world failed" not in shown
    with (
        pytest.raises(UserError, match=r"serves no model 'base'; name one of policy, judge with --model"),
        open_agent(Options(run=tmp_path / "run", url=served, model="base")),
    ):
        pass


@pytest.mark.skipif(not installed(), reason="tmux is not installed")
def test_a_turn_that_ctrl_c_ends_leaves_the_engine_and_the_conversation_as_they_were(
    server: Server, taught_model: Path, tmp_path: Path
) -> None:
    small = SMALL | {"engine": {"enforce_eager": True, "max_num_seqs": 4, "kv_cache_gib": 0.25}}
    assert server.outcome(write_config(tmp_path / "run", taught_model, 1, **small)) == ""
    # A turn long enough to be interrupted; then few more, whatever this policy babbles, until its tokens are used up.
    limits = ["rollout.max_turn_tokens=400", "rollout.max_episode_tokens=600"]
    command = [sys.executable, str(ROOT / "scripts" / "chat.py"), str(tmp_path / "run"), *limits]
    with terminal(command, width=100, height=40, environment=ENVIRONMENT) as window:
        window.wait(lambda text: re.search(r"you>\s*$", text), timeout_s=START_S)
        window.keys("What was the revenue of Mercury Bank in 2014?", "Enter")
        window.keys("C-c")
        window.wait(lambda text: "ending the turn" in text and re.search(r"you>\s*$", text))
        window.keys("/task 1", "Enter")
        ends = r"(tokens so far\)|its tokens are used up \(rollout\.max_episode_tokens\))"
        shown = window.wait(lambda text: re.search(rf"agent> (.|\n)*{ends}\s+you>\s*$", text))
        assert "told> " in shown
        window.keys("/quit", "Enter")
        window.wait(lambda text: "ended: 0" in text)
