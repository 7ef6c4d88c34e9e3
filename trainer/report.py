"""The report of a run: one HTML file that needs no network, no server and no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from rich.table import Table

from trainer.before_after import (
    Row,
    headers,
    mean_rewards,
    paired_difference,
    render_markdown,
    render_table,
    rows_of,
)
from trainer.charts import Series, line_chart, stacked_chart
from trainer.measures import WHY_MASKED
from trainer.page import cut, write_page
from trainer.run_data import RunData, Sample, read_run
from trainer.transcripts import PAGE as TRANSCRIPTS

_NUM_GAINS, _NUM_LOSSES = 3, 2


def write_report(run_folder: Path, *, serve_command: str | None = None) -> Path:
    """Write `report.html` into the run folder from what lies there, and return its path.

    `serve_command` serves the adapter; without it `serve_command` of `run.json` is shown. Pieces that are missing are
    left out; a `transcripts.html` that lies there is linked to. Raises `FileNotFoundError` where there is no such
    folder.
    """
    data = read_run(run_folder)
    adapter = run_folder / "adapter"
    return write_page(
        run_folder / "report.html",
        "report_template.html",
        title=run_folder.resolve().name,
        facts=_facts(data),
        notes=_notes(data),
        transcripts=TRANSCRIPTS if (run_folder / TRANSCRIPTS).exists() else "",
        headers=headers(data),
        rows=rows_of(data),
        caption=_caption(data),
        sections=_sections(data),
        health=_health(data),
        pairs=_pairs(data),
        config=_with_resolved(data),
        versions=_versions(data),
        adapter=str(adapter.resolve()) if adapter.exists() else "",
        serve_command=serve_command or str(data.info.get("serve_command") or ""),
    )


def before_after_table(run_folder: Path) -> list[Row]:
    """The first evaluation against the last, metric by metric; empty without an evaluation."""
    return rows_of(read_run(run_folder))


def render_terminal_table(run_folder: Path) -> Table:
    """The before/after table as a rich table."""
    data = read_run(run_folder)
    return render_table(rows_of(data), headers(data))


def markdown_table(run_folder: Path) -> str:
    """The before/after table for README and RESULTS."""
    data = read_run(run_folder)
    return render_markdown(rows_of(data), headers(data))


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
        notes.append(f"the run has not finished: {done} of {planned} steps are done")
    if not data.eval_steps:
        notes.append("there is no evaluation on held-out tasks yet")
    elif len(data.eval_steps) == 1:
        notes.append("there is one evaluation only: nothing to compare it with yet")
    for step in data.eval_steps:
        if masked := data.steps[step].get("eval/masked_rollouts"):
            kinds = _kinds_of_masked({k: data.steps[step].get(f"eval/masked_by/{k}", 0.0) for k in WHY_MASKED})
            notes.append(f"evaluation after {step} steps: {masked:.0f} rollouts have no grade{kinds}")
    return notes


def _kinds_of_masked(counts: Mapping[str, float]) -> str:
    """Why rollouts have no grade, to go on with; empty where the run did not note it."""
    kinds = ", ".join(f"{count:,.0f} {WHY_MASKED[kind]}" for kind, count in counts.items() if count)
    return f": {kinds}" if kinds else ""


def _caption(data: RunData) -> str:
    """How much the table's figures rest on."""
    if not data.eval_steps:
        return ""
    rollouts = data.steps[data.eval_steps[0]].get("eval/rollouts")
    parts = []
    if data.before:
        num_tasks = len(mean_rewards(data.before))
        parts.append(f"{rollouts or len(data.before):.0f} rollouts of {num_tasks} held-out tasks in each evaluation.")
    change = paired_difference(data.before, data.after)
    if change:
        mean, error, n = change
        parts.append(f"Mean change of a task's reward: {mean:+.3f} ± {error:.3f} (standard error over {n} tasks).")
    return " ".join(parts)


def _sections(data: RunData) -> list[tuple[str, list[Markup]]]:
    """Charts under their headings; those without data are left out."""
    sections = [
        ("Learning curves", _learning_curves(data)),
        ("Where the reward comes from", _reward_charts(data)),
        ("Time of a step", _time_charts(data)),
        ("Grader", _grader_charts(data)),
        ("Servers", [c for p in ("http/", "grader/", "judge/", "sandbox/") for c in _generic_charts(data, p)]),
        ("Loss", _generic_charts(data, "loss/")),
        ("Groups, and engine against trainer", _generic_charts(data, "groups/") + _generic_charts(data, "canary/")),
    ]
    return [(name, drawn) for name, charts in sections if (drawn := [c for c in charts if c])]


