"""The preflight as people read it: on the terminal, and as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from envs.secrets import without_secrets
from trainer.measures.masked import WHY_MASKED
from trainer.models.machines import gib
from trainer.models.memory import MemoryRow, memory_bytes
from trainer.preflight.advice import Advice, Level
from trainer.preflight.computed import Estimate
from trainer.preflight.duration import TimeEstimate
from trainer.preflight.measured import Preflight
from trainer.reports.drawing import Series, bars, histogram, line_chart
from trainer.reports.pages import write_page
from trainer.reports.plot import number
from trainer.reports.tables import facts, to_terminal

_PASSES = "pass@k: chance that one of k passes"
_COLOURS = {Level.STOP: "red", Level.WARN: "yellow", Level.GOOD: "green"}


def write_preflight_page(found: Preflight, path: Path) -> Path:
    """Write the page to `path` and return it."""
    return write_page(
        path,
        "preflight.html",
        title="Preflight",
        facts=[("policy", found.policy)],
        verdict=found.verdict,
        advice=found.advice,
        figures=facts("figures", figure_rows(found), headers=["over the rollouts of this preflight", "value"]),
        sections=_sections(found),
        time=facts("time", time_rows(found), headers=["part", "estimate"]),
        time_notes=found.time.notes,
        memory=facts("memory", _memory_rows(found.memory), headers=["what", "estimate", "formula"], has_remarks=True),
        memory_total=_memory_total(found.memory),
        config=json.dumps(without_secrets(found.config.model_dump(mode="json")), indent=1),
    )


def render_preflight(found: Preflight) -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = [Text(f"Preflight of {found.policy}", style="bold")]
    parts += [_list(figure_rows(found)), Text("\nTime of the configured run", style="bold"), _list(time_rows(found))]
    parts += [Text(f"  {note}", style="dim") for note in found.time.notes]
    if found.memory:
        memory = [(f"{r.where}: {r.name}", gib(r.num_bytes)) for r in found.memory]
        parts.append(Text(f"\nMemory: {_memory_total(found.memory)}", style="bold"))
        parts.append(_list([*memory, ("in all", gib(memory_bytes(found.memory)))]))
    parts += [Text(""), *map(_panel, found.advice), Text(found.verdict, style="bold")]
    return Group(*parts)


def render_estimate(estimate: Estimate) -> RenderableType:
    """What was computed without running anything, for the terminal."""
    rows = _memory_rows(estimate.memory)
    if estimate.engine_share_bytes is None:
        rows.append(("in all", gib(memory_bytes(estimate.memory)), ""))
    else:
        rows.append(("engine: what it takes", gib(estimate.engine_share_bytes), "its share, or its cache and weights"))
    parts: list[RenderableType] = [
        Text(f"Memory of each process, on {estimate.where}: an unmeasured estimate, by formula", style="bold"),
        _list(rows),
        *map(_panel, estimate.advice),
    ]
    if estimate.time is None:
        parts.append(
            Text(
                "No time: name a GPU with --gpu, or give --gpu-memory-gib, --gpu-tflops and --gpu-bandwidth. How fast "
                "an engine of your own is, a preflight that runs it says."
            )
        )
        return Group(*parts)
    times = _durations(estimate.time, ("start", "rollouts", "training"), estimate.gpu_hour_price)
    parts += [
        Text(f"\nTime on {estimate.where}: an unmeasured estimate, by formula", style="bold"),
        _list(times),
        *(Text(f"  {note}", style="dim") for note in estimate.time.notes),
    ]
    return Group(*parts)


def figure_rows(found: Preflight) -> list[tuple[str, str]]:
    """(what, value), the most telling first."""
    f = found.figures
    k = f.samples_per_task
    rows = [
        ("tasks × rollouts", f"{len(f.tasks)} × {k}"),
        ("mean reward", number(f.mean)),
        (f"best of {k}", number(f.best)),
        (f"worst of {k}", number(f.worst)),
        ("tasks whose rewards vary", number(f.varied_share, percent=True)),
    ]
    if f.correct is not None and f.never_passed is not None and f.always_passed is not None:
        rows += [
            ("passed", number(f.correct, percent=True)),
            ("tasks never passed", number(f.never_passed, percent=True)),
            ("tasks always passed", number(f.always_passed, percent=True)),
        ]
    num_graded = len(f.tokens)
    rows += [
        ("tool calls per rollout", number(sum(f.tool_calls) / num_graded)),
        ("generated tokens per rollout", number(sum(f.tokens) / num_graded)),
        ("tool errors per call", number(f.tool_error_share, percent=True)),
        ("rollouts with a malformed call", number(f.malformed_share, percent=True)),
        ("grader errors per rollout", number(sum(f.grader_errors.values()))),
        ("rollouts without a grade", f"{f.num_masked} of {f.num_rollouts}"),
    ]
    rows += [(f"of them {WHY_MASKED[kind]}", str(sum(causes.values()))) for kind, causes in f.masked_causes.items()]
    return rows


def time_rows(found: Preflight) -> list[tuple[str, str]]:
    """(part, duration), the whole and its price last."""
    s = found.speeds
    measured = "not estimated" if s.trained_tokens_per_s is None else f"{s.trained_tokens_per_s:,.0f} tokens/s"
    names = (
        "start, with the warm start",
        f"rollouts, at {s.sampled_tokens_per_s:,.0f} tokens/s measured",
        f"training, at {measured}",
    )
    return _durations(found.time, names, found.gpu_hour_price)


def _durations(t: TimeEstimate, names: tuple[str, str, str], gpu_hour_price: float | None) -> list[tuple[str, str]]:
    """`names`: what the rows of start, rollouts and training are called."""
    start, rollouts, training = names
    rows = [
        (start, _duration(t.start_s)),
        (rollouts, _duration(t.rollouts_s)),
        (training, "–" if t.training_s is None else _duration(t.training_s)),
        ("publishing", _duration(t.publish_s)),
        ("evaluations", _duration(t.evaluation_s)),
        ("in all", _duration(t.total_s)),
    ]
    if gpu_hour_price is not None:
        price = f"{t.gpus} GPU{'s' * (t.gpus > 1)} at {gpu_hour_price:g} an hour"
        rows.append((f"cost, {price}", f"{t.cost(gpu_hour_price):,.2f}"))
    return rows


def _sections(found: Preflight) -> list[tuple[str, list[Markup]]]:
    f = found.figures
    means = [stats.mean for stats in f.tasks.values()]
    stops = list(f.stop_shares.items())
    lost = [(WHY_MASKED[kind], sum(causes.values()) / f.num_rollouts) for kind, causes in f.masked_causes.items()]
    failures = [*((f"tool: {kind}", x) for kind, x in f.tool_errors.items()),
                *((f"grader: {kind}", x) for kind, x in f.grader_errors.items()), *lost]  # fmt: skip
    passes = [Series(name=name, points=points) for name, points in f.curves.items() if name == "pass@k"]
    rewards = [Series(name=name, points=points) for name, points in f.curves.items() if name != "pass@k"]
    taken = [(name, abs(value)) for name, value in f.parts.items()]
    sections = [
        (
            "What the policy can do",
            [
                line_chart(_PASSES, passes, x_unit="k", unit="share of tasks", percent=True),
                line_chart("Best, mean and worst reward of k", rewards, x_unit="k", unit="reward"),
                histogram("Mean reward by task", {"tasks": means}, unit="mean reward", whole=False, of="tasks"),
                bars("Tasks by what they teach", _kinds_of_tasks(found), show=lambda x: number(x, percent=True)),
            ],
        ),
        (
            "What a rollout costs",
            [
                histogram("Tool calls", {"rollouts": f.tool_calls}, unit="calls in a rollout"),
                histogram("Generated tokens", {"rollouts": f.tokens}, unit="tokens of a rollout"),
                histogram("Tokens that training reads", {"rollouts": f.episode_tokens}, unit="tokens, prompt included"),
                bars("Parts of the reward, mean size", taken, show=number),
            ],
        ),
        (
            "How rollouts end, and what fails",
            [
                bars("Why rollouts end", stops, show=lambda x: number(x, percent=True)),
                bars("Failures per rollout", failures, show=number),
            ],
        ),
        ("The run", [bars("Where the time goes", _time_bars(found), show=_duration),
                     bars("Memory", [(f"{r.where}: {r.name}", r.num_bytes) for r in found.memory], show=gib)]),
    ]  # fmt: skip
    return [(name, [p for p in pictures if p]) for name, pictures in sections]


def _kinds_of_tasks(found: Preflight) -> list[tuple[str, float]]:
    tasks = found.figures.tasks.values()
    top = max(stats.best for stats in tasks)
    tied = [stats for stats in tasks if stats.tied]
    high = sum(stats.best == top for stats in tied)
    kinds = [
        ("rewards vary", len(tasks) - len(tied)),
        (f"tied at the top, {top:.3g}", high),
        ("tied below", len(tied) - high),
    ]
    return [(name, count / len(tasks)) for name, count in kinds]


def _time_bars(found: Preflight) -> list[tuple[str, float]]:
    t = found.time
    rows = [("start", t.start_s), ("rollouts", t.rollouts_s), ("training", t.training_s or 0.0)]
    return [*rows, ("publishing", t.publish_s), ("evaluations", t.evaluation_s)]


def _memory_total(rows: Sequence[MemoryRow]) -> str:
    trainer, engine = memory_bytes(rows, "trainer"), memory_bytes(rows, "engine")
    told = f", engine {gib(engine)}" if engine else ""
    return f"trainer {gib(trainer)}{told} per process" if rows else ""


def _panel(advice: Advice) -> Panel:
    text = Text(advice.finding)
    if advice.what_to_do:
        text.append(f"\n{advice.what_to_do}", style="dim")
    return Panel(text, title=advice.level, title_align="left", border_style=_COLOURS[advice.level], expand=True)


def _memory_rows(rows: Sequence[MemoryRow]) -> list[tuple[str, str, str]]:
    return [(f"{r.where}: {r.name}", gib(r.num_bytes), r.formula) for r in rows]


def _list(rows: Sequence[tuple[str, ...]]) -> Table:
    """(name, value), or (name, value, remark)."""
    return to_terminal(facts("", rows, has_remarks=any(len(row) > 2 for row in rows)))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
