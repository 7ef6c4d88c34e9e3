"""`--deploy` and servers that answer what no vLLM does: one line that says what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from envs.errors import UserError
from envs.reading.variables import key_of
from envs.secrets import hidden_in
from trainer.exports import deploy as deploying
from trainer.exports.deploy import deploy
from trainer.exports.trained import find_trained
from trainer.runs.canary_record import read_canary


@contextmanager
def odd_server(run: Path, **oddities: str) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked to load and unload. It scores as the run's base, but for the oddities."""
    record = read_canary(run, 3)
    told: list[str] = []
    by_ids: dict[tuple[int, ...], list[float]] = {}
    base = iter(record.base)
    for ids in record.token_ids:
        by_ids[tuple(ids)] = [next(base) for _ in ids[1:]]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def answer(self, text: str, code: int = 200) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            if "drips" in oddities:
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.05)
                return
            self.answer(oddities.get("models") or json.dumps({"data": [{"id": "base"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("_lora_adapter"):
                told.append(self.path.rpartition("/")[2])
                refused = "unload" in self.path and "unload" in oddities
                self.answer(
                    json.dumps({"error": {"message": "cannot"}}) if refused else "done", 400 if refused else 200
                )
                return
            ids = body["prompt"]
            logprob = oddities.get("logprob") if body["model"] != "base" else None
            scores = [{str(i): {"logprob": x}} for i, x in zip(ids[1:], by_ids[tuple(ids)], strict=True)]
            text = json.dumps({"choices": [{"prompt_logprobs": [None, *scores]}]})
            if logprob:
                first = json.dumps(scores[0])
                text = text.replace(first, f'{{"{ids[1]}": {{"logprob": {logprob}}}}}', 1)
            self.answer(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", told
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"data": ' + "1" * 5000 + "}", "NaN", "[]", ""])
def test_what_is_no_list_of_models_is_said_in_a_line(finished, text):
    with (
        odd_server(finished, models=text or " ") as (url, _),
        pytest.raises(UserError, match=r"expected a vLLM server"),
    ):
        deploy(find_trained(finished), url, "/adapter", name="policy")


@pytest.mark.parametrize("logprob", ["1" + "0" * 400, "-Infinity", "NaN", '"x"', "null", "-1e999"])
def test_what_is_no_log_probability_proves_nothing_and_is_unloaded(finished, logprob):
    said = r"expected a vLLM server\. It has been unloaded again$"
    with odd_server(finished, logprob=logprob) as (url, told), pytest.raises(UserError, match=said):
        deploy(find_trained(finished), url, "/adapter", name="policy")
    assert told == ["load_lora_adapter", "unload_lora_adapter"]


def test_an_adapter_that_proves_nothing_and_can_not_be_unloaded_is_said_to_be_there_still(finished):
    said = r"answers as its base model, not as step 3: .*still loaded.*400: cannot$"
    with odd_server(finished, unload="refused") as (url, told), pytest.raises(UserError, match=said):
        deploy(find_trained(finished), url, "/adapter", name="policy")
    assert told == ["load_lora_adapter", "unload_lora_adapter"]


def test_an_answer_that_never_ends_is_given_up(finished, monkeypatch):
    monkeypatch.setattr(deploying, "_LIST_S", 0.5)
    with odd_server(finished, drips="yes") as (url, _):
        start = time.monotonic()
        with pytest.raises(UserError, match=r"no answer \(its answer does not end\)"):
            deploy(find_trained(finished), url, "/adapter", name="policy")
        assert time.monotonic() - start < 8


def test_a_key_loses_its_line_break_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("SERVER", "geheimnis-42\n")
    assert key_of("SERVER", "--api-key-env") == "geheimnis-42"
    assert "geheimnis" not in hidden_in("it was geheimnis-42")
    for value in ("geheim\nx", "geheimñ", "ge\x00heim"[:2] + "\x7fheim"):
        monkeypatch.setenv("SERVER", value)
        with pytest.raises(UserError, match=r"^--api-key-env: SERVER holds characters that no header can") as told:
            key_of("SERVER", "--api-key-env")
        assert "heim" not in str(told.value)
