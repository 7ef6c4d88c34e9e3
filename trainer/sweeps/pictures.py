"""The pictures that only a sweep has: parallel coordinates, and one figure against another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from trainer.reports.plot import Plot, axis_of, draw_dot, draw_path, draw_rule, draw_text, figure, number
from trainer.sweeps.config import Axis, ChoicesConfig, LogRangeConfig
from trainer.sweeps.space import Point, shown

_WIDTH, _HEIGHT = 1060, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 70, 34, 18
_CHAR_PX = 6.2
_MOST_TICKS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A trial in parallel coordinates."""

    name: str
    point: Point
    value: float
    is_over: bool = True
    """False of one that was cut short: dashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A trial in a plane: the values of its runs in either direction."""

    label: str
    hover: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int | None = None


def parallel_coordinates(
    title: str,
    space: Mapping[str, Axis],
    names: Mapping[str, str],
    lines: Sequence[Line],
    *,
    unit: str,
    percent: bool,
    best: str,
) -> Markup:
    """A line a trial, the worst first, across an axis for each key and one for the objective; `best` names the one that
    stands out."""
    if not lines:
        return Markup("")
    values = axis_of([line.value for line in lines], percent=percent, with_zero=False)
    stride = (_WIDTH - _LEFT - _RIGHT) / len(space)
    low, high = _HEIGHT - _BOTTOM, _TOP
    body, drawn = Markup(""), Markup("")
    places: dict[str, Callable[[object], float]] = {}
    for i, (key, axis) in enumerate(space.items()):
        places[key] = _place(axis)
        ticks = [(low + places[key](value) * (high - low), shown(value)) for value in _ticks(axis)]
        body += _upright(_LEFT + i * stride, names[key], ticks, room_px=stride)
    ticks = [(low + values.share(t) * (high - low), number(t, percent=percent)) for t in values.ticks]
    body += _upright(_WIDTH - _RIGHT, unit, ticks, room_px=stride, is_last=True)
    for rank, line in enumerate(lines):
        shares = [*(places[key](line.point[key]) for key in space), values.share(line.value)]
        path = [(_LEFT + i * stride, low + share * (high - low)) for i, share in enumerate(shares)]
        settings = ", ".join(f"{names[key]} {shown(line.point[key])}" for key in space)
        hover = f"{line.name}: {number(line.value, percent=percent)}; {settings}"
        shade = 18 + 72 * rank // max(1, len(lines) - 1)
        stands_out = line.name == best
        look = "" if stands_out else f' style="stroke: color-mix(in srgb, var(--c0) {shade}%, var(--page))"'
        dashes = "" if line.is_over else ' stroke-dasharray="5 4"'
        drawn += draw_path(path, 1 if stands_out else 0, look + dashes, hover)
    # Its values are read over the lines.
    return figure(title, drawn + body, [], height=_HEIGHT, width=_WIDTH)


def scatter(
    title: str, dots: Sequence[Dot], *, x_unit: str, y_unit: str, x_percent: bool = False, y_percent: bool = False
) -> Markup:
    """A labelled dot a trial at its means, with bars from the least to the most of its runs."""
    shown_dots = [dot for dot in dots if dot.xs and dot.ys]
    if not shown_dots:
        return Markup("")
    x = axis_of([v for dot in shown_dots for v in dot.xs], percent=x_percent, with_zero=False)
    y = axis_of([v for dot in shown_dots for v in dot.ys], percent=y_percent, with_zero=False)
    plot = Plot(x_low=x.low, x_high=x.high, y=y)
    body = plot.frame(x_unit, y_unit)
    for tick in x.ticks[:-1]:
        body += plot.x_label(tick, number(tick, percent=x_percent))
    # The last one ends where the picture does.
    last = x.ticks[-1]
    body += plot.x_label(last, number(last, percent=x_percent), anchor="end")
    labels: dict[tuple[int, int], list[str]] = {}
    for dot in sorted(shown_dots, key=lambda dot: dot.colour is not None):
        px, py = plot.px(fmean(dot.xs)), plot.py(fmean(dot.ys))
        style = "faint" if dot.colour is None else f"s{dot.colour}"
        if len(dot.xs) > 1:
            body += draw_rule(style, plot.px(min(dot.xs)), plot.px(max(dot.xs)), py, py)
        if len(dot.ys) > 1:
            body += draw_rule(style, px, px, plot.py(min(dot.ys)), plot.py(max(dot.ys)))
        body += draw_dot(px, py, dot.colour, dot.hover, radius=4)
        # Above its bars, where it has any.
        labels.setdefault((round(px), round(py) - 9 * (len(dot.xs) > 1)), []).append(dot.label)
    for (px_, py_), together in labels.items():
        # Inside the picture, whichever side the dot lies on; those of one place side by side.
        is_right = px_ > plot.px(x.low + 0.85 * (x.high - x.low))
        label = ", ".join(sorted(filter(None, together), key=_numbers_first))
        at_x, at_y, anchor = (px_ + 5, py_ + 16, "end") if is_right else (px_ + 8, py_ + 3.5, "start")
        body += draw_text(at_x, at_y, label, anchor=anchor)
    return figure(title, body, [])


def _numbers_first(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdigit() else (0, label)


def _upright(
    x: float, name: str, ticks: Sequence[tuple[float, str]], *, room_px: float, is_last: bool = False
) -> Markup:
    """An axis with its name above and its values beside it."""
    body = draw_rule("zero", x, x, _TOP, _HEIGHT - _BOTTOM)
    body += draw_text(x, _TOP - 14, _cut(name, room_px))
    for y, text in ticks:
        side, anchor = (7, "start") if is_last else (-7, "end")
        body += draw_rule("zero", x - 3, x + 3, y, y) + draw_text(
            x + side, y + 3.5, _cut(text, min(room_px - 20, _LEFT - 8)), anchor=anchor
        )
    return body


def _cut(text: str, room_px: float) -> str:
    most = max(4, int(room_px / _CHAR_PX))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _ticks(axis: Axis) -> Sequence[object]:
    if isinstance(axis, ChoicesConfig):
        return axis.values if len(axis.values) <= _MOST_TICKS else [axis.values[0], axis.values[-1]]
    whole = isinstance(axis.low, int) and isinstance(axis.high, int)
    if whole and axis.high - axis.low < _MOST_TICKS and not isinstance(axis, LogRangeConfig):
        return range(int(axis.low), int(axis.high) + 1)
    if isinstance(axis, LogRangeConfig):
        inner = [axis.low * (axis.high / axis.low) ** (i / 4) for i in range(5)]
    else:
        inner = [axis.low + (axis.high - axis.low) * i / 4 for i in range(5)]
    return list(dict.fromkeys(round(value) if whole else float(f"{value:.2g}") for value in inner))


def _place(axis: Axis) -> Callable[[object], float]:
    """How far up its axis a value lies, from 0 to 1."""
    if isinstance(axis, ChoicesConfig):
        return lambda value: axis.values.index(value) / (len(axis.values) - 1)
    if isinstance(axis, LogRangeConfig):
        return lambda value: math.log(float(str(value)) / axis.low) / math.log(axis.high / axis.low)
    return lambda value: (float(str(value)) - axis.low) / (axis.high - axis.low)
