"""The report of a run: one HTML file that needs no network, no server and no script."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from envs.errors import UserError
from trainer.measures.catalogue import COUNTS, Place, shown_in
from trainer.measures.masked import WHY_MASKED
from trainer.measures.timing import Lap
from trainer.reports.comparison import Comparison, compare
from trainer.reports.comparison_page import remarks, side_by_side
from trainer.reports.drawing import Series, line_chart, stacked_chart
from trainer.reports.evaluations import read_evaluation
from trainer.reports.pages import pairs_shown, write_page
from trainer.reports.run_reader import RunData, read_run, steps_in
from trainer.reports.tables import Grid, facts
from trainer.reports.transcripts.write import PAGE as TRANSCRIPTS
from trainer.runs.about import serve_command_of
from trainer.types import Kind

_LAPS = {lap: f"time/{lap}_s" for lap in Lap}
_TIME_SPLIT = {*_LAPS.values(), "time/step_s", "time/other_share"}
"""Figures that the pictures of a step's time hold."""
REFRESH_S = 15
"""Of a run that has not finished the page loads itself anew so often."""


def write_report(run_folder: Path, *, serve_command: str | None = None, is_over: bool = False) -> Path:
    """Write `report.html` into the run folder from what lies there, and return its path.

    `serve_command` serves the adapter; without it the one that `run.json` has. Pieces that are missing are left out,
    and named where the run had them. A `transcripts.html` that lies there is linked to. `is_over`: the run has
    finished, whatever it has noted of that. Raises `FileNotFoundError` where there is no such folder.
    """
    data = read_run(run_folder)
    adapter = run_folder / "adapter"
    comparison, unread = _compared(data, run_folder)
    is_over |= str(data.info.get("finished_steps")) == _in_config(data, "optim", "num_steps")
    return write_page(
        run_folder / "report.html",
        "run.html",
        refresh_s=0 if is_over else REFRESH_S,
        title=run_folder.resolve().name,
        facts=[*_facts(data), *([] if is_over else [("written", time.strftime("%Y-%m-%d %H:%M:%S%z"))])],
        notes=[*_notes(data), *_missing(data, run_folder), *unread],
        transcripts=TRANSCRIPTS if (run_folder / TRANSCRIPTS).exists() else "",
        table=before_after_table(comparison) if comparison else None,
        remarks=_remarks(comparison) if comparison else [],
        sections=_sections(data),
        health=_health(data),
        pairs=pairs_shown(comparison) if comparison else [],
        config=_with_resolved(data),
        versions=_versions(data),
        adapter=str(adapter.resolve()) if adapter.exists() else "",
        serve_command=serve_command or (serve_command_of(data.info, adapter) if adapter.exists() else ""),
    )


def before_and_after(run_folder: Path, *, until: int | None = None) -> Comparison | None:
    """The first evaluation against the last; the first alone where there is no other, None where there is none.

    `until`: of steps later than this one nothing is read. Evaluations of which no rollout with a grade can be read are
    left out. Raises `FileNotFoundError`.
    """
    return _compared(read_run(run_folder), run_folder, until=until)[0]


def before_after_table(comparison: Comparison) -> Grid:
    """As the page, the terminal and Markdown show it."""
    title = "Before and after training" if len(comparison.evaluations) > 1 else "On held-out tasks"
    return side_by_side(comparison, comparison.lines, id="before-after", title=title, corner="held-out tasks")


def _compared(data: RunData, run_folder: Path, *, until: int | None = None) -> tuple[Comparison | None, list[str]]:
    """The comparison, and what of the evaluations could not be read."""
    steps = [step for step in data.eval_steps if until is None or step <= until]
    evaluations = [
        read_evaluation(
            run_folder,
            step,
            # A run without an evaluation at step 0 does not claim to show "before".
            name=f"step {step}" if step else "before",
            num_rollouts=data.steps[step].get("eval/rollouts"),
        )
        for step in dict.fromkeys([*steps[:1], *steps[-1:]])
    ]
    notes = [note for evaluation in evaluations for note in evaluation.notes]
    readable = [evaluation for evaluation in evaluations if evaluation.graded()]
    try:
        return (compare(readable) if readable else None), notes
    except UserError as e:
        return compare(readable[:1]), [*notes, str(e)]


