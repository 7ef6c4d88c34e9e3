"""Adapters in a vLLM server that runs, started as its users start it, and the proof of what it answers as."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from envs.errors import UserError
from tests.support import ROOT
from tests.support.run_server import Server, write_config
from tests.support.servers import free_port, running_vllm
from trainer.exports.artefact import Artefact, export, servable
from trainer.exports.deploy import deploy
from trainer.exports.proof import Proof
from trainer.exports.trained import Trained, find_trained
from trainer.runs.canary_record import read_canary

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]
KEY = "key-of-the-test"


@pytest.fixture(scope="module")
def taught_run(server: Server, taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps; the last two have a checkpoint."""
    folder = tmp_path_factory.mktemp("deployed") / "run"
    server.start(write_config(folder, taught_model, 3, optim={"num_steps": 3, "learning_rate": 1e-2}))
    assert server.wait() == 0
    return folder


@pytest.fixture(scope="module")
def last(taught_run: Path) -> Trained:
    return find_trained(taught_run)


@pytest.fixture(scope="module")
def second(taught_run: Path) -> Trained:
    return find_trained(taught_run, 2)


@pytest.fixture(scope="module")
def url(taught_run: Path) -> Iterator[str]:
    """What `scripts/serve.py` becomes."""
    serve = [sys.executable, "scripts/serve.py", str(taught_run), "--", "--api-key", KEY, "--max-loras", "2"]
    with contextlib.ExitStack() as stack:
        # For this server alone.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
            address = stack.enter_context(running_vllm(serve, taught_run.parent / "log"))
        yield address


def asked(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def names(url: str) -> set[str]:
    return {model["id"] for model in asked(url, "/v1/models")["data"]}


def deployed(trained: Trained, url: str, name: str, folder: Path | None = None) -> Proof:
    return deploy(trained, url, str(folder or servable(trained)), name=name, api_key=KEY)


def test_serve_serves_the_policy_under_the_runs_template_and_it_is_proved(last, url):
    proof = deployed(last, url, "policy")
    assert proof.step == 3 and proof.mismatch < 0.02 and proof.share_of_base == pytest.approx(1, abs=0.05)
    assert not proof.alike, "the steps differ clearly"
    body = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert asked(url, "/v1/chat/completions", body)["model"] == "policy"


def test_the_command_puts_the_adapter_into_the_running_server_under_a_name(last, url):
    command = [sys.executable, "scripts/export.py", last.run, "--deploy", url, "--name", "fresh"]
    ended = subprocess.run(
        [*map(str, command), "--api-key-env", "SERVERS_KEY"],
        cwd=ROOT,
        env=os.environ | {"SERVERS_KEY": KEY},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"fresh on {url} answers as {last.run} after step 3" in ended.stdout
    assert ended.stderr == f"asking {url} for the canary's log-probabilities, of its base and of fresh\n"
    assert "fresh" in names(url)


def test_a_server_with_an_older_version_under_the_name_is_refused_and_keeps_it(last, second, url):
    assert deployed(second, url, "agent").step == 2
    with pytest.raises(UserError, match=r"'agent' answers as step 2 of the run, not as step 3: .* it shows \d+%") as e:
        deployed(last, url, "agent")
    assert "Unload it there, or choose another --name" in str(e.value)
    assert "agent" in names(url)
    assert deployed(second, url, "agent").step == 2


def test_what_was_loaded_and_is_another_version_is_unloaded_again(last, second, url):
    with pytest.raises(UserError, match=r"answers as step 2 of the run, not as step 3: .* has been unloaded again"):
        deployed(last, url, "wrong", servable(second))
    assert "wrong" not in names(url)


def test_a_server_of_another_base_is_refused_with_figures(finished, url):
    with pytest.raises(UserError, match=r"the server's base model, is not the one .* by \d\.\d+ nats a token"):
        deployed(find_trained(finished), url, "other")
    assert "other" not in names(url)


def test_a_folder_that_the_server_does_not_see_is_told_in_its_words(last, url):
    with pytest.raises(UserError, match=r"load_lora_adapter: 4\d\d: .*nowhere") as e:
        deployed(last, url, "missing", Path("/nowhere/adapter"))
    assert "\n" not in str(e.value)


def test_a_wrong_key_is_told(last, url):
    with pytest.raises(UserError, match=r"refuses the key \(401\)"):
        deploy(last, url, str(last.adapter), name="policy", api_key="another")


def test_a_server_that_takes_no_adapters_is_told_how_to_be_started(last, served):
    with pytest.raises(UserError, match="start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        deploy(last, served, str(last.adapter), name="agent")


def test_a_server_that_is_gone_is_told(last):
    with pytest.raises(UserError, match=r"no answer .* is the server running there"):
        deploy(last, f"http://127.0.0.1:{free_port()}/v1", str(last.adapter), name="policy")


def test_the_served_adapter_writes_what_merged_weights_write_in_transformers(last, url, tmp_path):
    folder = export(last, Artefact(form="merged", to=tmp_path / "merged"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = read_canary(last.run, 3).token_ids[0][:120]
    body = {"model": "policy", "prompt": prompt, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    own = asked(url, "/v1/completions", body)["choices"][0]["token_ids"]
    with torch.no_grad():
        made = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert own == made
