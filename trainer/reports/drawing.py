"""Pictures as inline SVG with a title, axis units and values on hover; colours come from the pages' style sheet.

Each takes its values and gives a `<figure>`, or nothing where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.measures.intervals import Interval
from trainer.reports.plot import (
    NUM_COLOURS,
    RIGHT,
    WIDTH,
    Plot,
    axis_of,
    draw_dot,
    draw_path,
    draw_rect,
    draw_rule,
    draw_text,
    figure,
    nice_step,
    number,
)

Points = Sequence[tuple[int, float]]
"""(step or k, value), in their order."""

_ROW, _ROW_LEFT = 22, 150
_LABEL_CHARS = 21
_MAX_BINS = 24
_MAX_MARKS = 120
"""More points than this are drawn as a line with some of its marks left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line, or one layer of a stack."""

    name: str
    points: Points
    marks_only: bool = False
    """Large marks on a dashed line: for evaluations, which are few."""
    faint: bool = False
    """A grey line behind the others, in no key: one of many."""


def line_chart(
    title: str, series: Sequence[Series], *, unit: str, percent: bool = False, x_unit: str = "step"
) -> Markup:
    """One line a series over the steps or another whole number. `percent`: values are shares of 1."""
    shown = [s for s in series if s.points]
    if not shown:
        return Markup("")
    xs, ys = [x for s in shown for x, _ in s.points], [y for s in shown for _, y in s.points]
    margin = 0.5 if min(xs) == max(xs) else 0.0
    plot = Plot(x_low=min(xs) - margin, x_high=max(xs) + margin, y=axis_of(ys, percent=percent))
    body = plot.frame(x_unit, unit) + plot.whole_ticks()
    coloured = [s for s in shown if not s.faint]
    behind: list[tuple[int | None, Series]] = [(None, s) for s in shown if s.faint]
    for colour, s in [*behind, *enumerate(coloured)]:
        dashes = Markup(' stroke-dasharray="2 3"') if s.marks_only else ""
        body += draw_path([(plot.px(x), plot.py(y)) for x, y in s.points], colour, dashes)
        for x, y in s.points[:: math.ceil(len(s.points) / _MAX_MARKS)]:
            hover = f"{s.name}: {number(y, percent=percent)}, {x_unit} {x}"
            body += draw_dot(plot.px(x), plot.py(y), colour, hover, radius=4 if s.marks_only else 2.2)
    return figure(title, body, [s.name for s in coloured])


def stacked_chart(title: str, series: Sequence[Series], *, unit: str, percent: bool = False) -> Markup:
    """One bar a step, its parts on top of each other. Values must not be negative."""
    shown = [s for s in series if any(y > 0 for _, y in s.points)]
    if not shown:
        return Markup("")
    steps = sorted({x for s in shown for x, _ in s.points})
    layers = [dict(s.points) for s in shown]
    tops = [math.fsum(layer.get(step, 0.0) for layer in layers) for step in steps]
    plot = Plot(x_low=steps[0] - 0.5, x_high=steps[-1] + 0.5, y=axis_of(tops, percent=percent))
    body = plot.frame("step", unit) + plot.whole_ticks()
    width = max(0.5, 0.8 * (plot.px(1) - plot.px(0)))
    for step in steps:
        base = 0.0
        for colour, (s, layer) in enumerate(zip(shown, layers, strict=True)):
            if (value := layer.get(step, 0.0)) > 0:
                hover = f"{s.name}: {number(value, percent=percent)}, step {step}"
                body += plot.bar(plot.px(step) - width / 2, width, base, base + value, colour, hover)
                base += value
    return figure(title, body, [s.name for s in shown])


def histogram(
    title: str, series: Mapping[str, Sequence[float]], *, unit: str, whole: bool = True, of: str = "rollouts"
) -> Markup:
    """The values of each name as shares of all it has, laid over each other. `of`: what was counted."""
    shown = {name: values for name, values in series.items() if values}
    if not shown:
        return Markup("")
    bins = bins_of([v for values in shown.values() for v in values], whole=whole)
    shares = {name: bins.shares(values) for name, values in shown.items()}
    tops = [share for heights in shares.values() for share in heights]
    plot = Plot(x_low=0.0, x_high=float(bins.num), y=axis_of(tops, percent=True))
    body = plot.frame(unit, f"share of {of}")
    for i in range(0, bins.num, max(1, math.ceil(bins.num / 7))):
        # A count stands under the middle of its bar, a range's lower end under the bar's left side.
        body += plot.x_label(i + (0.5 if bins.single else 0.0), number(bins.start + i * bins.width))
    for colour, (name, heights) in enumerate(shares.items()):
        for i, share in enumerate(heights):
            hover = f"{name}: {bins.label(i)}: {number(share, percent=True)}"
            width = plot.px(1) - plot.px(0) - 1
            body += plot.bar(plot.px(i) + 0.5, width, 0.0, share, colour, hover, style=" veil")
        corners = [(plot.px(i + side), plot.py(share)) for i, share in enumerate(heights) for side in (0, 1)]
        body += draw_path(corners, colour)
    return figure(title, body, list(shown))


def bars(title: str, rows: Sequence[tuple[str, float]], *, show: Callable[[float], str]) -> Markup:
    """A horizontal bar for each label, with its value beside it. Values must not be negative."""
    if not rows:
        return Markup("")
    top = max(value for _, value in rows) or 1.0
    body = Markup("")
    for i, (label, value) in enumerate(rows):
        y, width = 6 + i * _ROW, (WIDTH - _ROW_LEFT - 56) * value / top
        body += _row_label(y, label) + draw_rect(_ROW_LEFT, y, width, 13, 0, f"{label}: {show(value)}")
        body += draw_text(_ROW_LEFT + width + 5, y + 11, show(value), anchor="start")
    return figure(title, body, [], height=12 + _ROW * len(rows))


def interval_rows(
    title: str, rows: Sequence[tuple[str, Sequence[Interval]]], names: Sequence[str], *, unit: str
) -> Markup:
    """For each label the mean and interval of every name, as a dot on a bar."""
    if not rows:
        return Markup("")
    axis = axis_of([end for _, marks in rows for m in marks for end in (m.low, m.high, m.mean)], percent=False)
    height = _ROW * max(1, len(names)) // 2 + 12
    bottom = 6 + len(rows) * height

    def px(value: float) -> float:
        return _ROW_LEFT + axis.share(value) * (WIDTH - _ROW_LEFT - RIGHT)

    body = Markup("")
    for tick in axis.ticks:
        body += draw_rule(axis.style(tick), px(tick), px(tick), 4, bottom)
        body += draw_text(px(tick), bottom + 14, number(tick))
    for i, (label, marks) in enumerate(rows):
        y = 6 + i * height
        body += _row_label(y + height / 2 - 12, label)
        for colour, mark in enumerate(marks):
            at = y + (colour + 1) * height / (len(marks) + 1)
            interval = f"{number(mark.low)} to {number(mark.high)}" if mark.is_known else "no interval"
            hover = f"{names[colour]}, {label}: {number(mark.mean)} ({interval})"
            body += draw_rule(f"s{colour % NUM_COLOURS} whisker", px(mark.low), px(mark.high), at, at, hover)
            body += draw_dot(px(mark.mean), at, colour, hover, radius=4)
    body += draw_text(WIDTH - RIGHT, bottom + 28, unit, anchor="end")
    return figure(title, body, names, height=bottom + 34)


def _row_label(y: float, label: str) -> Markup:
    shown = label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…"
    text = '<text class="tick" x="{}" y="{:.1f}" text-anchor="end"><title>{}</title>{}</text>'
    return Markup(text).format(_ROW_LEFT - 6, y + 11, label, shown)


# ---- bins


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Edges of a histogram: bin i holds the values from edge i up to edge i + 1."""

    start: float
    width: float
    num: int
    whole: bool
    """The values are counts."""

    @property
    def single(self) -> bool:
        """Each bin holds one count only."""
        return self.whole and self.width == 1

    def shares(self, values: Sequence[float]) -> list[float]:
        """Each bin's share of the values."""
        counts = [0] * self.num
        for value in values:
            counts[min(self.num - 1, int((value - self.start) / self.width + 1e-9))] += 1
        return [count / max(1, len(values)) for count in counts]

    def label(self, i: int) -> str:
        """Its count, or the range that it holds."""
        low, high = self.start + i * self.width, self.start + (i + 1) * self.width
        return number(low) if self.single else f"{number(low)} to {number(high)}"


def bins_of(values: Sequence[float], *, whole: bool) -> Bins:
    """At most some two dozen bins of a round width; `whole`: the values are counts, a bin never splits one."""
    low, high = min(values), max(values)
    width = nice_step((high - low) / _MAX_BINS or 1.0)
    if whole:
        width = max(1.0, math.ceil(width))
    start = math.floor(low / width) * width
    return Bins(start=start, width=width, num=int((high - start) / width + 1e-9) + 1, whole=whole)
