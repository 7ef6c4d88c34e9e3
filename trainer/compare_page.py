"""A comparison as people read it: on the terminal, as Markdown, and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.bootstrap import LEVEL, NUM_RESAMPLES, Interval
from trainer.compare import Comparison, Line, values
from trainer.measures import MEASURES, WHY_MASKED, Measure
from trainer.page import cut, message, shown, write_page
from trainer.pictures import histogram, interval_rows

METHOD = (
    f"Means over tasks, [{LEVEL:.0%} interval]: paired bootstrap over tasks, {NUM_RESAMPLES:,} resamples, percentiles. "
    "The intervals cover which tasks were asked and the chance in their rollouts, not the seed of a training."
)
LATENCY = (
    "Latency depends on hardware and load: compare it between evaluations on the same machine with as many "
    "rollouts at once."
)

_DEMO = {
    "reward": ("0.59", "0.63", "+7 %"),
    "tool_calls": ("6.9", "4.2", "−39 %"),
    "tokens": ("about 2,500", "about 1,500", "−40 %"),
    "latency_s": ("–", "–", "about −10 %"),
}
"""What the hosted service's published demo reported after ten steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table with its title, as text."""

    id: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(c: Comparison, *, demo: bool) -> list[Grid]:
    """Every table of the comparison, in the order shown."""
    names = [p.name for p in c.policies]
    headers = ["", names[0]]
    for name in names[1:]:
        headers += [name, "change", "in %"]
    out = [Grid(id="policies", title=f"{c.num_tasks} shared tasks", headers=headers, rows=[_row(x) for x in c.lines])]
    if demo:
        out.append(_demo_grid(c))
    labels = {m.key: m for m in MEASURES}
    tails = [
        [f"{labels[key].label}, {quantile}", *(labels[key].format.format(tail[quantile]) for tail in by_policy)]
        for key, by_policy in c.tails.items()
        for quantile in by_policy[0]
    ]
    out.append(Grid(id="tails", title="Tails, over single rollouts", headers=["", *names], rows=tails))
    if c.errors or c.num_masked:
        rows = [[name, *(f"{x:.3f}" for x in by_policy)] for name, by_policy in c.errors.items()]
        rows += [[f"rollouts in all that were {WHY_MASKED[kind]}", *map(str, n)] for kind, n in c.num_masked.items()]
        out.append(Grid(id="errors", title="Errors per rollout", headers=["", *names], rows=rows))
    for kind, lines in c.kinds.items():
        title = f"{c.by}: {kind} ({lines[0].means[0].num_tasks} tasks)"
        out.append(Grid(id=f"by-{kind}", title=title, headers=headers, rows=[_row(line) for line in lines]))
    return out


