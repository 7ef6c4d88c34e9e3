"""A comparison as people read it: on the terminal, as Markdown, and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.text import Text

from trainer.measures.catalogue import Measure, Place, measure, shown_in
from trainer.measures.intervals import LEVEL, NUM_RESAMPLES, Interval
from trainer.measures.masked import WHY_MASKED
from trainer.reports.comparison import Comparison, Line
from trainer.reports.drawing import histogram, interval_rows
from trainer.reports.pages import pairs_shown, write_page
from trainer.reports.tables import Grid, Row, escaped, to_markdown, to_terminal

METHOD = (
    f"Means over tasks, [{LEVEL:.0%} interval]: paired bootstrap over tasks, {NUM_RESAMPLES:,} resamples, BCa. "
    "The intervals cover which tasks were asked and the chance in their rollouts, not the seed of a training."
)
NO_INTERVAL = (
    "(no interval): all tasks gave the same, so that a bootstrap has nothing to go by; that does not make it certain."
)
LATENCY = (
    "Latency depends on hardware and load: compare it between evaluations on the same machine with as many "
    "rollouts at once."
)

_DEMO = {
    "reward": ("0.59", "0.63", "+7 %"),
    "tool_calls": ("6.9", "4.2", "−39 %"),
    "completion_tokens": ("about 2,500", "about 1,500", "−40 %"),
    "episode_latency_s": ("–", "–", "about −10 %"),
}
"""What the hosted service's published demo reported after ten steps."""


def grids(comparison: Comparison, *, demo: bool) -> list[Grid]:
    """Every table of the comparison, in the order shown."""
    out = [side_by_side(comparison, comparison.lines, id="policies", title=f"{comparison.num_tasks} shared tasks")]
    if demo:
        out.append(_demo_grid(comparison))
    names = ["", *(e.name for e in comparison.evaluations)]
    tails = [
        Row(cells=[f"{measure(key).title}, {quantile}", *(measure(key).show(tail[quantile]) for tail in by_policy)])
        for key, by_policy in comparison.tails.items()
        if all(by_policy)
        for quantile in by_policy[0]
    ]
    out.append(Grid(id="tails", title="Tails, over single rollouts", headers=names, rows=tails))
    if comparison.errors or comparison.num_masked:
        rows = [[name, *(f"{x:.3f}" for x in by_policy)] for name, by_policy in comparison.errors.items()]
        masked = comparison.num_masked.items()
        rows += [[f"rollouts in all that were {WHY_MASKED[kind]}", *map(str, numbers)] for kind, numbers in masked]
        errors = [Row(cells=cells) for cells in rows]
        out.append(Grid(id="errors", title="Errors per rollout", headers=names, rows=errors))
    for kind, lines in comparison.kinds.items():
        title = f"{comparison.by}: {kind} ({lines[0].means[0].num_tasks} tasks)"
        out.append(side_by_side(comparison, lines, id=f"by-{kind}", title=title))
    return out


def side_by_side(comparison: Comparison, lines: Sequence[Line], *, id: str, title: str = "", corner: str = "") -> Grid:
    """The baseline, then each policy with its change and the change in percent. `corner`: the first column's name.

    A change is judged where its interval does not hold zero.
    """
    headers = [corner, comparison.evaluations[0].name]
    for evaluation in comparison.evaluations[1:]:
        headers += [evaluation.name, "change", "in %"]
    return Grid(id=id, title=title, headers=headers, rows=list(map(_row, lines)))


def remarks(comparison: Comparison) -> list[str]:
    """What the figures do not rest on (files that could not be read, tasks that not all have), and what they mean."""
    told = [f"{e.name}: {note}" for e in comparison.evaluations for note in e.notes]
    if comparison.num_left_out:
        told.append(f"{comparison.num_left_out} tasks without a graded rollout of every policy are left out.")
    all_lines = [*comparison.lines, *(line for lines in comparison.kinds.values() for line in lines)]
    lacks = any(not change.is_known for line in all_lines for change in line.differences)
    return [*told, METHOD, *[NO_INTERVAL] * lacks, LATENCY]


def render_terminal(comparison: Comparison, *, demo: bool) -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = [Text(f"{e.name}: {e.source}", style="dim") for e in comparison.evaluations]
    for grid in grids(comparison, demo=demo):
        parts += [to_terminal(grid), Text("")]
    soft = (METHOD, NO_INTERVAL, LATENCY)
    parts += [Text(note, style="dim" if note in soft else "yellow") for note in remarks(comparison)]
    return Group(*parts)


