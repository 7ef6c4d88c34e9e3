"""Policies side by side: tables against naive computation, the bootstrap against a loop, and what the page shows."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UserError
from envs.types import Episode, Message, StopReason, Task, ToolCall, ToolErrorKind, ToolResult, Turn
from graders.types import Grade
from tests.support import ROOT
from trainer.measures.intervals import intervals, resampled_means
from trainer.measures.masked import Masked
from trainer.reports.comparison import Comparison, compare
from trainer.reports.comparison_page import (
    NO_INTERVAL,
    grids,
    remarks,
    render_markdown,
    render_terminal,
    side_by_side,
    write_comparison_page,
)
from trainer.reports.evaluations import Evaluation, read_evaluations
from trainer.runs.records import rollout_to_json
from trainer.types import Rollout

HOSTILE = "</pre><script>alert('pwned')</script>|<b>"


# ---- the bootstrap


def test_the_resampled_means_are_those_of_a_naive_loop_over_the_same_draws():
    values_PT = np.array([[0.0, 1.0, 0.5, 0.25], [1.0, 1.0, 0.0, 0.75]])
    draws = np.random.default_rng(3).integers(4, size=(50, 4))
    naive = [[fmean(row[t] for t in draw) for draw in draws] for row in values_PT.tolist()]
    assert np.allclose(resampled_means(values_PT, seed=3, num_resamples=50), naive)
    (first, second), (change,) = intervals(values_PT, seed=3, num_resamples=50)
    assert (first.mean, second.mean, change.mean) == pytest.approx((0.4375, 0.6875, 0.25))


# Eighths, of which sums are exact: scipy counts ties without tolerance.
VALUES = [0.0, 0.125, 0.125, 0.25, 0.25, 0.5, 0.75, 3.0]
GAINS = [-0.5, 0.25, 0.75, 0.125, 0.0, 0.5, 0.625, 0.25, 1.0, 2.5, 0.375, 0.25, 0.5, 0.0, 0.125, 0.25]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (VALUES, 0.22944200379634294, 1.6665089789275527),
        (GAINS, 0.2265625, 0.9140625),
        ([0.0] * 14 + [1.0] * 2, 0, 0.375),
    ],
)
def test_intervals_are_those_that_scipy_gives_for_the_same_draws(values, low, high):
    """`scipy.stats.bootstrap((values,), np.mean, method="BCa", n_resamples=2000, rng=default_rng(7))` of scipy 1.17."""
    (interval,), _ = intervals(np.array([values]), seed=7, num_resamples=2000)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)
    off = [[0.1] * len(values), [0.1 + v for v in values]]
    (first, _), (change,) = intervals(np.array(off), seed=7, num_resamples=2000)
    assert (change.low, change.high) == pytest.approx((low, high)), "ties count by half, whatever is lost by rounding"
    assert (first.low, first.high) == (0.1, 0.1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(-1, 1))
def test_a_change_that_is_the_same_on_every_task_has_no_spread(values, shift):
    values_PT = np.array([values, [v + shift for v in values]])
    means, (change,) = intervals(values_PT, seed=0, num_resamples=200)
    assert (change.low, change.high, change.mean) == pytest.approx((shift, shift, shift), abs=1e-9)
    for interval in means:
        assert interval.low <= interval.high and min(values_PT.min(), -1) <= interval.low


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Of a skewed distribution, with few tasks: percentiles cover less."""
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        values_PT = np.stack([np.zeros(20), generator.exponential(0.3, size=20)])
        _, (change,) = intervals(values_PT, seed=trial, num_resamples=400)
        hits += change.low <= 0.3 <= change.high
    assert 0.88 <= hits / 300 <= 0.99


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    values_PT = np.random.default_rng(1).normal(size=(2, 30))
    whole = resampled_means(values_PT, seed=0, num_resamples=100)
    monkeypatch.setattr("trainer.measures.intervals._CHUNK", 70)
    assert np.array_equal(resampled_means(values_PT, seed=0, num_resamples=100), whole)


# ---- the comparison


