"""The transcript viewer's page, unpacked again: what it holds, and what must never stand in it."""

import base64
import hashlib
import itertools
import json
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from envs.types import Message, StopReason, ToolErrorKind, Turn
from tests.support.written_runs import HOSTILE, LOGPROBS, PARTS, TRAINER, make_rollout, word, write_run
from trainer.learning.samples import rollout_samples
from trainer.reports.run_report import write_report
from trainer.reports.transcripts import write as transcripts
from trainer.reports.transcripts.records import MALFORMED_CALL, UNKNOWN_TOOL
from trainer.reports.transcripts.write import write_token_figures, write_transcripts
from trainer.runs.files import append_line
from trainer.runs.records import rollout_to_json
from trainer.types import Ledger, Rollout


@dataclass
class Page:
    """The page as the browser's script unpacks it."""

    html: str

    @classmethod
    def of(cls, run: Path, **options: Any) -> "Page":
        return cls(write_transcripts(run, word, **options).read_bytes().decode("utf-8"))

    def unpack(self, name: str) -> Any:
        found = re.search(rf'<script type="application/octet-stream" id="{name}">([A-Za-z0-9+/=]*)</script>', self.html)
        assert found, name
        return json.loads(zlib.decompress(base64.b64decode(found[1])))

    @property
    def notes(self) -> list[str]:
        return self.unpack("index")["notes"]

    @property
    def lines(self) -> list[dict[str, Any]]:
        columns = self.unpack("index")["rollouts"]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def record(self, rollout_id: str) -> dict[str, Any]:
        (line,) = (line for line in self.lines if line["id"] == rollout_id)
        return self.unpack(f"chunk{line['chunk']}")[line["place"]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "run",
        {
            "evals/step-000000.jsonl": [make_rollout("r-eval0-a-0", reward=0.0)],
            "rollouts/step-000001.jsonl": [make_rollout("r-step1-a-10"), make_rollout("r-step1-a-2")],
            "rollouts/step-000001.rank1.jsonl": [make_rollout("r-step1-b-0", reward=None, stop=StopReason.WORLD_FAULT)],
            "evals/step-000001.jsonl": [make_rollout("r-eval1-a-0")],
        },
    )


def test_every_rollout_of_every_step_set_and_process_is_there_in_reading_order(run):
    page = Page.of(run)
    ids = ["r-eval0-a-0", "r-step1-a-2", "r-step1-a-10", "r-step1-b-0", "r-eval1-a-0"]
    assert [line["id"] for line in page.lines] == ids
    assert [(line["set"], line["step"]) for line in page.lines] == [
        ("held out", 0), ("training", 1), ("training", 1), ("training", 1), ("held out", 1),
    ]  # fmt: skip
    assert page.notes == []
    line = page.lines[1] | {"chunk": 0, "place": 0}
    assert line == {
        "id": "r-step1-a-2", "task": "task of r-step1-a-2", "reward": 1.0, "stop": "answered", "tools": ["search"],
        "calls": 1, "tokens": 4, "latency_s": 2.5, "advantage": None, "set": "training", "step": 1, "chunk": 0,
        "place": 0,
    }  # fmt: skip
    assert page.lines[3]["reward"] is None


def test_a_record_holds_turns_calls_outputs_grade_and_latencies(run):
    record = Page.of(run).record("r-eval1-a-0")
    assert record["num_prompt"] == 2
    assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    call, result = record["messages"][2:4]
    assert call["calls"] == [["search", '{"query": "revenue"}']] and call["reasoning"] == "I look it up"
    assert call["facts"] == ["2 tokens", "1.50 s"]
    assert (result["text"], result["facts"]) == ("Revenue 42", ["2 tokens", "250 ms"])
    (grade,) = record["grades"]
    assert (grade["reward"], grade["parts"], grade["explanation"]) == (1.0, [["numeric", 1.0]], "as it should be")
    assert ["latency", "2.50 s"] in record["facts"]
    assert '"answer": "42"' in record["item"]


def test_what_a_simulated_user_said_is_told_from_the_prompt_and_from_answers_to_malformed_calls(tmp_path):
    rollout = make_rollout("r")
    last = rollout.episode.turns[-1]
    said = Message(role="assistant", content="Which year?")
    asked = Turn(message=said, reply="2023.", reply_s=1.5)
    oops = Turn(message=Message(role="assistant", content="oops"), malformed=True)
    error = Message(role="user", content="Error: your tool call could not be parsed.")
    messages = (*rollout.episode.messages[:2], said, Message(role="user", content="2023."), oops.message, error)
    episode = replace(rollout.episode, messages=(*messages, last.message), turns=(asked, oops, last))
    record = Page.of(
        write_run(tmp_path / "run", {"evals/step-000000.jsonl": [replace(rollout, episode=episode)]})
    ).record("r")
    assert [m["facts"] for m in record["messages"] if m["role"] == "user"] == [[], ["the simulated user", "1.50 s"], []]
    assert ["waiting for the user", "1.50 s"] in record["facts"]