def _remarks(comparison: Comparison) -> list[str]:
    """How much the table's figures rest on."""
    numbers = ", ".join(f"{len(e.rollouts)} ({e.name})" for e in comparison.evaluations)
    said = [note for e in comparison.evaluations for note in e.notes]
    rest = [remark for remark in remarks(comparison) if not any(remark.endswith(note) for note in said)]
    return [f"{comparison.num_tasks} held-out tasks; graded rollouts of them: {numbers}.", *rest]


def _facts(data: RunData) -> list[tuple[str, str]]:
    """What stands under the title."""
    planned = _in_config(data, "optim", "num_steps")
    done = max(data.train_steps, default=0)
    facts = [
        ("run", str(data.info.get("run_id") or "")),
        ("model", _in_config(data, "model", "name")),
        ("weights", _resolved(data).get("model.dtype") or _in_config(data, "model", "dtype")),
        ("seed", _in_config(data, "seed")),
        ("steps", f"{done} of {planned}" if planned else str(done)),
        ("started", str(data.info.get("started") or "")),
        ("hardware", str(data.info.get("hardware") or "")),
    ]
    return [(name, value) for name, value in facts if value]


def _in_config(data: RunData, *keys: str) -> str:
    value: Any = data.config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def _resolved(data: RunData) -> Mapping[str, str]:
    """What `auto` meant, by key; empty for a run that did not note it."""
    found = data.info.get("resolved")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _with_resolved(data: RunData) -> str:
    """The config as it stands, and behind each `auto` what it meant."""
    lines: list[str] = []
    meant, section = _resolved(data), ""
    for line in data.config_text.splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            section = name
        key = f"{section}.{name.strip()}" if line.startswith("  ") and not line.startswith("   ") else ""
        lines.append(f"{line}  # {meant[key]}" if value.strip() == "auto" and key in meant else line)
    return "\n".join(lines)


def _notes(data: RunData) -> list[str]:
    """What is not there and why a reader might miss it."""
    notes = list(data.notes)
    planned, done = _in_config(data, "optim", "num_steps"), max(data.train_steps, default=0)
    if planned.isdigit() and done < int(planned):
        is_over = str(data.info.get("finished_steps")) == planned
        why = "the run has finished, but metrics.jsonl lacks steps" if is_over else "the run has not finished"
        notes.append(f"{why}: {done} of {planned} steps are {'there' if is_over else 'done'}")
    if not data.eval_steps:
        notes.append("there is no evaluation on held-out tasks yet")
    elif len(data.eval_steps) == 1:
        notes.append("there is one evaluation only: nothing to compare it with yet")
    for step in data.eval_steps:
        if masked := data.steps[step].get("eval/masked_rollouts"):
            kinds = _kinds_of_masked({k: data.steps[step].get(f"eval/masked_by/{k}", 0.0) for k in WHY_MASKED})
            notes.append(f"evaluation after {step} steps: {masked:.0f} rollouts have no grade{kinds}")
    return notes


def _missing(data: RunData, run_folder: Path) -> list[str]:
    """What the run has written, by what it says of itself, and is not there."""
    notes = []
    adapter, files = run_folder / "adapter", data.info.get("adapter_files")
    if "adapter" in data.info and not adapter.exists():
        notes.append("adapter/ is missing: there is nothing to serve")
    elif isinstance(files, dict) and (lost := [str(name) for name in files if not (adapter / str(name)).is_file()]):
        notes.append(f"adapter/ lacks {', '.join(lost)}")
    if lost_steps := sorted({*data.train_steps} - {*steps_in(run_folder / Kind.TRAIN)}):
        of = f"{len(lost_steps)} of {len(data.train_steps)} steps"
        notes.append(f"{Kind.TRAIN}/ lacks the files of {of}: their rollouts can't be looked at")
    return notes