def rollout(
    task_id: str,
    reward: float | None,
    *,
    calls: int = 2,
    num_tokens: int = 100,
    kind: str | None = "add",
    answer: str = "42",
    tool_error: ToolErrorKind | None = None,
) -> Rollout:
    prompt = (Message(role="user", content=f"question of {task_id}"),)
    made = tuple(ToolCall(call_id=f"c{i}", name="search", arguments="{}") for i in range(calls))
    results = tuple(
        ToolResult(call_id=c.call_id, name="search", output="found", error=tool_error if i == 0 else None)
        for i, c in enumerate(made)
    )
    looking, last = Message(role="assistant", tool_calls=made), Message(role="assistant", content=answer)
    episode = Episode(
        rollout_id=f"{task_id}-{reward}",
        task_id=task_id,
        messages=(*prompt, looking, last),
        turns=(
            Turn(message=looking, results=results, num_tokens=num_tokens - 10, num_reasoning_tokens=5),
            Turn(message=last, num_tokens=10),
        ),
        stop_reason=StopReason.ANSWERED if reward is not None else StopReason.WORLD_FAULT,
        latency_s=2.0 * calls,
    )
    grade = None if reward is None else Grade(reward=reward, parts={"numeric": reward}, passed=reward == 1)
    item = {} if kind is None else {"kind": kind, "year": 2014}
    return Rollout(episode=episode, task=Task(task_id=task_id, messages=prompt, item=item), ledgers=(), grade=grade)


BEFORE = [
    rollout("a", 0.0, calls=6, num_tokens=300), rollout("a", 1.0, calls=4, num_tokens=200),
    rollout("b", 0.0, calls=5, kind="divide", tool_error=ToolErrorKind.REFUSED), rollout("b", None, kind="divide"),
    rollout("c", 1.0, calls=3), rollout("only before", 0.0),
]  # fmt: skip
AFTER = [
    rollout("a", 1.0, calls=2, answer=HOSTILE), rollout("a", 1.0, calls=2),
    rollout("b", 0.5, calls=1, kind="divide"),
    rollout("c", 0.75, calls=3), rollout("c", 0.25, calls=3),
    rollout("lost", None), rollout("only after", 1.0),
]  # fmt: skip


def policy(name: str, rollouts: list[Rollout]) -> Evaluation:
    return Evaluation(name=name, source=f"/runs/{name}", rollouts=rollouts)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare([policy("before", BEFORE), policy("after", AFTER)])


def test_means_are_over_shared_tasks_each_counting_the_same(comparison):
    lines = {line.measure.key: line for line in comparison.lines}
    assert comparison.num_tasks == 3 and comparison.num_left_out == 2
    assert comparison.num_masked == {Masked.WORLD: [1, 1]}
    assert "| rollouts in all that were lost to faults of the world | 1 | 1 |" in render_markdown(comparison, demo=True)
    assert [m.mean for m in lines["reward"].means] == pytest.approx([(0.5 + 0 + 1) / 3, (1 + 0.5 + 0.5) / 3])
    assert lines["reward"].differences[0].mean == pytest.approx(0.5 / 3)
    assert lines["reward"].percent(0) == pytest.approx(100 / 3)
    assert [m.mean for m in lines["correct"].means] == pytest.approx([0.5, 1 / 3])
    assert [m.mean for m in lines["tool_calls"].means] == pytest.approx([(5 + 5 + 3) / 3, (2 + 1 + 3) / 3])
    assert [m.mean for m in lines["completion_tokens"].means] == pytest.approx([(250 + 100 + 100) / 3, 100])
    assert [m.mean for m in lines["reasoning_tokens"].means] == [5, 5]
    assert [m.mean for m in lines["tool_errors"].means] == pytest.approx([1 / 3, 0])


def test_a_change_in_percent_needs_a_first_figure_above_0():
    fell, rose = policy("a", [rollout("t", -0.1)]), policy("b", [rollout("t", 0.3)])
    reward = next(line for line in compare([fell, rose]).lines if line.measure.key == "reward")
    assert reward.percent(0) is None
    assert reward.differences[0].mean == pytest.approx(0.4)


def test_tails_are_over_single_rollouts(comparison):
    before, after = comparison.tails["tool_calls"]
    assert before == {name: pytest.approx(np.quantile([6, 4, 5, 3], q)) for name, q in
                      {"p50": 0.5, "p90": 0.9, "p95": 0.95, "max": 1.0}.items()}  # fmt: skip
    assert after["max"] == 3


def test_kinds_of_question_have_tables_of_their_own(comparison):
    assert list(comparison.kinds) == ["add", "divide"]
    reward = comparison.kinds["divide"][0]
    assert [m.mean for m in reward.means] == [0, 0.5] and reward.means[0].num_tasks == 1
    by_year = compare([policy("a", BEFORE), policy("b", AFTER)], by="year")
    assert by_year.kinds == {}, "one value only"
    with pytest.raises(UserError, match=r"--by nonsense: no task's item has this key; it has kind, year"):
        compare([policy("a", BEFORE), policy("b", AFTER)], by="nonsense")


def test_errors_are_counted_by_kind(comparison):
    assert comparison.errors == {"tool: refused": [0.25, 0.0]}


