"""Pictures as inline SVG with a title, axis units and values on hover; colours come from the pages' style sheet.

Each takes its values and gives a `<figure>`, or nothing where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.measures.intervals import Interval

Points = Sequence[tuple[int, float]]
"""(step or k, value), in their order."""

NUM_COLOURS = 8
_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 34
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


def line_chart(
    title: str, series: Sequence[Series], *, unit: str, percent: bool = False, x_unit: str = "step"
) -> Markup:
    """One line a series over the steps or another whole number. `percent`: values are shares of 1."""
    shown = [s for s in series if s.points]
    if not shown:
        return Markup("")
    xs, ys = [x for s in shown for x, _ in s.points], [y for s in shown for _, y in s.points]
    margin = 0.5 if min(xs) == max(xs) else 0.0
    plot = _Plot(x_low=min(xs) - margin, x_high=max(xs) + margin, y=_axis(ys, percent=percent))
    body = plot.frame(x_unit, unit) + plot.whole_ticks()
    for colour, s in enumerate(shown):
        dashes = Markup(' stroke-dasharray="2 3"') if s.marks_only else ""
        body += _path([(plot.px(x), plot.py(y)) for x, y in s.points], colour, dashes)
        for x, y in s.points[:: math.ceil(len(s.points) / _MAX_MARKS)]:
            hover = f"{s.name}: {number(y, percent=percent)}, {x_unit} {x}"
            body += _dot(plot.px(x), plot.py(y), colour, hover, radius=4 if s.marks_only else 2.2)
    return _figure(title, body, [s.name for s in shown])


def stacked_chart(title: str, series: Sequence[Series], *, unit: str, percent: bool = False) -> Markup:
    """One bar a step, its parts on top of each other. Values must not be negative."""
    shown = [s for s in series if any(y > 0 for _, y in s.points)]
    if not shown:
        return Markup("")
    steps = sorted({x for s in shown for x, _ in s.points})
    layers = [dict(s.points) for s in shown]
    tops = [math.fsum(layer.get(step, 0.0) for layer in layers) for step in steps]
    plot = _Plot(x_low=steps[0] - 0.5, x_high=steps[-1] + 0.5, y=_axis(tops, percent=percent))
    body = plot.frame("step", unit) + plot.whole_ticks()
    width = max(0.5, 0.8 * (plot.px(1) - plot.px(0)))
    for step in steps:
        base = 0.0
        for colour, (s, layer) in enumerate(zip(shown, layers, strict=True)):
            if (value := layer.get(step, 0.0)) > 0:
                hover = f"{s.name}: {number(value, percent=percent)}, step {step}"
                body += plot.bar(plot.px(step) - width / 2, width, base, base + value, colour, hover)
                base += value
    return _figure(title, body, [s.name for s in shown])


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
    plot = _Plot(x_low=0.0, x_high=float(bins.num), y=_axis(tops, percent=True))
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
        body += _path(corners, colour)
    return _figure(title, body, list(shown))


def bars(title: str, rows: Sequence[tuple[str, float]], *, show: Callable[[float], str]) -> Markup:
    """A horizontal bar for each label, with its value beside it. Values must not be negative."""
    if not rows:
        return Markup("")
    top = max(value for _, value in rows) or 1.0
    body = Markup("")
    for i, (label, value) in enumerate(rows):
        y, width = 6 + i * _ROW, (_WIDTH - _ROW_LEFT - 56) * value / top
        body += _row_label(y, label) + _rect(_ROW_LEFT, y, width, 13, 0, f"{label}: {show(value)}")
        body += _text(_ROW_LEFT + width + 5, y + 11, show(value), anchor="start")
    return _figure(title, body, [], height=12 + _ROW * len(rows))


def interval_rows(
    title: str, rows: Sequence[tuple[str, Sequence[Interval]]], names: Sequence[str], *, unit: str
) -> Markup:
    """For each label the mean and interval of every name, as a dot on a bar."""
    if not rows:
        return Markup("")
    axis = _axis([end for _, marks in rows for m in marks for end in (m.low, m.high, m.mean)], percent=False)
    height = _ROW * max(1, len(names)) // 2 + 12
    bottom = 6 + len(rows) * height

    def px(value: float) -> float:
        return _ROW_LEFT + axis.share(value) * (_WIDTH - _ROW_LEFT - _RIGHT)

    body = Markup("")
    for tick in axis.ticks:
        body += _rule(axis.style(tick), px(tick), px(tick), 4, bottom) + _text(px(tick), bottom + 14, number(tick))
    for i, (label, marks) in enumerate(rows):
        y = 6 + i * height
        body += _row_label(y + height / 2 - 12, label)
        for colour, mark in enumerate(marks):
            at = y + (colour + 1) * height / (len(marks) + 1)
            interval = f"{number(mark.low)} to {number(mark.high)}" if mark.is_known else "no interval"
            hover = f"{names[colour]}, {label}: {number(mark.mean)} ({interval})"
            body += _rule(f"s{colour % NUM_COLOURS} whisker", px(mark.low), px(mark.high), at, at, hover)
            body += _dot(px(mark.mean), at, colour, hover, radius=4)
    body += _text(_WIDTH - _RIGHT, bottom + 28, unit, anchor="end")
    return _figure(title, body, names, height=bottom + 34)


def number(value: float, *, percent: bool = False) -> str:
    """Three figures: 0.125, 4.2, 1,500, 12.5 %."""
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) > 1e-12 else "0"


# ---- scales


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
    width = _nice_step((high - low) / _MAX_BINS or 1.0)
    if whole:
        width = max(1.0, math.ceil(width))
    start = math.floor(low / width) * width
    return Bins(start=start, width=width, num=int((high - start) / width + 1e-9) + 1, whole=whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """Round values between which all others lie. Zero is always in sight: heights can be compared."""

    low: float
    high: float
    step: float
    percent: bool

    @property
    def ticks(self) -> list[float]:
        return [self.low + k * self.step for k in range(round((self.high - self.low) / self.step) + 1)]

    def style(self, tick: float) -> str:
        return "zero" if abs(tick) < self.step * 1e-9 else "grid"

    def share(self, value: float) -> float:
        """How far along the axis it lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def _axis(values: Sequence[float], *, percent: bool) -> _Axis:
    low, high = min(0.0, *values), max(0.0, *values)
    if percent:
        # Shares that add up to a little more than 1 by rounding.
        high = min(1.0, high)
    step = _nice_step((high - low) / 4 or 0.25)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return _Axis(low=first * step, high=max(last, first + 1) * step, step=step, percent=percent)


