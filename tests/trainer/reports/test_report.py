"""The report of a run folder, parsed back from the HTML it writes."""

import io
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from envs.types import Episode, Message, StopReason, Task, ToolCall, Turn
from graders.types import Grade
from tests.support.written_runs import make_rollout, write_run
from trainer.measures.catalogue import Place, shown_in
from trainer.reports.drawing import Series, line_chart, stacked_chart
from trainer.reports.run_reader import read_run
from trainer.reports.run_report import before_after_table, before_and_after, write_report
from trainer.reports.tables import Grid, to_markdown, to_terminal

HOSTILE = "</pre><script>alert('pwned')</script><img src=http://evil.example/x onerror=alert(1)>"
NUM_STEPS = 3
EVALS: dict[int, dict[str, float]] = {
    0: {"rollouts": 4, "masked_rollouts": 0, "reward": 0.5, "correct": 0.25},
    NUM_STEPS: {"rollouts": 4, "masked_rollouts": 1, "masked_by/world": 1, "reward": 0.875},
}
_VOID = {"meta", "br", "img", "link", "input"}


@dataclass
class Page(HTMLParser):
    """The elements of a page, with their attributes and texts; fails where tags are not balanced."""

    elements: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[dict[str, Any]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.open], **dict(attrs)}
        element["ancestors"] = list(self.open)
        self.elements.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [e for e in self.elements if e["tag"] == tag]

    def by_id(self, name: str) -> dict[str, Any] | None:
        return next((e for e in self.elements if e.get("id") == name), None)


def _parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert not page.open
    return page


def _cells(page: Page) -> dict[str, list[str]]:
    """The before/after table: metric → texts of its cells."""
    table: dict[str, list[str]] = {}
    for cell in page.all("td"):
        row = cell["ancestors"][-1]
        if "data-metric" in row:
            table.setdefault(row["data-metric"], []).append(cell["text"])
    return table