def render_terminal(c: Comparison, *, demo: bool) -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = [Text(f"{p.name}: {p.source}", style="dim") for p in c.policies]
    for grid in grids(c, demo=demo):
        table = Table(title=grid.title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i, name in enumerate(grid.headers):
            table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
        for row in grid.rows:
            table.add_row(*map(Text, row))
        parts += [table, Text("")]
    parts += [Text(note, style="yellow") for note in _left_out(c)]
    return Group(*parts, Text(METHOD, style="dim"), Text(LATENCY, style="dim"))


def render_markdown(c: Comparison, *, demo: bool) -> str:
    """For README and RESULTS."""
    out = []
    for grid in grids(c, demo=demo):
        out += [f"**{_escaped(grid.title)}**", "", _markdown_row(grid.headers)]
        out.append("|---|" + "---:|" * (len(grid.headers) - 1))
        out += [*map(_markdown_row, grid.rows), ""]
    return "\n".join([*out, *(f"- {_escaped(note)}" for note in [*_left_out(c), METHOD, LATENCY]), ""])


def write_compare_page(c: Comparison, path: Path, *, demo: bool) -> Path:
    """Write the page to `path` and return it."""
    return write_page(
        path,
        "compare_template.html",
        title=" → ".join(p.name for p in c.policies),
        policies=[(p.name, p.source) for p in c.policies],
        tables=grids(c, demo=demo),
        sections=[(name, [p for p in pictures if p]) for name, pictures in _sections(c)],
        notes=[*_left_out(c), METHOD, LATENCY],
        pairs=[
            {
                "task_id": pair.task_id,
                "change": f"{pair.difference:+.3f} mean reward",
                "question": cut(pair.rollouts[0].task.messages[-1].content, 600),
                "prompt": [message(m) for m in pair.rollouts[0].task.messages],
                "sides": [shown(p.name, r) for p, r in zip(c.policies, pair.rollouts, strict=True)],
            }
            for pair in c.pairs
        ],
    )


def _sections(c: Comparison) -> list[tuple[str, list[Markup]]]:
    names = [p.name for p in c.policies]

    def laid_over(key: str) -> dict[str, list[float]]:
        measured = {p.name: values(p.rollouts, key) for p in c.policies}
        # A model that does not reason has nothing to show there.
        return measured if any(map(any, measured.values())) else {}

    by = f" by {c.by}" if c.kinds else ""
    rewards = [("all", _line(c.lines, "reward").means)]
    rewards += [(kind, _line(lines, "reward").means) for kind, lines in c.kinds.items()]
    changes = [
        (f"all, {name}", [change]) for name, change in zip(names[1:], _line(c.lines, "reward").differences, strict=True)
    ]
    calls = [("all", _line(c.lines, "tool_calls").means)]
    calls += [(kind, _line(lines, "tool_calls").means) for kind, lines in c.kinds.items()]
    return [
        (
            "Reward and calls",
            [
                interval_rows(f"Reward{by}", rewards, names, unit="mean reward"),
                interval_rows(f"Change in reward from {names[0]}", changes, ["change"], unit="reward"),
                interval_rows(f"Tool calls{by}", calls, names, unit="calls a rollout"),
            ],
        ),
        (
            "Distributions",
            [
                histogram("Tool calls", laid_over("tool_calls"), unit="calls in a rollout"),
                histogram("Generated tokens", laid_over("tokens"), unit="tokens of a rollout"),
                histogram("Reasoning tokens", laid_over("reasoning_tokens"), unit="tokens of a rollout"),
                histogram("Reward", laid_over("reward"), unit="reward", whole=False),
                histogram("Latency", laid_over("latency_s"), unit="seconds", whole=False),
            ],
        ),
    ]


def _line(lines: Sequence[Line], key: str) -> Line:
    return next(line for line in lines if line.measure.key == key)


def _row(line: Line) -> list[str]:
    """Label, the baseline, then each policy with its change and the change in percent."""
    measure = line.measure
    cells = [measure.label, measure.format.format(line.means[0].mean)]
    for i, mean in enumerate(line.means[1:]):
        percent = line.percent(i)
        cells += [measure.format.format(mean.mean), _change(measure, line.differences[i])]
        cells += ["–" if percent is None else f"{percent:+.0f} %"]
    return cells


def _change(measure: Measure, change: Interval) -> str:
    if "%" in measure.format:
        return f"{100 * change.mean:+z.1f} pts [{100 * change.low:+z.1f}, {100 * change.high:+z.1f}]"
    signed = measure.format.replace("{:", "{:+z")
    return f"{signed.format(change.mean)} [{signed.format(change.low)}, {signed.format(change.high)}]"


def _demo_grid(c: Comparison) -> Grid:
    """The hosted demo's columns: first policy → last one, beside what the demo reported."""
    rows = []
    for key, (before, after, change) in _DEMO.items():
        line = _line(c.lines, key)
        published = before if before == after else f"{before} → {after}"
        shape, percent = line.measure.format, line.percent(len(line.differences) - 1)
        ours = [shape.format(line.means[0].mean), shape.format(line.means[-1].mean)]
        rows.append([line.measure.label, *ours, "–" if percent is None else f"{percent:+.0f} %", published, change])
    headers = ["", "baseline", "trained", "change", "published demo", "its change"]
    return Grid(id="demo", title="The published demo's columns", headers=headers, rows=rows)


def _left_out(c: Comparison) -> list[str]:
    """What the figures do not rest on: files that could not be read, tasks that not all policies have."""
    told = [f"{p.name}: {note}" for p in c.policies for note in p.notes]
    if c.num_left_out:
        told.append(f"{c.num_left_out} tasks without a graded rollout of every policy are left out.")
    return told


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;").replace("  ", "&nbsp;&nbsp;")