def _learning_curves(data: RunData) -> list[Markup]:
    curves = [
        ("reward", "Mean reward", "reward", False),
        ("correct", "Correct", "share of rollouts", True),
        ("tool_calls", "Tool calls", "calls per rollout", False),
        ("invalid_calls", "Invalid calls", "calls per rollout", False),
        ("completion_tokens", "Generated tokens", "tokens per rollout", False),
        ("episode_latency_s", "Latency", "seconds per episode", False),
    ]
    charts = [
        line_chart(title, _train_and_eval(data, key), unit=unit, percent=percent)
        for key, title, unit, percent in curves
    ]
    if any(value > 0 for _, value in data.series("train/reasoning_tokens")):
        kinds = [("reasoning", "reasoning_tokens"), ("calls and answer", "answer_tokens")]
        series = [
            Series(name=f"{word}, {part}", points=data.series(f"{part}/{key}"), marks_only=part == "eval")
            for word, key in kinds
            for part in ("train", "eval")
        ]
        charts.append(line_chart("Reasoning and answer tokens", series, unit="tokens per rollout"))
    return charts


def _train_and_eval(data: RunData, key: str) -> list[Series]:
    return [
        Series(name="training", points=data.series(f"train/{key}")),
        Series(name="held out", points=data.series(f"eval/{key}"), marks_only=True),
    ]


def _named(data: RunData, prefix: str, suffix: str = "") -> list[Series]:
    """A series for each metric of the prefix, named by what follows it."""
    keys = [k for k in data.keys(prefix) if k.endswith(suffix)]
    return [Series(name=k[len(prefix) : len(k) - len(suffix)], points=data.series(k)) for k in keys]


def _reward_charts(data: RunData) -> list[Markup]:
    # A stop reason that did not occur in a step has no key there: the bars take it as zero.
    return [
        line_chart("Reward parts", _named(data, "train/part/"), unit="mean reward"),
        stacked_chart("How episodes end", _named(data, "train/stop/"), unit="share of rollouts", percent=True),
        line_chart("Calls by tool", _named(data, "train/tool/", "/calls"), unit="calls per rollout"),
        line_chart("Tool errors", _named(data, "train/tool/", "/errors"), unit="errors per rollout"),
        line_chart("Tool latency", _named(data, "train/tool/", "/latency_s"), unit="seconds per call"),
        line_chart("Tool outputs", _named(data, "train/tool/", "/tokens"), unit="tokens per call"),
    ]


def _grader_charts(data: RunData) -> list[Markup]:
    watch = [
        Series(name="grader, trained on", points=_grader_score(data)),
        Series(name="watching grader", points=data.series("train/watch/score")),
    ]
    return [
        line_chart("The grader and the one that only watches", watch if watch[1].points else [], unit="mean score"),
        line_chart("Scores inside the grader", _named(data, "train/score/"), unit="mean score"),
        line_chart("Grader errors", _named(data, "train/grader_error/"), unit="errors per rollout"),
        line_chart("Judge tokens", _named(data, "train/judge_tokens/"), unit="tokens per rollout"),
        line_chart("Grader latency", _named(data, "train/grader_latency_s"), unit="seconds per rollout"),
    ]


def _grader_score(data: RunData) -> list[tuple[int, float]]:
    """What the watching grader is compared with: its own score and the divergence add up to the grader's."""
    divergence = dict(data.series("train/watch/divergence"))
    return [(step, watch + divergence[step]) for step, watch in data.series("train/watch/score") if step in divergence]


def _time_charts(data: RunData) -> list[Markup]:
    usual = ["time/rollouts_s", "time/training_s", "time/publish_s"]
    others = [k for k in data.keys("time/") if k.endswith("_s") and k not in [*usual, "time/step_s"]]
    parts = [k for k in usual if data.series(k)] + others
    series = [Series(name=k.removeprefix("time/").removesuffix("_s"), points=data.series(k)) for k in parts]
    rest = []
    for step, whole in data.series("time/step_s"):
        known = sum(data.steps[step].get(k, 0.0) for k in parts)
        rest.append((step, max(0.0, whole - known)))
    other = line_chart(
        "Time outside rollouts, training and publishing",
        [Series(name="share of the step", points=data.series("time/other_share"))],
        unit="share of the step",
        percent=True,
    )
    return [stacked_chart("Time split", [*series, Series(name="other", points=rest)], unit="seconds"), other]


def _generic_charts(data: RunData, prefix: str) -> list[Markup]:
    """One chart for each metric of the prefix, under its own key."""
    charts = []
    for series in _named(data, prefix):
        shares = "share" in series.name or "applied" in series.name
        unit = "nats a token" if "mismatch" in series.name else "share" if shares else "value"
        charts.append(line_chart(prefix + series.name, [series], unit=unit))
    return charts


