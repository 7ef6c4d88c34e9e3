"""Charts as inline SVG with a title, axis units and values on hover; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Points = Sequence[tuple[int, float]]
"""(step, value), in the order of the steps."""

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 34
_MAX_MARKS = 120
"""More points than this are drawn as a line with some of its marks left out."""
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line, or one layer of a stack."""

    name: str
    points: Points
    marks_only: bool = False
    """Large marks on a dashed line: for evaluations, which are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Data to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> float:
        span = self.x_high - self.x_low
        return _LEFT + (step - self.x_low) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(title: str, series: Sequence[Series], *, unit: str, percent: bool = False) -> Markup:
    """One line a series over the steps. Empty where there is nothing to draw. `percent`: values are shares of 1."""
    shown = [s for s in series if s.points]
    if not shown:
        return Markup("")
    values = [y for s in shown for _, y in s.points]
    scale, ticks = _axes([x for s in shown for x, _ in s.points], min(0.0, *values), max(0.0, *values), percent=percent)
    body = _frame(scale, ticks, unit, percent=percent)
    for colour, s in enumerate(shown):
        body += _line(s, colour % NUM_COLOURS, scale, percent=percent)
    return _figure(title, body, [s.name for s in shown])


def stacked_chart(title: str, series: Sequence[Series], *, unit: str, percent: bool = False) -> Markup:
    """One bar a step, its parts on top of each other. Values must not be negative."""
    shown = [s for s in series if any(y > 0 for _, y in s.points)]
    if not shown:
        return Markup("")
    steps = sorted({x for s in shown for x, _ in s.points})
    tables = [dict(s.points) for s in shown]
    top = max(sum(t.get(step, 0.0) for t in tables) for step in steps)
    scale, ticks = _axes([steps[0] - 0.5, steps[-1] + 0.5], 0.0, top, percent=percent)
    body = _frame(scale, ticks, unit, percent=percent)
    width = max(0.5, 0.8 * (scale.x(1) - scale.x(0)))
    for step in steps:
        base = 0.0
        for colour, (s, table) in enumerate(zip(shown, tables, strict=True)):
            value = table.get(step, 0.0)
            if value <= 0:
                continue
            y, height = scale.y(base + value), scale.y(base) - scale.y(base + value)
            hover = Markup("<title>{}: {}, step {}</title>").format(s.name, _number(value, percent=percent), step)
            body += Markup('<rect class="f{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>').format(
                colour % NUM_COLOURS, scale.x(step) - width / 2, y, width, height, hover
            )
            base += value
    return _figure(title, body, [s.name for s in shown])


def _line(series: Series, colour: int, scale: _Scale, *, percent: bool) -> Markup:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in series.points)
    dashes = Markup(' stroke-dasharray="2 3"') if series.marks_only else Markup("")
    body = Markup('<polyline class="s{}" points="{}"{}/>').format(colour, path, dashes)
    stride = math.ceil(len(series.points) / _MAX_MARKS)
    for x, y in series.points[::stride]:
        hover = Markup("<title>{}: {}, step {}</title>").format(series.name, _number(y, percent=percent), x)
        body += Markup('<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>').format(
            colour, scale.x(x), scale.y(y), 4 if series.marks_only else 2.2, hover
        )
    return body


def _axes(xs: Sequence[float], low: float, high: float, *, percent: bool) -> tuple[_Scale, list[float]]:
    """The scale and the values of the horizontal grid lines. Zero is always in sight: heights can be compared."""
    if percent:
        high = min(1.0, high)
    step = _nice((high - low) / 4 or 0.25)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    scale = _Scale(x_low=x_low, x_high=x_high, y_low=first * step, y_high=last * step)
    return scale, [i * step for i in range(first, last + 1)]


def _nice(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def _frame(scale: _Scale, ticks: Sequence[float], unit: str, *, percent: bool) -> Markup:
    """Grid lines, their values, the steps, and the names of both axes."""
    body = Markup("")
    for tick in ticks:
        y = scale.y(tick)
        line = Markup('<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        body += line.format("zero" if abs(tick) < 1e-12 else "grid", _LEFT, _WIDTH - _RIGHT, y, y)
        label = Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>')
        body += label.format(_LEFT - 5, y + 3.5, _number(tick, percent=percent))
    for step in _step_ticks(scale):
        label = Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        body += label.format(scale.x(step), _HEIGHT - _BOTTOM + 14, step)
    body += Markup('<text class="tick" x="{}" y="{}" text-anchor="end">step</text>').format(
        _WIDTH - _RIGHT, _HEIGHT - 4
    )
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    axis = Markup('<text class="tick" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>')
    return body + axis.format(middle, unit)


def _step_ticks(scale: _Scale) -> list[int]:
    stride = max(1, math.ceil(_nice(max((scale.x_high - scale.x_low) / 6, 1))))
    first = math.ceil(scale.x_low / stride) * stride
    return list(range(first, math.floor(scale.x_high) + 1, stride))


def _number(value: float, *, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) > 1e-12 else "0"


def _figure(title: str, body: Markup, names: Sequence[str]) -> Markup:
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(_WIDTH, _HEIGHT, title, body)
    key = Markup("").join(
        Markup('<span class="key"><i class="b{}"></i>{}</span>').format(i % NUM_COLOURS, name)
        # The title says what a single line is.
        for i, name in enumerate(names if len(names) > 1 else ())
    )
    return Markup("<figure><figcaption>{}</figcaption>{}<div>{}</div></figure>").format(escape(title), svg, key)