def _kinds_of_masked(counts: Mapping[str, float]) -> str:
    """Why rollouts have no grade, to go on with; empty where the run did not note it."""
    kinds = ", ".join(f"{count:,.0f} {WHY_MASKED[kind]}" for kind, count in counts.items() if count)
    return f": {kinds}" if kinds else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """A picture over the steps: what a new one needs. Without data it is left out."""

    section: str
    title: str
    unit: str
    series: Callable[[RunData], Sequence[Series]]
    is_share: bool = False
    stacked: bool = False
    """A bar a step; where a series has no value it counts as zero."""

    def draw(self, data: RunData) -> Markup:
        draw = stacked_chart if self.stacked else line_chart
        return draw(self.title, self.series(data), unit=self.unit, percent=self.is_share)


def _named(prefix: str, suffix: str = "") -> Callable[[RunData], list[Series]]:
    """A series for each metric of the prefix, named by what follows it."""

    def series(data: RunData) -> list[Series]:
        keys = [k for k in data.keys(prefix) if k.endswith(suffix)]
        return [Series(name=k[len(prefix) : len(k) - len(suffix)], points=data.series(k)) for k in keys]

    return series


def _one(key: str, name: str) -> Callable[[RunData], list[Series]]:
    return lambda data: [Series(name=name, points=data.series(key))]


def _train_and_eval(keys: Mapping[str, str]) -> Callable[[RunData], list[Series]]:
    """Training and held-out tasks of each key, which has a name where there are several."""

    def series(data: RunData) -> list[Series]:
        return [
            Series(name=f"{name}{part}", points=data.series(f"{where}/{key}"), marks_only=where == "eval")
            for key, name in keys.items()
            for part, where in (("training", "train"), ("held out", "eval"))
        ]

    return series


def _reasoning(data: RunData) -> list[Series]:
    """Nothing for a model that does not reason."""
    both = {"reasoning_tokens": "reasoning, ", "answer_tokens": "calls and answer, "}
    return _train_and_eval(both)(data) if any(v > 0 for _, v in data.series("train/reasoning_tokens")) else []


def _watching(data: RunData) -> list[Series]:
    watching = data.series("train/watch/score")
    both = [Series(name="grader, trained on", points=_grader_score(data)), Series(name="watching", points=watching)]
    return both if watching else []


def _grader_score(data: RunData) -> list[tuple[int, float]]:
    """What the watching grader is compared with: its own score and the divergence add up to the grader's."""
    divergence = dict(data.series("train/watch/divergence"))
    return [(step, watch + divergence[step]) for step, watch in data.series("train/watch/score") if step in divergence]


def _laps(data: RunData) -> list[Series]:
    """The step's laps, which follow each other, and what is left of the step. What goes on during them is no part."""
    laps = [Series(name=lap, points=data.series(key)) for lap, key in _LAPS.items()]
    rest = []
    for step, whole in data.series("time/step_s"):
        known = sum(data.steps[step].get(key, 0.0) for key in _LAPS.values())
        rest.append((step, max(0.0, whole - known)))
    return [*laps, Series(name="other", points=rest)]