def test_token_figures_reach_their_tokens_and_only_used_ids_have_a_text(tmp_path):
    run = write_run(tmp_path / "run", {"rollouts/step-000002.jsonl": [make_rollout("r-0"), make_rollout("r-1")]})
    page = Page.of(run)
    (row,) = page.record("r-1")["rows"]
    assert row == {
        "ids": [i for part in PARTS for i in part],
        "sampled": [[3, 5, 3], [7, 9, 3]],
        "logprobs": [x for part in LOGPROBS for x in part],
        "trainer": TRAINER,
    }
    assert {line["advantage"] for line in page.lines} == {0.5}
    assert page.unpack("texts") == {str(i): word(i) for part in PARTS for i in part}


def test_a_row_without_a_gradient_has_an_advantage_and_no_ratio(tmp_path):
    rollout = make_rollout("r-0")
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [rollout]}, advantage=None)
    write_token_figures(run, 1, rollout_samples(rollout.ledgers, advantage=0.0, rollout_id="r-0", task_id="t"), [None])
    page = Page.of(run)
    assert page.record("r-0")["rows"][0]["trainer"] is None
    assert page.lines[0]["advantage"] == 0.0


def test_figures_go_to_the_row_they_are_of(tmp_path):
    forked = make_rollout("r-0")
    empty, other = Ledger(), Ledger()
    empty.append_context([1, 2])
    other.append_context([1])
    other.append_sampled([7], [-2.0], 3)
    rows = (*forked.ledgers, empty, other)
    samples = rollout_samples(rows, advantage=1.0, rollout_id="r-0", task_id="t")
    assert [s.row for s in samples] == [0, 2]
    run = tmp_path / "run"
    run.mkdir()
    path = write_token_figures(run, 4, samples, [TRAINER, [-1.5]])
    append_line_of(run / "rollouts" / "step-000004.jsonl", forked, rows)
    assert path == run / "tokens" / "step-000004.jsonl"
    assert [row["trainer"] for row in Page.of(run).record("r-0")["rows"]] == [TRAINER, None, [-1.5]]


def append_line_of(path: Path, rollout: Rollout, rows: tuple[Ledger, ...]) -> None:
    path.parent.mkdir()
    append_line(path, rollout_to_json(rollout) | {"ledgers": [row.to_json() for row in rows]})


def test_figures_that_do_not_fit_the_tokens_are_not_shown(tmp_path):
    # A run that was killed and went on: the rollout was sampled anew, its update is still to come.
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [make_rollout("r-0")]}, advantage=None)
    (run / "tokens").mkdir()
    append_line(run / "tokens" / "step-000001.jsonl", {"rollout_id": "r-0", "row": 0, "logprobs": [-1.0]})
    assert Page.of(run).record("r-0")["rows"][0]["trainer"] is None


def test_a_run_that_kept_no_figures_says_so(tmp_path):
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [make_rollout("r-0")]}, advantage=None)
    page = Page.of(run)
    assert any("no figures of its updates" in note for note in page.notes)
    assert page.lines[0]["advantage"] is None


def test_nothing_hostile_stands_in_the_page_and_every_text_comes_through(tmp_path):
    rollout = make_rollout(f"r-{HOSTILE}", output=HOSTILE, tool=HOSTILE)
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [rollout]})
    (run / "run.json").write_text(json.dumps({"run_id": HOSTILE}))
    page = Page(write_transcripts(run, lambda i: HOSTILE).read_bytes().decode("utf-8"))
    scripts = re.findall(r"<script.*?>", page.html)
    data = [s for s in scripts if "octet-stream" in s]
    assert len(scripts) - len(data) == 1 and len(data) == 3
    assert "<img" not in page.html and "pwned = 1</script>" not in page.html
    assert page.record(f"r-{HOSTILE}")["messages"][3]["text"] == HOSTILE
    assert page.lines[0]["tools"] == [HOSTILE] and page.unpack("texts")["42"] == HOSTILE


def test_the_policy_admits_this_script_and_this_style_and_no_other(run):
    html = Page.of(run).html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]
    assert not re.search(r"https?:|@import|url\(", html), "it names nothing to fetch"


def test_the_script_parses_no_markup_and_runs_no_text():
    source = (Path(transcripts.__file__).parent / "viewer.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|fetch\(", source
    )