def _health(data: RunData) -> list[tuple[str, str, str]]:
    """(what, over the run, meaning): what should be zero or small in a healthy run."""
    masked = _kinds_of_masked({k: sum(v for _, v in data.series(f"train/masked_by/{k}")) for k in WHY_MASKED})
    sums = [
        ("train/masked_rollouts", "rollouts masked out", f"without a grade, not trained on{masked}"),
        ("train/retried_rollouts", "rollouts retried", "the world or the grading of earlier attempts failed"),
    ]
    means = [
        ("groups/tied_share", "tied groups", "{:.1%}", "all rewards equal: nothing to learn from in the group"),
        ("train/forks", "forked rows per rollout", "{:.3f}", "turns at which the template rewrote the earlier text"),
        (
            "train/drifted_turns",
            "drifted turns per rollout",
            "{:.3f}",
            "raw text differs from what serving would render",
        ),
        ("train/malformed_calls", "malformed calls per rollout", "{:.3f}", "attempts at a call that did not parse"),
        (
            "train/special_tokens_in_tools",
            "special tokens in tool outputs per rollout",
            "{:.3f}",
            "outputs spell out tokens of the chat format: they could forge messages",
        ),
        (
            "train/special_tokens_spelled",
            "special tokens spelled out per rollout",
            "{:.3f}",
            "the model writes them in ordinary tokens, which serving's next prompt turns into the tokens themselves",
        ),
    ]
    rows = []
    for key, name, meaning in sums:
        if values := [v for _, v in data.series(key)]:
            rows.append((name, f"{sum(values):,.0f} in all", meaning))
    for key, name, text_format, meaning in means:
        if values := [v for _, v in data.series(key)]:
            rows.append((name, f"{text_format.format(fmean(values))} on average", meaning))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """One transcript as the page shows it."""

    heading: str
    reward: str
    stop_reason: str
    explanation: str
    parts: list[tuple[str, str]]
    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A task with one transcript of before and one of after."""

    task_id: str
    change: str
    question: str
    prompt: list[dict[str, Any]]
    item: str
    sides: list[_Shown]


def _pairs(data: RunData) -> list[_Pair]:
    """The tasks whose mean reward rose most, and those where it fell most: both, or the choice would flatter.

    Of each task the rollouts nearest to its mean reward are shown.
    """
    before, after = mean_rewards(data.before), mean_rewards(data.after)
    changes = sorted(((after[t] - before[t], t) for t in before if t in after), reverse=True)
    gains = [c for c in changes[:_NUM_GAINS] if c[0] > 0]
    losses = [c for c in changes[::-1][:_NUM_LOSSES] if c[0] < 0]
    pairs = []
    for change, task_id in gains + losses:
        direction = 1.0 if change > 0 else -1.0
        old = _typical(data.before, task_id, before[task_id], -direction)
        new = _typical(data.after, task_id, after[task_id], direction)
        item = {k: v for k, v in old.item.items() if isinstance(v, str | int | float | bool)}
        pairs.append(
            _Pair(
                task_id=task_id,
                change=f"mean reward {before[task_id]:.2f} → {after[task_id]:.2f} ({change:+.2f})",
                question=next((cut(m.get("content"), 400) for m in _prompt(old)[::-1] if m.get("role") == "user"), ""),
                prompt=[_message(m) for m in _prompt(old)],
                item=cut(json.dumps(item, ensure_ascii=False), 600) if item else "",
                sides=[_shown("before", old), _shown("after", new)],
            )
        )
    return pairs


def _typical(samples: Sequence[Sample], task_id: str, mean: float, direction: float) -> Sample:
    """The rollout nearest to the mean; of two as near, the one that lies in the direction of the change."""
    mine = [s for s in samples if s.task_id == task_id]
    return min(mine, key=lambda s: (round(abs(s.reward - mean), 6), -direction * s.reward))


def _prompt(sample: Sample) -> list[dict[str, Any]]:
    """The messages before the model's first."""
    roles = [m.get("role") for m in sample.messages]
    return sample.messages[: roles.index("assistant")] if "assistant" in roles else sample.messages


def _shown(heading: str, sample: Sample) -> _Shown:
    return _Shown(
        heading=heading,
        reward=f"{sample.reward:.3f}",
        stop_reason=sample.stop_reason,
        explanation=cut(sample.explanation),
        parts=[(name, f"{value:+.3f}") for name, value in sample.parts.items()],
        messages=[_message(m) for m in sample.messages[len(_prompt(sample)) :]],
    )


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Role, name, texts and calls; whatever types lie in the file, text comes out."""
    calls = message.get("tool_calls")
    calls = [c for c in calls if isinstance(c, dict)] if isinstance(calls, list) else []
    return {
        "role": str(message.get("role") or "?"),
        "name": str(message.get("name") or ""),
        "reasoning": cut(message.get("reasoning")),
        "content": cut(message.get("content")),
        "calls": [cut(f"{c.get('name')}({c.get('arguments')})") for c in calls],
    }


def _versions(data: RunData) -> list[tuple[str, str]]:
    versions = data.info.get("versions")
    return [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, dict) else []
