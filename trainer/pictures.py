"""Pictures of one moment: histograms, curves over k, bars, intervals. Inline SVG in the look of `trainer.charts`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.bootstrap import Interval
from trainer.charts import NUM_COLOURS

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
_ROW = 22
_LABEL_CHARS = 21
_MAX_BINS = 24


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


def histogram(
    title: str, series: Mapping[str, Sequence[float]], *, unit: str, whole: bool = True, of: str = "rollouts"
) -> Markup:
    """The values of each name as shares of all it has, laid over each other. `of`: what was counted. Empty
    where there are no values.
    """
    shown = {name: values for name, values in series.items() if values}
    if not shown:
        return Markup("")
    bins = bins_of([v for values in shown.values() for v in values], whole=whole)
    shares = {name: bins.shares(values) for name, values in shown.items()}
    plot = _Plot(x=(0.0, float(bins.num)), y=_axis(0.0, max(max(s) for s in shares.values()), most=1.0))
    body = plot.frame(unit, f"share of {of}", percent=True)
    stride = max(1, math.ceil(bins.num / 7))
    for i in range(0, bins.num, stride):
        # A count stands under the middle of its bar, a range's lower end under the bar's left side.
        body += plot.x_label(i + (0.5 if bins.single else 0.0), number(bins.start + i * bins.width))
    for colour, (name, heights) in enumerate(shares.items()):
        outline = []
        for i, share in enumerate(heights):
            outline += [f"{plot.px(i):.1f},{plot.py(share):.1f}", f"{plot.px(i + 1):.1f},{plot.py(share):.1f}"]
            hover = f"{name}: {bins.label(i)}: {number(share, percent=True)}"
            body += Markup(
                '<rect class="f{} veil" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
            ).format(
                colour % NUM_COLOURS,
                plot.px(i) + 0.5,
                plot.py(share),
                plot.px(1) - plot.px(0) - 1,
                plot.py(0) - plot.py(share),
                hover,
            )
        body += Markup('<polyline class="s{}" points="{}"/>').format(colour % NUM_COLOURS, " ".join(outline))
    return figure(title, body, list(shown))


def curves(
    title: str, series: Mapping[str, Sequence[tuple[int, float]]], *, x_unit: str, unit: str, percent: bool = False
) -> Markup:
    """Lines over whole numbers, such as k. Empty where there is nothing to draw."""
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return Markup("")
    xs = sorted({x for points in shown.values() for x, _ in points})
    ys = [y for points in shown.values() for _, y in points]
    margin = 0.5 if xs[0] == xs[-1] else 0.0
    axis = _axis(min(0.0, *ys), max(0.0, *ys), most=1.0 if percent else math.inf)
    plot = _Plot(x=(xs[0] - margin, xs[-1] + margin), y=axis)
    body = plot.frame(x_unit, unit, percent=percent)
    for x in xs[:: max(1, math.ceil(len(xs) / 8))]:
        body += plot.x_label(x, str(x))
    for colour, (name, points) in enumerate(shown.items()):
        path = " ".join(f"{plot.px(x):.1f},{plot.py(y):.1f}" for x, y in points)
        body += Markup('<polyline class="s{}" points="{}"/>').format(colour % NUM_COLOURS, path)
        for x, y in points:
            hover = f"{name}, {x}: {number(y, percent=percent)}"
            body += Markup('<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="2.4"><title>{}</title></circle>').format(
                colour % NUM_COLOURS, plot.px(x), plot.py(y), hover
            )
    return figure(title, body, list(shown))


def bars(title: str, rows: Sequence[tuple[str, float]], *, show: Callable[[float], str]) -> Markup:
    """A horizontal bar for each label, with its value beside it. Values must not be negative."""
    if not rows:
        return Markup("")
    left, right, top = 150, 56, max(value for _, value in rows) or 1.0
    body = Markup("")
    for i, (label, value) in enumerate(rows):
        y = 6 + i * _ROW
        width = (_WIDTH - left - right) * value / top
        body += _row_label(left, y, label)
        body += Markup(
            '<rect class="f0" x="{}" y="{}" width="{:.1f}" height="13"><title>{}: {}</title></rect>'
            '<text class="tick" x="{:.1f}" y="{}">{}</text>'
        ).format(left, y, width, label, show(value), left + width + 5, y + 11, show(value))
    return figure(title, body, [], height=12 + _ROW * len(rows))


def interval_rows(
    title: str, rows: Sequence[tuple[str, Sequence[Interval]]], names: Sequence[str], *, unit: str
) -> Markup:
    """For each label the mean and interval of every name, as a dot on a bar."""
    if not rows:
        return Markup("")
    ends = [end for _, marks in rows for m in marks for end in (m.low, m.high, m.mean)]
    low, high, step = _axis(min(0.0, *ends), max(0.0, *ends))
    left, height = 150, _ROW * max(1, len(names)) // 2 + 12
    bottom = 6 + len(rows) * height

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT)

    body = Markup("")
    for k in range(round((high - low) / step) + 1):
        tick = low + k * step
        body += Markup(
            '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="4" y2="{}"/>'
            '<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
        ).format(
            "zero" if abs(tick) < step * 1e-9 else "grid",
            px(tick),
            px(tick),
            bottom,
            px(tick),
            bottom + 14,
            number(tick),
        )
    for i, (label, marks) in enumerate(rows):
        y = 6 + i * height
        body += _row_label(left, y + height / 2 - 12, label)
        for colour, mark in enumerate(marks):
            at = y + (colour + 1) * height / (len(marks) + 1)
            hover = f"{names[colour]}, {label}: {number(mark.mean)} ({number(mark.low)} to {number(mark.high)})"
            body += Markup(
                '<g><title>{}</title><line class="s{} whisker" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<circle class="f{}" cx="{:.1f}" cy="{:.1f}" r="4"/></g>'
            ).format(
                hover,
                colour % NUM_COLOURS,
                px(mark.low),
                px(mark.high),
                at,
                at,
                colour % NUM_COLOURS,
                px(mark.mean),
                at,
            )
    body += Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        _WIDTH - _RIGHT, bottom + 28, unit
    )
    return figure(title, body, names, height=bottom + 34)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    """Data to pixels: x from, to; y from, to, distance of the grid lines."""

    x: tuple[float, float]
    y: tuple[float, float, float]

    def px(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        low, high, _ = self.y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_unit: str, y_unit: str, *, percent: bool) -> Markup:
        low, high, step = self.y
        body = Markup("")
        for k in range(round((high - low) / step) + 1):
            tick = low + k * step
            body += Markup(
                '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(
                "zero" if abs(tick) < step * 1e-9 else "grid",
                _LEFT, _WIDTH - _RIGHT, self.py(tick), self.py(tick),
                _LEFT - 5, self.py(tick) + 3.5, number(tick, percent=percent),
            )  # fmt: skip
        body += Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
            _WIDTH - _RIGHT, _HEIGHT - 4, x_unit
        )
        middle = (_HEIGHT - _BOTTOM + _TOP) / 2
        axis = Markup('<text class="tick" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>')
        return body + axis.format(middle, y_unit)

    def x_label(self, value: float, text: str) -> Markup:
        return Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            self.px(value), _HEIGHT - _BOTTOM + 14, text
        )


def _row_label(left: float, y: float, label: str) -> Markup:
    shown = label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…"
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="end"><title>{}</title>{}</text>').format(
        left - 6, y + 11, label, shown
    )


def _axis(low: float, high: float, *, most: float = math.inf) -> tuple[float, float, float]:
    """From, to and distance of the grid lines; never beyond `most`."""
    step = nice_step((min(high, most) - low) / 4 or 0.25)
    first, last = math.floor(low / step + 1e-9), math.ceil(min(high, most) / step - 1e-9)
    return first * step, max(last, first + 1) * step, step


def nice_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def number(value: float, *, percent: bool = False) -> str:
    """Three figures: 0.125, 4.2, 1,500, 12.5 %."""
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) > 1e-12 else "0"


def figure(title: str, body: Markup, names: Sequence[str], *, height: float = _HEIGHT) -> Markup:
    """The picture with its title and, for several series, the key to the colours."""
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(_WIDTH, height, title, body)
    key = Markup("").join(
        Markup('<span class="key"><i class="b{}"></i>{}</span>').format(i % NUM_COLOURS, name)
        for i, name in enumerate(names if len(names) > 1 else ())
    )
    return Markup("<figure><figcaption>{}</figcaption>{}<div>{}</div></figure>").format(title, svg, key)