def test_transcripts_show_gains_and_losses_then_changed_calls(comparison):
    assert [(p.task_id, p.means) for p in comparison.pairs] == [("a", [0.5, 1]), ("b", [0, 0.5]), ("c", [1, 0.5])]
    assert [r.grade.reward for r in comparison.pairs[2].rollouts] == [1, 0.25], "of two as near the one that fell"
    same = [rollout("x", 1.0, calls=1), rollout("y", 1.0, calls=1)]
    fewer = [rollout("x", 1.0, calls=1), rollout("y", 1.0, calls=5)]
    assert [p.task_id for p in compare([policy("a", same), policy("b", fewer)]).pairs] == ["y"]


def test_where_all_tasks_changed_alike_no_interval_is_shown_and_nothing_is_called_clear(tmp_path):
    """Tasks that all rose by as much are no certainty: a bootstrap of equal values has nothing to go by."""
    _, (change,) = intervals(np.array([[0.1, 0.5, 0.3], [0.3, 0.7, 0.5]]), seed=0)
    assert change.mean == pytest.approx(0.2) and not change.is_known and not change.is_clear
    _, (change,) = intervals(np.array([[0.1, 0.5, 0.3], [0.3, 0.8, 0.5]]), seed=0)
    assert change.is_known and change.is_clear
    alike = compare([policy("a", [rollout(t, 0.25) for t in "xy"]), policy("b", [rollout(t, 0.5) for t in "xy"])])
    [row] = [r for r in side_by_side(alike, alike.lines, id="x").rows if r.key == "reward"]
    assert row.cells[3] == "+0.250 (no interval)" and not any(row.verdicts)
    page = write_comparison_page(alike, tmp_path / "page.html", demo=False).read_text()
    assert NO_INTERVAL in remarks(alike) and "(no interval)" in page and "(0.25 to 0.25)" not in page


def test_without_a_passing_threshold_there_is_no_line_of_passes():
    old = [replace(r, grade=replace(r.grade, passed=None)) for r in BEFORE if r.grade]
    c = compare([policy("a", old), policy("b", AFTER)])
    assert "correct" not in [line.measure.key for line in c.lines]


def test_nothing_in_common_is_said():
    with pytest.raises(UserError, match="expected evaluations of the same tasks"):
        compare([policy("a", [rollout("x", 1.0)]), policy("b", [rollout("y", 1.0)])])


# ---- what is shown


def test_every_table_says_the_same_in_terminal_markdown_and_page(comparison, tmp_path):
    from rich.console import Console

    console = Console(record=True, width=200, file=(tmp_path / "screen").open("w"))
    console.print(render_terminal(comparison, demo=True))
    console.file.close()
    screen, markdown = console.export_text(), render_markdown(comparison, demo=True)
    page = write_comparison_page(comparison, tmp_path / "compare.html", demo=True).read_text()
    tables = grids(comparison, demo=True)
    assert [t.id for t in tables] == ["policies", "demo", "tails", "errors", "by-add", "by-divide"]
    for table in tables:
        for row in table.rows:
            assert len(row.cells) == len(table.headers)
            assert f"| {' | '.join(row.cells[1:])} |" in markdown
            for cell in row.cells[1:]:
                assert cell in screen and f">{cell}<" in page
    reward, demo = tables[0].rows[0].cells, tables[1].rows[0].cells
    assert reward[1:3] == ["0.500", "0.667"] and reward[3].startswith("+0.167 [") and reward[4] == "+33 %"
    assert demo == ["mean reward", "0.500", "0.667", "+33 %", "0.59 → 0.63", "+7 %"]
    for text in (screen, markdown, page):
        assert "atency depends on hardware" in text and "paired bootstrap" in text and "2 tasks without" in text


def test_the_page_needs_nothing_and_runs_nothing(comparison, tmp_path):
    named = [replace(p, name=p.name + HOSTILE) for p in comparison.evaluations]
    page = write_comparison_page(replace(comparison, evaluations=named), tmp_path / "c.html", demo=False).read_text()
    assert "<script" not in page and "src=" not in page and "href=" not in page and "default-src" in page
    assert page.count("<svg") == 8 and "nan" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page, "the model's words are shown"


def test_three_policies_are_each_compared_with_the_first():
    c = compare([policy("a", BEFORE), policy("b", AFTER), policy("c", BEFORE)])
    assert [len(line.differences) for line in c.lines] == [2] * len(c.lines)
    assert c.lines[0].differences[1].mean == 0
    assert grids(c, demo=False)[0].headers == ["", "a", "b", "change", "in %", "c", "change", "in %"]


# ---- reading