def test_a_damaged_run_is_shown_as_far_as_it_goes(tmp_path):
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [make_rollout("r-0")]})
    odd = rollout_to_json(make_rollout("r-1"))
    odd["episode"] |= {"latency_s": float("nan"), "turns": [7, {"num_tokens": "many", "message": None}], "task_id": 5}
    odd["episode"]["messages"] = [{"role": "user", "content": {"a": 1}}, "no message"]
    odd["grade"] = {"reward": 10**400, "parts": {"numeric": float("inf")}, "errors": "none"}
    odd["ledgers"] = [{"token_ids": None}, 3]
    path = run / "rollouts" / "step-000001.jsonl"
    with path.open("a") as file:
        file.write("[]\n" + json.dumps(odd) + "\n" + json.dumps({"episode": {}}) + '\n{"episode": {"rollout_id": "cut')
    (run / "tokens" / "step-000001.jsonl").write_text('{"rollout_id": "r-0", "row": 0, "logprobs": [-1, nonsense')
    page = Page.of(run)
    assert [line["id"] for line in page.lines] == ["r-0", "r-1"]
    assert "rollouts/step-000001.jsonl, line 2: not a rollout of this project, passed over" in page.notes
    assert "rollouts/step-000001.jsonl, line 5: cut off, passed over" in page.notes
    assert "tokens/step-000001.jsonl, line 1: cut off, passed over" in page.notes
    line = page.lines[1]
    assert (line["task"], line["reward"], line["latency_s"], line["tokens"]) == ("5", None, None, 0)
    assert page.record("r-1")["messages"][0]["text"] == "{'a': 1}"


def test_an_empty_run_folder_gives_a_page_that_says_so(tmp_path):
    page = Page.of(tmp_path)
    assert page.lines == [] and any("no rollouts" in note for note in page.notes)
    with pytest.raises(FileNotFoundError):
        write_transcripts(tmp_path / "nowhere", word)


def test_made_up_tools_and_malformed_calls_are_one_filter_each(tmp_path):
    made = [
        make_rollout("r-0", tool="no_such_tool", error=ToolErrorKind.UNKNOWN_TOOL),
        make_rollout("r-1", malformed=True),
        make_rollout("r-2", error=ToolErrorKind.REFUSED),
    ]
    lines = Page.of(write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": made})).lines
    assert [line["tools"] for line in lines] == [[UNKNOWN_TOOL], [MALFORMED_CALL, "search"], ["search"]]
    assert [line["calls"] for line in lines] == [1, 2, 1]


def test_a_page_too_large_keeps_evaluations_and_spread_steps_and_says_so(tmp_path):
    steps = {f"rollouts/step-{s:06d}.jsonl": [make_rollout(f"r-step{s}")] for s in range(1, 18)}
    evals = {f"evals/step-{s:06d}.jsonl": [make_rollout(f"r-eval{s}")] for s in (0, 17)}
    run = write_run(tmp_path / "run", steps | evals)
    whole = Page.of(run)
    assert len(whole.lines) == 19 and whole.notes == []
    chunk = max(len(json.dumps(whole.unpack(f"chunk{i}"))) for i in range(19))
    assert chunk < transcripts._CHUNK_CHARS, "a chunk a step"
    one = len(re.findall(r'id="chunk0">([^<]*)<', whole.html)[0])
    page = Page.of(run, max_bytes=round(5.5 * one))
    kept = [line["step"] for line in page.lines if line["set"] == "training"]
    assert [line["step"] for line in page.lines if line["set"] == "held out"] == [0, 17]
    assert kept[0] == 1 and kept[-1] == 17 and 4 <= len(kept) <= 5
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 8
    assert any(f"{17 - len(kept)} of 19 steps are left out" in note for note in page.notes)


def test_chunks_are_cut_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(transcripts, "_CHUNK_CHARS", 3000)
    run = write_run(tmp_path / "run", {"rollouts/step-000001.jsonl": [make_rollout(f"r-{i}") for i in range(9)]})
    page = Page.of(run)
    assert len({line["chunk"] for line in page.lines}) > 2
    for i in range(9):
        assert page.record(f"r-{i}")["messages"], "its place in its chunk"


def test_without_a_tokenizer_the_page_says_that_it_shows_ids(run):
    page = Page(write_transcripts(run, None).read_text())
    assert page.unpack("texts") == {} and any("shown by their ids" in note for note in page.notes)


def test_the_report_links_to_transcripts_that_are_there(run):
    assert "transcripts.html" not in write_report(run).read_text()
    write_transcripts(run, word)
    assert 'href="transcripts.html"' in write_report(run).read_text()


# ---- what the update hands out


@pytest.mark.parametrize("options", [{}, {"num_epochs": 2, "minibatches": 2}])
def test_an_update_hands_out_what_the_trainer_thought_before_it(tmp_path, one_thread, options):
    import torch

    from tests.support.policy_worker import random_samples, save_tiny_llama, tiny_policy
    from trainer.config import LossConfig

    policy = tiny_policy(save_tiny_llama(tmp_path), max_microbatch_tokens=64, **options)
    samples = random_samples()
    policy.update(samples, LossConfig(), temperature=1.0, constant_tokens=64)
    before = policy.logprobs(samples, temperature=0.7)
    update = policy.update(samples, LossConfig(), temperature=0.7, constant_tokens=64)
    assert len(update.logprobs) == len(samples)
    for sample, expected, ours in zip(samples, before, update.logprobs, strict=True):
        if sample.advantage == 0:
            assert ours is None
        else:
            torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-5, rtol=1e-5)
    after = policy.logprobs(samples, temperature=0.7)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True)), "it has learned"