_CURVES, _REWARD, _TIME, _GRADER = "Learning curves", "Where the reward comes from", "Time of a step", "Grader"
_OTHER_TIME = "Time outside rollouts, training and publishing"
_CHARTS: tuple[_Chart, ...] = (
    *(
        _Chart(section=_CURVES, title=m.title, unit=m.unit, series=_train_and_eval({m.key: ""}), is_share=m.is_share)
        for m in shown_in(Place.CURVE)
    ),
    _Chart(section=_CURVES, title="Reasoning and answer tokens", unit="tokens per rollout", series=_reasoning),
    _Chart(section=_REWARD, title="Reward parts", unit="mean reward", series=_named("train/part/")),
    _Chart(
        section=_REWARD,
        title="How episodes end",
        unit="share of rollouts",
        series=_named("train/stop/"),
        is_share=True,
        stacked=True,
    ),
    _Chart(section=_REWARD, title="Calls by tool", unit="calls per rollout", series=_named("train/tool/", "/calls")),
    _Chart(section=_REWARD, title="Tool errors", unit="errors per rollout", series=_named("train/tool/", "/errors")),
    _Chart(section=_REWARD, title="Tool latency", unit="seconds per call", series=_named("train/tool/", "/latency_s")),
    _Chart(section=_REWARD, title="Tool outputs", unit="tokens per call", series=_named("train/tool/", "/tokens")),
    _Chart(section=_TIME, title="Time split", unit="seconds", series=_laps, stacked=True),
    _Chart(
        section=_TIME,
        title=_OTHER_TIME,
        unit="share of the step",
        series=_one("time/other_share", "share of the step"),
        is_share=True,
    ),
    _Chart(section=_GRADER, title="The grader and the one that only watches", unit="mean score", series=_watching),
    _Chart(section=_GRADER, title="Scores inside the grader", unit="mean score", series=_named("train/score/")),
    _Chart(section=_GRADER, title="Grader errors", unit="errors per rollout", series=_named("train/grader_error/")),
    _Chart(section=_GRADER, title="Judge tokens", unit="tokens per rollout", series=_named("train/judge_tokens/")),
    _Chart(
        section=_GRADER,
        title="Grader latency",
        unit="seconds per rollout",
        series=_one("train/grader_latency_s", "grader"),
    ),
)
_OWN_CHARTS = {
    **dict.fromkeys(("time/", "throughput/"), _TIME),
    **dict.fromkeys(("http/", "grader/", "judge/", "user/"), "Servers"),
    "loss/": "Loss",
    **dict.fromkeys(("groups/", "curriculum/", "canary/"), "Groups, and engine against trainer"),
    "": "Other figures",
}
"""Every other metric has a picture of its own, under its own key: by prefix, in which section."""


def _sections(data: RunData) -> list[tuple[str, list[Markup]]]:
    """Pictures under their headings; those without data are left out."""
    charts = [*_CHARTS, *_own_charts(data)]
    sections: dict[str, list[Markup]] = {}
    for chart in charts:
        if drawn := chart.draw(data):
            sections.setdefault(chart.section, []).append(drawn)
    return list(sections.items())


def _own_charts(data: RunData) -> list[_Chart]:
    charts = []
    left = [key for key in data.keys("") if not key.startswith(("train/", "eval/")) and key not in _TIME_SPLIT]
    for prefix, section in _OWN_CHARTS.items():
        for key in [key for key in left if key.startswith(prefix)]:
            left.remove(key)
            is_share = "share" in key or "applied" in key
            unit = "nats a token" if "mismatch" in key else "share" if is_share else "value"
            unit = "seconds" if prefix == "time/" else unit
            charts.append(_Chart(section=section, title=key, unit=unit, series=_one(key, key.removeprefix(prefix))))
    return charts


def _health(data: RunData) -> Grid:
    """(what, over the run, meaning): what should be zero or small in a healthy run."""
    masked = _kinds_of_masked({k: sum(v for _, v in data.series(f"train/masked_by/{k}")) for k in WHY_MASKED})
    rows = []
    for count in COUNTS:
        values = [v for _, v in data.series(f"train/{count.key}")] if count.is_health else []
        if values:
            why = masked if count.key == "masked_rollouts" else ""
            rows.append((count.label, f"{sum(values):,.0f} in all", f"{count.meaning}{why}"))
    if tied := [v for _, v in data.series("groups/tied_share")]:
        meaning = "all rewards equal: nothing to learn from in the group"
        rows.append(("tied groups", f"{fmean(tied):.1%} on average", meaning))
    for measure in shown_in(Place.HEALTH):
        if values := [v for _, v in data.series(f"train/{measure.key}")]:
            rows.append((measure.label, f"{measure.show(fmean(values))} on average", measure.meaning))
    return facts("health", rows, has_remarks=True)


def _versions(data: RunData) -> Grid:
    versions = data.info.get("versions")
    rows = [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, dict) else []
    return facts("versions", rows, has_remarks=True)