def write_evals(folder: Path, evals: dict[str, list[Rollout]]) -> Path:
    (folder / "evals").mkdir(parents=True)
    for name, rollouts in evals.items():
        text = "".join(json.dumps(rollout_to_json(r)) + "\n" for r in rollouts)
        (folder / "evals" / name).write_text(text)
    return folder


def test_policies_are_read_by_folder_step_and_name(tmp_path):
    run = write_evals(
        tmp_path / "seed=0",
        {"step-000000.jsonl": BEFORE, "step-000008.jsonl": AFTER[:3], "step-000008.rank1.jsonl": AFTER[3:]},
    )
    first, last, named = read_evaluations([f"{run}@0", str(run), f"base={run}@0"])
    assert (first.name, last.name, named.name) == ("seed=0@0", "seed=0@8", "base")
    assert [r.task.task_id for r in last.rollouts] == [r.task.task_id for r in AFTER]
    assert first.rollouts == BEFORE


def test_an_evaluation_that_is_not_whole_is_told_on_the_terminal(tmp_path):
    run = write_evals(tmp_path / "run", {"step-000000.jsonl": BEFORE, "step-000008.jsonl": AFTER[:3]})
    command = [sys.executable, "scripts/compare.py", f"a={run}@0", f"b={run}", "--out", str(tmp_path / "out")]

    def told(*counted: tuple[int, int]) -> str:
        lines = [json.dumps({"step": step, "eval/rollouts": num}) + "\n" for step, num in counted]
        (run / "metrics.jsonl").write_text("".join(lines))
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr

    whole = (0, len(BEFORE))
    assert told(whole) == (
        "warning: b: evaluation after 8 steps: has not ended; the rollouts that take longest are missing\n"
    )
    assert told(whole, (8, len(AFTER))).startswith(f"warning: b: evaluation after 8 steps: 3 of {len(AFTER)} rollouts")
    assert told(whole, (8, 3)) == ""


def test_a_preflight_is_a_policy_too(tmp_path):
    run = write_evals(tmp_path / "run", {"step-000000.jsonl": BEFORE})
    write_evals(tmp_path / "bare", {"x.jsonl": AFTER})
    (tmp_path / "bare" / "evals" / "x.jsonl").rename(tmp_path / "bare" / "rollouts.jsonl")
    (tmp_path / "bare" / "preflight.json").write_text("{}")
    _, bare = read_evaluations([str(run), str(tmp_path / "bare")])
    assert (bare.name, bare.rollouts) == ("bare", AFTER)
    with pytest.raises(UserError, match="holds no evaluation"):
        read_evaluations([str(run), f"{tmp_path / 'bare'}@0"])


def test_what_is_wrong_with_an_argument_is_said(tmp_path):
    run = write_evals(tmp_path / "run", {"step-000000.jsonl": BEFORE})
    for arguments, words in (
        ([str(run)], "at least two"),
        ([str(run), f"{run}@5"], "no evaluation at step 5; it has 0"),
        ([str(run), "x=/nowhere"], "there is no folder /nowhere"),
        ([str(run), str(tmp_path)], "holds no evaluation"),
        ([str(run), f"{run}@0"], "two policies are called"),
    ):
        with pytest.raises(UserError, match=words):
            read_evaluations(arguments)
    (run / "evals" / "step-000001.jsonl").write_text('{"episode": 1}\n')
    with pytest.raises(UserError, match=r"step-000001\.jsonl, line 1: not a rollout"):
        read_evaluations([f"{run}@0", f"{run}@1"])


def test_a_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    run = write_evals(tmp_path / "run", {"step-000000.jsonl": BEFORE})
    with (run / "evals" / "step-000000.jsonl").open("a") as file:
        file.write('{"episode": {"rol')
    policies = read_evaluations([f"a={run}", f"b={run}"])
    assert [len(p.rollouts) for p in policies] == [len(BEFORE)] * 2
    shown = render_markdown(compare(policies), demo=False)
    assert f"- a: evals/step-000000.jsonl, line {len(BEFORE) + 1}: cut off, passed over" in shown


def test_the_script_compares_before_and_after(tmp_path):
    run = write_evals(tmp_path / "run", {"step-000000.jsonl": BEFORE, "step-000008.jsonl": AFTER})
    script = [sys.executable, ROOT / "scripts" / "compare.py", f"{run}@0", f"{run}@8", "--out", tmp_path / "out"]
    done = subprocess.run([*script, "--markdown", "--demo"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| mean reward | 0.500 | 0.667 |" in done.stdout
    assert (tmp_path / "out" / "compare.md").read_text() in done.stdout
    assert (tmp_path / "out" / "compare.html").stat().st_size > 10_000
    failed = subprocess.run([*script, "--by", "colour"], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 2 and failed.stderr.startswith("error: --by colour")