def _rollout(
    task_id: str, reward: float | None, answer: str, explanation: str, *, num_tokens: int = 100, num_calls: int = 1
) -> dict[str, Any]:
    prompt = (Message(role="system", content="be brief"), Message(role="user", content=f"question of {task_id}"))
    calls = tuple(ToolCall(call_id=f"c{i}", name="search", arguments='{"query": "revenue"}') for i in range(num_calls))
    looking = Message(role="assistant", reasoning="I look it up", tool_calls=calls)
    found = Message(role="tool", content="Revenue 42", call_id="c0", name="search")
    last = Message(role="assistant", content=answer)
    episode = Episode(
        rollout_id=f"{task_id}-{reward}",
        task_id=task_id,
        messages=(*prompt, looking, found, last),
        turns=(
            Turn(message=looking, num_tokens=num_tokens - 10, num_reasoning_tokens=5),
            Turn(message=last, num_tokens=10),
        ),
        stop_reason=StopReason.ANSWERED if reward is not None else StopReason.WORLD_FAULT,
        latency_s=4.0,
    )
    task = Task(task_id=task_id, messages=prompt, item={"answer": "42"})
    grade = None if reward is None else Grade(reward=reward, parts={"numeric": reward}, explanation=explanation)
    return {
        "episode": TypeAdapter(Episode).dump_python(episode, mode="json"),
        "task": TypeAdapter(Task).dump_python(task, mode="json"),
        "grade": None if grade is None else TypeAdapter(Grade).dump_python(grade, mode="json"),
        "ledgers": [],
        "num_drifted_turns": 0,
        "num_attempts": 1,
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of three steps."""
    folder = tmp_path / "a-run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model:\n  name: tiny\noptim:\n  num_steps: {NUM_STEPS}\nseed: 7\n")
    info = {
        "run_id": "quickstart-7",
        "versions": {"vllm": "0.31.0"},
        "serve_command": "vllm serve it",
        "hardware": "2 cores",
    }
    (folder / "run.json").write_text(json.dumps(info))
    train = [
        {
            "step": k, "train/reward": 0.1 * k, "train/correct": 0.2, "train/tool_calls": 5.0 - k,
            "loss/loss": -0.01 * k, "train/part/numeric": 0.2 * k, "train/stop/answered": 0.75,
            "train/stop/max_turns": 0.25,
            "train/masked_rollouts": 2, "train/masked_by/grader": 2,
            "groups/tied_share": 0.25 * k, "canary/mismatch": 0.05, "time/rollouts_s": 10.0,
            "time/training_s": 20.0, "time/publish_s": 1.0, "time/step_s": 32.0,
        }
        for k in range(1, NUM_STEPS + 1)
    ]  # fmt: skip
    evals = [{"step": s, **{f"eval/{k}": v for k, v in row.items()}} for s, row in EVALS.items()]
    _write_lines(folder / "metrics.jsonl", [evals[0], *train, evals[1]])
    before = [
        _rollout("t1", 0.0, "no idea", "no number", num_tokens=1500, num_calls=4),
        _rollout("t2", 1.0, "42", "right", num_tokens=500, num_calls=2),
        _rollout("t2", 1.0, "42", "right", num_tokens=500, num_calls=2),
        _rollout("t2", 1.0, "42", "right", num_tokens=500, num_calls=2),
    ]
    after = [
        _rollout("t1", 1.0, HOSTILE, f"right {HOSTILE}"),
        _rollout("t2", 0.75, "43", "nearly"),
        _rollout("t2", 0.75, "43", "nearly"),
        _rollout("t2", None, "", ""),
    ]
    _write_lines(folder / "evals" / "step-000000.jsonl", before)
    _write_lines(folder / "evals" / f"step-{NUM_STEPS:06d}.jsonl", after)
    return folder


def test_the_table_compares_the_first_evaluation_with_the_last_task_by_task(run: Path) -> None:
    """Each task counts the same however often it was rolled out."""
    cells = _cells(_parse(write_report(run)))
    assert cells["reward"] == ["0.500", "0.875", "+0.375 [-0.250, +1.000]", "+75 %"]
    assert cells["answered"] == ["100.0%", "100.0%", "+0.0 pts (no interval)", "+0 %"]
    assert cells["tool_calls"] == ["3.00", "1.00", "-2.00 [-3.00, -1.00]", "-67 %"]
    assert cells["completion_tokens"] == ["1,000.0", "100.0", "-900.0 [-1,400.0, -400.0]", "-90 %"]
    assert cells["reasoning_tokens"] == ["5.0", "5.0", "+0.0 (no interval)", "+0 %"]
    assert cells["answer_tokens"] == ["995.0", "95.0", "-900.0 [-1,400.0, -400.0]", "-90 %"]
    assert "correct" not in cells, "the grader does not say what passes"
    assert set(cells) == {m.key for m in shown_in(Place.TABLE)} - {"correct"}


def _table(run: Path) -> Grid:
    comparison = before_and_after(run)
    assert comparison is not None
    return before_after_table(comparison)


def test_a_change_is_called_better_or_worse_where_its_interval_does_not_hold_zero(run: Path) -> None:
    verdicts = {row.key: row.verdicts[-1] for row in _table(run).rows}
    assert verdicts["tool_calls"] == verdicts["completion_tokens"] == "better"
    assert verdicts["reward"] == verdicts["answered"] == verdicts["reasoning_tokens"] == ""
    page = _parse(write_report(run))
    assert len([e for e in page.all("td") if e["class"] == "number better"]) == 2 * 3


def test_terminal_and_markdown_tables_say_the_same_as_the_page(run: Path) -> None:
    cells = _cells(_parse(write_report(run)))
    screen = io.StringIO()
    Console(file=screen, width=86).print(to_terminal(_table(run)))
    markdown = to_markdown(_table(run))
    assert f"| held-out tasks | before | step {NUM_STEPS} | change | in % |" in markdown
    assert len(screen.getvalue().splitlines()) == len(cells) + 2
    assert "…" not in screen.getvalue()
    for texts in cells.values():
        assert f"| {' | '.join(texts)} |" in markdown
        assert re.search(r"\s+".join(map(re.escape, texts)), screen.getvalue())


def test_the_rollouts_of_every_process_count(run: Path) -> None:
    for step, rewards in ((0, (0.0, 0.5)), (NUM_STEPS, (1.0, 1.0))):
        rows = [_rollout(name, reward, "42", "of rank 1") for name, reward in zip(("t3", "t4"), rewards, strict=True)]
        _write_lines(run / "evals" / f"step-{step:06d}.rank1.jsonl", rows)
        _write_lines(run / "evals" / f"step-{step:06d}.rank10.jsonl", [_rollout("t5", 0.25, "42", "of rank 10")])
    page = _parse(write_report(run))
    assert [e["text"].split()[0] for e in page.all("h3")] == ["t1", "t3", "t4", "t2"]
    said = f"5 held-out tasks; graded rollouts of them: 7 (before), 6 (step {NUM_STEPS})."
    assert said in [e["text"] for e in page.all("p")]
    assert page.by_id("notes") is None or "rank" not in (page.by_id("notes") or {})["text"]


def test_what_another_process_wrote_and_cannot_be_read_is_named(run: Path) -> None:
    whole = json.dumps(_rollout("t3", 1.0, "42", "right"))
    (run / "evals" / "step-000000.rank1.jsonl").write_text(f"{whole}\n[]\n{{}}x\n{whole[:30]}")
    (run / "evals" / f"step-{NUM_STEPS:06d}.rank1.jsonl").mkdir()
    notes = (_parse(write_report(run)).by_id("notes") or {})["text"]
    assert "evals/step-000000.rank1.jsonl, line 4: cut off, passed over" in notes
    assert "evals/step-000000.rank1.jsonl, line 2: not a rollout of this project, passed over (2 such lines)" in notes
    assert f"evals/step-{NUM_STEPS:06d}.rank1.jsonl: is not a plain file" in notes


def test_text_of_a_model_is_shown_and_never_becomes_markup(run: Path) -> None:
    (run / "config.yaml").write_text(f'model:\n  name: "{HOSTILE}"\n')
    page = _parse(write_report(run, serve_command=HOSTILE, is_over=True))
    assert not page.all("script") and not page.all("img")
    assert not [e for e in page.elements if any(a.startswith("on") or a in ("src", "href") for a in e)]
    assert sum(HOSTILE in e["text"] for e in page.all("pre")) >= 3
    assert any(f"right {HOSTILE}" in e["text"] for e in page.all("div"))


def test_a_metric_with_markup_in_its_name_is_escaped_in_the_charts(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, f"train/part/{HOSTILE}": 1.0, f"loss/{HOSTILE}": 1.0, "logged": 3}) + "\n")
    page = _parse(write_report(run, is_over=True))
    assert not page.all("script") and not page.all("img")
    titles = [e["text"] for e in page.all("figcaption")]
    assert any(HOSTILE in title for title in titles) and "logged" in titles, "whatever a reward function logs"


def test_the_page_needs_nothing_from_outside(run: Path) -> None:
    html = write_report(run).read_text()
    assert not re.search(r"(src|href)\s*=|url\(|@import", html.replace(HOSTILE, "").replace("&lt;img src=", ""))
    policy = next(
        e for e in _parse(run / "report.html").all("meta") if e.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy["content"].startswith("default-src 'none'")


def test_every_chart_has_a_title_a_unit_and_its_values_on_hover(run: Path) -> None:
    page = _parse(write_report(run))
    figures = page.all("figure")
    titles = [e["text"] for e in page.all("figcaption")]
    assert {"Mean reward", "Correct", "Tool calls", "Reward parts", "How episodes end", "Time split"} <= set(titles)
    assert {"canary/mismatch", "loss/loss", "groups/tied_share"} <= set(titles)
    assert len(figures) == len(titles) == len(page.all("svg")) == len(set(titles))
    hovers = [e["text"] for e in page.all("title")]
    assert "training: 0.2, step 2" in hovers
    assert "held out: 0.875, step 3" in hovers
    assert "answered: 75 %, step 1" in hovers
    assert "other: 1, step 1" in hovers, "what rollouts, training and publishing leave of the step"
    for figure in figures:
        units = [e["text"] for e in page.all("text") if figure in e["ancestors"] and "transform" in e]
        assert len(units) == 1 and units[0]


def test_transcripts_show_gains_and_losses_side_by_side_with_the_graders_words(run: Path) -> None:
    page = _parse(write_report(run))
    gain, loss = (e["text"] for e in page.all("section") if e.get("class") == "pair")
    assert "t1" in gain and "0.00 → 1.00 (+1.00)" in gain
    assert "t2" in loss and "1.00 → 0.75 (-0.25)" in loss
    assert "question of t1" in gain and 'search({"query": "revenue"})' in gain and "I look it up" in gain
    assert "no number" in gain and "nearly" in loss
    assert gain.index("no idea") < gain.index("alert")


def test_adapter_serve_command_config_and_versions_are_named(run: Path) -> None:
    page = _parse(write_report(run))
    texts = {
        name: (page.by_id(name) or {}).get("text", "") for name in ("adapter", "serve-command", "config", "versions")
    }
    assert texts["adapter"] == str((run / "adapter").resolve())
    assert texts["serve-command"] == "vllm serve it"
    assert "num_steps: 3" in texts["config"]
    assert "vllm0.31.0" in texts["versions"].replace("\n", "")
    given = _parse(write_report(run, serve_command="vllm serve that")).by_id("serve-command")
    assert given and given["text"] == "vllm serve that"


def test_the_heading_is_the_folders_name_and_each_auto_stands_beside_what_it_meant(run: Path) -> None:
    (run / "config.yaml").write_text("model:\n  name: m\n  dtype: auto\nengine:\n  dtype: auto\n  publish: auto\n")
    about = json.loads((run / "run.json").read_text())
    resolved = {"model.dtype": "bfloat16", "engine.publish": "merged"}
    (run / "run.json").write_text(json.dumps(about | {"resolved": resolved}))
    page = _parse(write_report(run))
    assert [e["text"] for e in page.all("h1")] == [run.name]
    config = (page.by_id("config") or {})["text"].split("\n")
    assert "  dtype: auto  # bfloat16" in config and "  publish: auto  # merged" in config
    assert config[4] == "  dtype: auto"
    assert {"quickstart-7", "bfloat16"} <= {e["text"] for e in page.all("b")}


def test_health_counts_what_was_lost(run: Path) -> None:
    page = _parse(write_report(run))
    health = (page.by_id("health") or {})["text"]
    assert "rollouts masked out6 in allwithout a grade, not trained on: 6 not graded, for the grader failed" in health
    assert "tied groups50.0% on average" in health
    assert "1 rollouts have no grade: 1 lost to faults of the world" in (page.by_id("notes") or {})["text"]


def test_an_empty_run_folder_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    page = _parse(write_report(tmp_path))
    notes = (page.by_id("notes") or {})["text"]
    assert "metrics.jsonl is missing" in notes
    assert "no evaluation" in notes
    assert page.by_id("before-after") is None
    assert before_and_after(tmp_path) is None


def test_a_run_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")


def test_an_interrupted_run_shows_what_it_has(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:25])
    (run / "adapter").rmdir()
    page = _parse(write_report(run))
    notes = (page.by_id("notes") or {})["text"]
    assert "2 of 3 steps are done" in notes
    assert "one evaluation only" in notes
    assert "metrics.jsonl, line 4: cut off, passed over" in notes
    assert _cells(page)["reward"] == ["0.500"]
    assert page.by_id("adapter") is None


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "evals/step-000000.jsonl"])
@pytest.mark.parametrize("content", ["", "\x00\xff{[", "[1, 2]\n", '{"episode": 3, "grade": {"reward": 1}}\n', "null"])
def test_damaged_files_do_not_break_the_report(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    _parse(write_report(run))


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "evals/step-000000.jsonl", "adapter"])
def test_missing_files_do_not_break_the_report(run: Path, name: str) -> None:
    (run / name).rmdir() if name == "adapter" else (run / name).unlink()
    _parse(write_report(run))


def test_a_step_done_again_after_a_resume_counts_once_with_its_later_figures(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "train/reward": 0.9}) + "\n")
    assert read_run(run).series("train/reward") == [(1, 0.1), (2, 0.9), (3, pytest.approx(0.3))]


def test_a_value_that_is_not_a_number_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/reward": NaN}\n{"step": 3, "eval/reward": Infinity}\n')
    assert [step for step, _ in read_run(run).series("train/reward")] == [1, 3]
    page = _parse(write_report(run))
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', "".join(str(e.get("points")) for e in page.all("polyline")))


def test_a_figure_that_is_none_is_named_wherever_it_stands(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/reward": "high", "loss/loss": null, "eval/masked_rollouts": NaN}\n')
    page = _parse(write_report(run))
    told = "train/reward of step 2, loss/loss of step 2 and 1 more: no finite number, or too large, left out"
    assert told in (page.by_id("notes") or {})["text"] and "nan" not in (run / "report.html").read_text().lower()


def test_figures_that_no_picture_holds_and_rows_of_no_step_are_named_and_the_report_is_made(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in ((1, -1e308), (2, 1e308), (3, 10**400), (10**400, 1), (-1, 1), (True, 1), ("4", 1)):
            file.write(json.dumps({"step": step, "loss/own": value}) + "\n")
    notes = (_parse(write_report(run)).by_id("notes") or {})["text"]
    assert "loss/own of step 1, loss/own of step 2 and 1 more: no finite number, or too large, left out" in notes
    assert "not a step's figures of this project, passed over (4 such lines)" in notes
    assert list(read_run(run).steps) == [0, 1, 2, 3]


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_a_run_json_that_holds_no_object_is_called_that(run: Path, content: str) -> None:
    (run / "run.json").write_text(content)
    assert "run.json holds no JSON object" in (_parse(write_report(run)).by_id("notes") or {})["text"]


def test_what_the_run_had_and_lacks_now_is_named(run: Path) -> None:
    """A finished run, without its adapter, with the rollouts of one step alone, and without its figures."""
    about = json.loads((run / "run.json").read_text())
    about |= {"adapter": "x", "adapter_files": {"adapter_model.safetensors": "0"}, "finished_steps": NUM_STEPS}
    (run / "run.json").write_text(json.dumps(about))
    _write_lines(run / "rollouts" / "step-000002.jsonl", [_rollout("t1", 0.0, "no", "no")])
    notes = (_parse(write_report(run)).by_id("notes") or {})["text"]
    assert "adapter/ lacks adapter_model.safetensors" in notes
    assert "rollouts/ lacks the files of 2 of 3 steps: their rollouts can't be looked at" in notes
    (run / "adapter").rmdir()
    (run / "metrics.jsonl").write_text("")
    page = _parse(write_report(run))
    notes = (page.by_id("notes") or {})["text"]
    assert "adapter/ is missing: there is nothing to serve" in notes and page.by_id("serve-command") is None
    assert "the run has finished, but metrics.jsonl lacks steps: 0 of 3 steps are there" in notes


def test_the_command_serves_the_adapter_where_it_lies_after_a_move(run: Path, tmp_path: Path) -> None:
    adapter = (run / "adapter").resolve()
    command = f"vllm serve /models/adapter --lora-modules policy={adapter} --chat-template {adapter}/t.jinja"
    about = json.loads((run / "run.json").read_text()) | {"serve_command": command}
    (run / "run.json").write_text(json.dumps(about))
    assert (_parse(write_report(run)).by_id("serve-command") or {})["text"] == command
    moved = run.rename(tmp_path / "to a new place")
    told = (_parse(write_report(moved)).by_id("serve-command") or {})["text"]
    here = moved.resolve() / "adapter"
    assert shlex.split(told)[2:] == [
        "/models/adapter", "--lora-modules", f"policy={here}", "--chat-template", f"{here}/t.jinja"
    ]  # fmt: skip


def test_rollouts_that_the_metrics_count_and_no_file_holds_are_missed_aloud(run: Path) -> None:
    path = run / "evals" / "step-000000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    page = _parse(write_report(run))
    assert "evaluation after 0 steps: 3 of 4 rollouts could be read" in (page.by_id("notes") or {})["text"]
    path.unlink()
    page = _parse(write_report(run))
    notes = (page.by_id("notes") or {})["text"]
    assert "evals/step-000000.jsonl is missing" in notes and "0 of 4 rollouts could be read" in notes
    assert _cells(page)["reward"] == ["0.875"], "the other evaluation alone"


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_no_rollout_to_compare(run: Path, reward: float) -> None:
    _write_lines(run / "evals" / "step-000000.rank1.jsonl", [_rollout("t3", reward, "42", "right")])
    page = _parse(write_report(run))
    assert "evals/step-000000.rank1.jsonl, line 1: not a rollout" in (page.by_id("notes") or {})["text"]
    assert _cells(page)["reward"][0] == "0.500"


def test_evaluations_of_different_tasks_are_not_compared(run: Path) -> None:
    _write_lines(run / "evals" / f"step-{NUM_STEPS:06d}.jsonl", [_rollout("other", 1.0, "42", "right")])
    page = _parse(write_report(run))
    assert "no task has a graded rollout of every policy" in (page.by_id("notes") or {})["text"]
    assert _cells(page)["reward"] == ["0.500"]


def test_a_chart_places_its_points_inside_the_frame_for_any_values() -> None:
    for values in ([0.0], [5.0, 5.0], [-3.0, 1e-9], [1e9, 2e9], [-1e-7, -2e-7]):
        chart = line_chart("t", [Series(name="s", points=list(enumerate(values)))], unit="u")
        for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', chart):
            assert 58 <= float(x) <= 370 and 10 <= float(y) <= 176
    assert line_chart("t", [Series(name="s", points=[])], unit="u") == ""
    assert stacked_chart("t", [Series(name="s", points=[(1, 0.0)])], unit="u") == ""


def test_the_time_of_a_step_is_split_into_what_adds_up_to_it(run: Path) -> None:
    times = {"step": 10.0, "rollouts": 4.0, "training": 5.0, "publish": 0.5}
    beside = {"waiting_for_rollouts": 4.0, "waiting_for_trainer": 2.5}
    row = {f"time/{name}_s": seconds for name, seconds in (times | beside).items()}
    _write_lines(run / "metrics.jsonl", [{"step": 1, "train/reward": 0.5, **row}])
    page = write_report(run).read_text()
    figures = dict(re.findall(r"<figcaption>([^<]*)</figcaption>(.*?)</figure>", page, re.DOTALL))
    parts = dict(re.findall(r"<title>([\w ]+): ([\d.]+), step 1</title>", figures["Time split"]))
    assert {name: float(x) for name, x in parts.items()} == {
        "rollouts": 4.0,
        "training": 5.0,
        "publish": 0.5,
        "other": 0.5,
    }
    for name, seconds in beside.items():
        assert f"{name}_s: {seconds:g}, step 1" in figures[f"time/{name}_s"]


def test_bars_of_a_stack_stand_on_each_other() -> None:
    layers = [Series(name="a", points=[(1, 1.0)]), Series(name="b", points=[(1, 3.0)])]
    bars = re.findall(
        r'<rect class="f\d" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"',
        stacked_chart("t", layers, unit="u"),
    )
    (low_y, low_height), (high_y, high_height) = [(float(y), float(h)) for y, h in bars]
    assert high_height == pytest.approx(3 * low_height, abs=0.2)
    assert high_y + high_height == pytest.approx(low_y, abs=0.2)


def test_the_report_loads_neither_torch_nor_vllm() -> None:
    modules = "trainer.reports.run_report, trainer.runs.progress"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'vllm'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_page_of_a_run_that_has_not_finished_refreshes_itself_and_no_other(tmp_path):
    run = write_run(tmp_path / "run", {"evals/step-000000.jsonl": [make_rollout("r")]})
    (run / "config.yaml").write_text("optim: {num_steps: 1}\n")
    assert "<script>" in write_report(run).read_text()
    assert "<script" not in write_report(run, is_over=True).read_text()
    (run / "run.json").write_text('{"run_id": "run-1", "finished_steps": 1}')
    assert "<script" not in write_report(run).read_text()