def render_markdown(comparison: Comparison, *, demo: bool) -> str:
    """For README and RESULTS."""
    tables = map(to_markdown, grids(comparison, demo=demo))
    return "\n".join([*tables, *(f"- {escaped(note)}" for note in remarks(comparison)), ""])


def write_comparison_page(comparison: Comparison, path: Path, *, demo: bool) -> Path:
    """Write the page to `path` and return it."""
    return write_page(
        path,
        "comparison.html",
        title=" → ".join(e.name for e in comparison.evaluations),
        facts=[(e.name, e.source) for e in comparison.evaluations],
        tables=grids(comparison, demo=demo),
        sections=[(name, [p for p in pictures if p]) for name, pictures in _sections(comparison)],
        notes=remarks(comparison),
        pairs=pairs_shown(comparison),
    )


def _sections(comparison: Comparison) -> list[tuple[str, list[Markup]]]:
    names = [e.name for e in comparison.evaluations]
    changes = [
        (f"all, {name}", [change])
        for line in comparison.lines
        if line.measure.key == "reward"
        for name, change in zip(names[1:], line.differences, strict=True)
    ]
    intervals = [
        _by_kind(comparison, measure("reward")),
        interval_rows(f"Change in reward from {names[0]}", changes, ["change"], unit="reward"),
        _by_kind(comparison, measure("tool_calls")),
    ]
    distributions = [
        histogram(m.title, _laid_over(comparison, m), unit=m.unit, whole=m.is_whole) for m in shown_in(Place.HISTOGRAM)
    ]
    return [("Reward and calls", intervals), ("Distributions", distributions)]


def _by_kind(comparison: Comparison, shown: Measure) -> Markup:
    """The measure's means, in all and by kind of question."""
    all_lines = {"all": comparison.lines, **comparison.kinds}
    rows = [(name, line.means) for name, lines in all_lines.items() for line in lines if line.measure is shown]
    title = f"{shown.title} by {comparison.by}" if comparison.kinds else shown.title
    return interval_rows(title, rows, [e.name for e in comparison.evaluations], unit=shown.unit)


def _laid_over(comparison: Comparison, shown: Measure) -> Mapping[str, Sequence[float]]:
    values = {e.name: shown.values(e.rollouts) for e in comparison.evaluations}
    # A model that does not reason has nothing to show there.
    return values if any(map(any, values.values())) else {}


def _row(line: Line) -> Row:
    shown = line.measure
    cells, verdicts = [shown.label, shown.show(line.means[0].mean)], ["", ""]
    for i, mean in enumerate(line.means[1:]):
        change, percent = line.differences[i], line.percent(i)
        cells += [shown.show(mean.mean), _change(shown, change), "–" if percent is None else f"{percent:+z.0f} %"]
        verdict = shown.verdict(change.mean) if change.is_clear else ""
        verdicts += ["", verdict, verdict]
    return Row(cells=cells, verdicts=verdicts, key=shown.key)


def in_short(line: Line) -> str:
    """First → last policy, with the change: in percent where less is better."""
    first, last = line.measure.show(line.means[0].mean), line.measure.show(line.means[-1].mean)
    if not line.differences:
        return first
    percent = line.percent(len(line.differences) - 1)
    if line.measure.better > 0:
        points = " pts" if line.measure.is_share else ""
        return f"{first} → {last} ({line.measure.show_change(line.differences[-1].mean)}{points})"
    return f"{first} → {last} ({'–' if percent is None else f'{percent:+z.0f} %'})"


def _change(shown: Measure, change: Interval) -> str:
    points = " pts" if shown.is_share else ""
    if not change.is_known:
        return f"{shown.show_change(change.mean)}{points} (no interval)"
    interval = f"[{shown.show_change(change.low)}, {shown.show_change(change.high)}]"
    return f"{shown.show_change(change.mean)}{points} {interval}"


def _demo_grid(comparison: Comparison) -> Grid:
    """The hosted demo's columns: first policy → last one, beside what the demo reported."""
    rows = []
    for key, (before, after, change) in _DEMO.items():
        if (line := comparison.line(key)) is None:
            continue
        published = before if before == after else f"{before} → {after}"
        percent = line.percent(len(line.differences) - 1)
        ours = [line.measure.show(line.means[0].mean), line.measure.show(line.means[-1].mean)]
        cells = [line.measure.label, *ours, "–" if percent is None else f"{percent:+.0f} %", published, change]
        rows.append(Row(cells=cells))
    headers = ["", "baseline", "trained", "change", "published demo", "its change"]
    return Grid(id="demo", title="The published demo's columns", headers=headers, rows=rows)
