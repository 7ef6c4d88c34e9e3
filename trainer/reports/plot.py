"""Under the pictures: scales, plots and marks as SVG; colours come from the pages' style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

NUM_COLOURS = 8
WIDTH, _HEIGHT = 380, 210
_LEFT, RIGHT, _TOP, _BOTTOM = 58, 10, 10, 34


def number(value: float, *, percent: bool = False) -> str:
    """Three figures: 0.125, 4.2, 1,500, 12.5 %."""
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) > 1e-12 else "0"


# ---- scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Round values between which all others lie."""

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


def axis_of(values: Sequence[float], *, percent: bool, with_zero: bool = True) -> Axis:
    """`with_zero`: zero is in sight, so that heights can be compared."""
    zero = [0.0] if with_zero else []
    low, high = min([*zero, *values]), max([*zero, *values])
    if percent:
        # Shares that add up to a little more than 1 by rounding.
        high = min(1.0, high)
    step = nice_step((high - low) / 4 or 0.25)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(low=first * step, high=max(last, first + 1) * step, step=step, percent=percent)


def nice_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Data to pixels."""

    x_low: float
    x_high: float
    y: Axis

    def px(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - RIGHT)

    def py(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - self.y.share(value) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_unit: str, y_unit: str) -> Markup:
        """Grid lines, their values, and the names of both axes."""
        body = Markup("")
        for tick in self.y.ticks:
            y = self.py(tick)
            body += draw_rule(self.y.style(tick), _LEFT, WIDTH - RIGHT, y, y)
            body += draw_text(_LEFT - 5, y + 3.5, number(tick, percent=self.y.percent), anchor="end")
        body += draw_text(WIDTH - RIGHT, _HEIGHT - 4, x_unit, anchor="end")
        name = '<text class="tick" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>'
        return body + Markup(name).format((_HEIGHT - _BOTTOM + _TOP) / 2, y_unit)

    def whole_ticks(self) -> Markup:
        """Labels of whole numbers under the x axis."""
        stride = max(1, math.ceil(nice_step(max((self.x_high - self.x_low) / 6, 1))))
        first = math.ceil(self.x_low / stride) * stride
        ticks = range(first, math.floor(self.x_high) + 1, stride)
        return Markup("").join(self.x_label(tick, str(tick)) for tick in ticks)

    def x_label(self, value: float, text: str, *, anchor: str = "middle") -> Markup:
        return draw_text(self.px(value), _HEIGHT - _BOTTOM + 14, text, anchor=anchor)

    def bar(self, x: float, width: float, low: float, high: float, colour: int, hover: str, style: str = "") -> Markup:
        """An upright one between two values."""
        return draw_rect(x, self.py(high), width, self.py(low) - self.py(high), colour, hover, style)


# ---- marks


def draw_text(x: float, y: float, text: str, *, anchor: str = "middle") -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def draw_rule(style: str, x1: float, x2: float, y1: float, y2: float, hover: str = "") -> Markup:
    line = '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}">{}</line>'
    return Markup(line).format(style, x1, x2, y1, y2, _hover(hover))


def draw_rect(x: float, y: float, width: float, height: float, colour: int, hover: str, style: str = "") -> Markup:
    rect = '<rect class="f{}{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>'
    return Markup(rect).format(colour % NUM_COLOURS, style, x, y, width, height, _hover(hover))


def draw_dot(x: float, y: float, colour: int | None, hover: str, *, radius: float) -> Markup:
    """Without a colour: one of many behind the others."""
    style = "faint" if colour is None else f"f{colour % NUM_COLOURS}"
    dot = '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>'
    return Markup(dot).format(style, x, y, radius, _hover(hover))


def draw_path(
    points: Sequence[tuple[float, float]], colour: int | None, attributes: str = "", hover: str = ""
) -> Markup:
    """Without a colour: one of many behind the others."""
    style = "faint" if colour is None else f"s{colour % NUM_COLOURS}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = '<polyline class="{}" points="{}"{}>{}</polyline>' if hover else '<polyline class="{}" points="{}"{}/>{}'
    return Markup(line).format(style, path, Markup(attributes), _hover(hover))


def _hover(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup("")


def figure(title: str, body: Markup, names: Sequence[str], *, height: float = _HEIGHT, width: float = WIDTH) -> Markup:
    """The picture with its title and, for several series, the key to the colours; the title says what one line is.

    One that is wider than the others has a row of its own.
    """
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(width, height, title, body)
    key = Markup("").join(
        Markup('<span class="key"><i class="b{}"></i>{}</span>').format(i % NUM_COLOURS, name)
        for i, name in enumerate(names if len(names) > 1 else ())
    )
    style = Markup(' class="wide"') if width > WIDTH else ""
    return Markup("<figure{}><figcaption>{}</figcaption>{}<div>{}</div></figure>").format(style, title, svg, key)