def _nice_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    """Data to pixels."""

    x_low: float
    x_high: float
    y: _Axis

    def px(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - self.y.share(value) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_unit: str, y_unit: str) -> Markup:
        """Grid lines, their values, and the names of both axes."""
        body = Markup("")
        for tick in self.y.ticks:
            y = self.py(tick)
            body += _rule(self.y.style(tick), _LEFT, _WIDTH - _RIGHT, y, y)
            body += _text(_LEFT - 5, y + 3.5, number(tick, percent=self.y.percent), anchor="end")
        body += _text(_WIDTH - _RIGHT, _HEIGHT - 4, x_unit, anchor="end")
        name = '<text class="tick" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>'
        return body + Markup(name).format((_HEIGHT - _BOTTOM + _TOP) / 2, y_unit)

    def whole_ticks(self) -> Markup:
        """Labels of whole numbers under the x axis."""
        stride = max(1, math.ceil(_nice_step(max((self.x_high - self.x_low) / 6, 1))))
        first = math.ceil(self.x_low / stride) * stride
        ticks = range(first, math.floor(self.x_high) + 1, stride)
        return Markup("").join(self.x_label(tick, str(tick)) for tick in ticks)

    def x_label(self, value: float, text: str) -> Markup:
        return _text(self.px(value), _HEIGHT - _BOTTOM + 14, text)

    def bar(self, x: float, width: float, low: float, high: float, colour: int, hover: str, style: str = "") -> Markup:
        """An upright one between two values."""
        return _rect(x, self.py(high), width, self.py(low) - self.py(high), colour, hover, style)


# ---- marks


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _rule(style: str, x1: float, x2: float, y1: float, y2: float, hover: str = "") -> Markup:
    line = '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}">{}</line>'
    return Markup(line).format(style, x1, x2, y1, y2, _hover(hover))


def _rect(x: float, y: float, width: float, height: float, colour: int, hover: str, style: str = "") -> Markup:
    rect = '<rect class="f{}{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>'
    return Markup(rect).format(colour % NUM_COLOURS, style, x, y, width, height, _hover(hover))


def _dot(x: float, y: float, colour: int, hover: str, *, radius: float) -> Markup:
    dot = '<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>'
    return Markup(dot).format(colour % NUM_COLOURS, x, y, radius, _hover(hover))


def _path(points: Sequence[tuple[float, float]], colour: int, attributes: str = "") -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="s{}" points="{}"{}/>').format(colour % NUM_COLOURS, path, attributes)


def _hover(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup("")


def _row_label(y: float, label: str) -> Markup:
    shown = label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…"
    text = '<text class="tick" x="{}" y="{:.1f}" text-anchor="end"><title>{}</title>{}</text>'
    return Markup(text).format(_ROW_LEFT - 6, y + 11, label, shown)


def _figure(title: str, body: Markup, names: Sequence[str], *, height: float = _HEIGHT) -> Markup:
    """The picture with its title and, for several series, the key to the colours; the title says what one line is."""
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(_WIDTH, height, title, body)
    key = Markup("").join(
        Markup('<span class="key"><i class="b{}"></i>{}</span>').format(i % NUM_COLOURS, name)
        for i, name in enumerate(names if len(names) > 1 else ())
    )
    return Markup("<figure><figcaption>{}</figcaption>{}<div>{}</div></figure>").format(title, svg, key)
