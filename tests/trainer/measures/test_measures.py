"""The catalogue of measures: its page is fresh, and an entry in it is all that a new measure needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from envs.types import Episode, Message, StopReason, Task, ToolErrorKind, Turn
from graders.types import Grade
from tests.support import ROOT
from tests.support.recipes import apply, copied
from tests.support.written_runs import make_rollout
from trainer.measures import reference
from trainer.measures.catalogue import CATALOGUE, COUNTS
from trainer.measures.summary import summarise
from trainer.runs.records import rollout_to_json
from trainer.types import Rollout

SHOW = """
import json, sys
from pathlib import Path
from trainer.measures import reference
from trainer.measures.summary import summarise
from trainer.runs.progress import _figures
from trainer.reports.comparison import compare
from trainer.reports.comparison_page import render_markdown, write_comparison_page
from trainer.reports.evaluations import read_evaluations
from trainer.reports.run_report import write_report
from trainer.sweeps.values import table
run = Path(sys.argv[1])
evaluations = read_evaluations([f"a={run}@0", f"b={run}@1"])
metrics = [summarise(e.rollouts) for e in evaluations]
rows = [{"step": step, **{f"{part}/{k}": v for k, v in m.items()}} for step, m in enumerate(metrics)
        for part in ("train", "eval")]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
shown = {
    "metrics": metrics[0]["words"],
    "screen": _figures(metrics[0]),
    "comparison": render_markdown(compare(evaluations), demo=False),
    "pictures": write_comparison_page(compare(evaluations), run / "c.html", demo=False).read_text(),
    "report": write_report(run).read_text(),
    "sweep": table({"run": run}),
    "docs": reference.page(),
}
print(json.dumps(shown))
"""


def test_the_page_of_metrics_is_fresh():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == reference.page(), "write it anew: python -m trainer.measures.reference > docs/metrics.md"
    for entry in [*CATALOGUE, *COUNTS]:
        assert f"| `{entry.key}` |" in page or entry.key == "tool_errors"


def test_keys_that_nobody_explains_are_found():
    known = [
        "step",
        "eval/reward",
        "train/tool/search/calls",
        "http/127.0.0.1:80/retries",
        "time/publish_s",
        "loss/ratio",
    ]
    assert all(map(reference.is_known, known))
    assert not any(
        map(reference.is_known, ["train/rewards", "loss/", "train/tool/search", "eval/tool_errors", "other"])
    )


@pytest.mark.parametrize("entry", [*CATALOGUE], ids=lambda m: m.key)
def test_every_measure_has_words_and_a_format(entry):
    assert entry.label and entry.title and entry.unit and entry.show(0.5)
    assert entry.is_share == ("share" in entry.unit), "a share is shown in percent"


@pytest.mark.parametrize(
    ("error", "stop", "told"),
    [
        (ToolErrorKind.REFUSED, StopReason.ANSWERED, {"calls": 1.0, "errors": 1.0}),
        (ToolErrorKind.BAD_ARGUMENTS, StopReason.ANSWERED, {"calls": 1.0, "errors": 1.0}),
        (None, StopReason.ANSWERED, {"calls": 1.0, "errors": 0.0}),
        (ToolErrorKind.UNKNOWN_TOOL, StopReason.ANSWERED, {}),
        (ToolErrorKind.OVER_BUDGET, StopReason.MAX_TOOL_CALLS, {}),
        (ToolErrorKind.BAD_ARGUMENTS, StopReason.CALLED, {}),
    ],
)
def test_a_tool_is_told_of_though_all_its_calls_failed_and_a_name_that_is_none_is_not(error, stop, told):
    metrics = summarise([make_rollout(f"r{i}", error=error, stop=stop) for i in range(2)])
    found = {key.removeprefix("tool/search/"): x for key, x in metrics.items() if key.startswith("tool/")}
    assert found == (told | {"latency_s": 0.25, "tokens": 2.0} if told else {})


def test_a_new_measure_and_a_new_picture_are_one_edit_each(tmp_path: Path, answered: Rollout):
    tree = copied(tmp_path / "tree")
    assert {*apply(tree, "A measure")} == {"trainer/measures/catalogue.py"}
    assert {*apply(tree, "A picture")} == {"trainer/reports/run_report.py"}
    run = tmp_path / "run"
    (run / "evals").mkdir(parents=True)
    for step in (0, 1):
        (run / "evals" / f"step-{step:06d}.jsonl").write_text(json.dumps(rollout_to_json(answered)) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", SHOW, run],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tree}:{ROOT / 'scripts'}", "PATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["metrics"] == 3 and "3 words" in shown["screen"]
    assert "| words per answer | 3.0 | 3.0 | +0.0 (no interval) | +0 % |" in shown["comparison"]
    assert "Words of the answer, p90" in shown["comparison"], "its tail"
    assert "<figcaption>Words of the answer</figcaption>" in shown["pictures"], "its histogram"
    report = shown["report"]
    assert '<tr data-metric="words"><th scope="row">words per answer</th>' in report
    assert "<figcaption>Words of the answer</figcaption>" in report, "its curve"
    assert "3.0 on average" in report, "its sign of health"
    assert "Words, once more" in report
    assert "Words of the answer, words per answer" in shown["sweep"] and "3.0 → 3.0" in shown["sweep"]
    assert "| `words` | words per answer |" in shown["docs"]


@pytest.fixture
def answered() -> Rollout:
    prompt = (Message(role="user", content="How much?"),)
    answer = Message(role="assistant", content="forty two million")
    episode = Episode(
        rollout_id="r",
        task_id="t",
        messages=(*prompt, answer),
        turns=(Turn(message=answer, num_tokens=3),),
        stop_reason=StopReason.ANSWERED,
    )
    grade = Grade(reward=1.0, parts={"numeric": 1.0})
    return Rollout(
        episode=episode, task=Task(task_id="t", messages=prompt), ledgers=(), grade=grade, num_drifted_turns=0
    )
