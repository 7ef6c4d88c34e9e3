"""The before/after table of a run: the first evaluation against the last one. Pure, but for the reading in `report`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.table import Table
from rich.text import Text

from trainer.run_data import RunData, Sample

_METRICS = (
    ("reward", "mean reward", "{:.3f}", +1),
    ("correct", "correct", "{:.1%}", +1),
    ("answered", "ended with an answer", "{:.1%}", +1),
    ("tool_calls", "tool calls per rollout", "{:.2f}", -1),
    ("invalid_calls", "invalid calls per rollout", "{:.2f}", -1),
    ("completion_tokens", "tokens per rollout", "{:,.1f}", -1),
    ("reasoning_tokens", "  of which reasoning", "{:,.1f}", -1),
    ("answer_tokens", "  of which calls and answer", "{:,.1f}", -1),
    ("episode_latency_s", "latency per episode, s", "{:.2f}", -1),
)
"""Key, label, format, and which direction is the better one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    key: str
    label: str
    format: str
    better: int
    """+1: higher is better; -1: lower is better."""
    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def percent(self) -> float | None:
        """Change relative to before, in percent; None where that was not above 0."""
        if self.difference is None or self.before is None or self.before <= 0:
            return None
        return 100 * self.difference / self.before

    @property
    def verdict(self) -> str:
        """`better`, `worse` or nothing."""
        change = (self.difference or 0.0) * self.better
        return "" if abs(change) < 1e-9 else "better" if change > 0 else "worse"

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Label, before, after, difference, difference in percent: as text."""
        share = "%" in self.format
        difference = self.difference
        if difference is None:
            shown = "–"
        else:
            shown = f"{100 * difference:+z.1f} pts" if share else self.format.replace("{:", "{:+z").format(difference)
        percent = "–" if self.percent is None else f"{self.percent:+z.0f} %"
        return self.label, self._text(self.before), self._text(self.after), shown, percent

    def _text(self, value: float | None) -> str:
        return "–" if value is None else self.format.format(value)


def rows_of(data: RunData) -> list[Row]:
    """The table's rows: of every metric that the first or the last evaluation has."""
    evals = data.eval_steps
    before = data.steps[evals[0]] if evals else {}
    after = data.steps[evals[-1]] if len(evals) > 1 else {}
    return [
        Row(
            key=key,
            label=label,
            format=text_format,
            better=better,
            before=_finite(before.get(f"eval/{key}")),
            after=_finite(after.get(f"eval/{key}")),
        )
        for key, label, text_format, better in _METRICS
        if f"eval/{key}" in before or f"eval/{key}" in after
    ]


def paired_difference(before: Sequence[Sample], after: Sequence[Sample]) -> tuple[float, float, int] | None:
    """(mean, standard error, n) over the n tasks of both evaluations of the change in a task's mean reward.

    None for fewer than two tasks. The error covers which tasks were asked, not the seed of the training.
    """
    old, new = mean_rewards(before), mean_rewards(after)
    changes = [new[t] - old[t] for t in old if t in new]
    if len(changes) < 2:
        return None
    return fmean(changes), stdev(changes) / math.sqrt(len(changes)), len(changes)


def mean_rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean reward by task."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        rewards[sample.task_id].append(sample.reward)
    return {task_id: fmean(values) for task_id, values in rewards.items()}


def headers(data: RunData) -> tuple[str, str, str, str, str]:
    """Column names; a run without an evaluation at step 0 does not claim to show "before"."""
    evals = data.eval_steps
    first = f"after {evals[0]} steps" if evals and evals[0] else "before"
    last = f"after {evals[-1]} steps" if len(evals) > 1 else "after"
    return "held-out tasks", first, last, "change", "in %"


def render_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """For the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    colours = {"better": "green", "worse": "red", "": ""}
    for row in rows:
        colour = colours[row.verdict]
        texts = [Text(cell, style=colour if i > 2 else "") for i, cell in enumerate(row.cells)]
        table.add_row(*texts)
    return table


def render_markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    """For README and RESULTS."""
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    for row in rows:
        label, *numbers = row.cells
        lines.append(f"| {label.replace('  ', '&nbsp;&nbsp;')} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
