"""Three plots as SVG text: strips with boxes, lines over runs, a bar of shares.

They need no library, no script and no fonts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH = 860
COLOURS = (
    "#3f74d8",
    "#d9822b",
    "#2f9e74",
    "#8d63d2",
    "#c7506a",
    "#4aa3b8",
)  # legible on white and on black
GREY = "#8a919e"
MOST_DOTS = 400
MOST_POINTS = 800

# The plot's horizontal extent; names stand left of it.
_LEFT = 150
_RIGHT = WIDTH - 30
_ROW = 72
_FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"'


class Scale(NamedTuple):
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``, evenly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of ``value``, to a tenth."""
        share = (value - self.low) / ((self.high - self.low) or 1)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        """About seven round values inside the range.

        They are multiples of 1, 2 or 5 times a power of ten.
        """
        rough = (self.high - self.low) / 7 or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(step * index, 10) for index in range(first, last + 1)]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour a name, the same in every plot."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def strip_plot(rows: Mapping[str, Sequence[float]], colours: Mapping[str, str], unit: str) -> str:
    """A row a name, each on a scale of its own.

    A row has a dot a value (``MOST_DOTS`` at most), a box from 25 to 75 %, a long stroke at 50 %
    and a short one at 99 %.
    """
    parts: list[str] = []
    for index, (name, values) in enumerate(rows.items()):
        parts += _strip(name, values, 34 + _ROW * index, colours[name], unit)
    return _svg(_ROW * len(rows) + 4, parts, "Latency distribution by stage")


def _strip(name: str, values: Sequence[float], y: float, colour: str, unit: str) -> Iterator[str]:
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    margin = (high - low) * 0.04 or 0.05 * high or 1.0
    scale = Scale(low - margin, high + margin, _LEFT, _RIGHT)
    yield from _x_axis(scale, y + 16, y - 16, unit)
    yield _text(_LEFT - 14, y + 4, name, anchor="end")
    if not values:
        return
    p25, p50, p75, p99 = (float(p) for p in np.percentile(values, [25, 50, 75, 99]))
    width = max(1.0, scale(p75) - scale(p25))
    box = f'x="{scale(p25)}" y="{y - 13}" width="{width:.1f}" height="26" rx="3"'
    paint = f'fill="{colour}" fill-opacity="0.22" stroke="{colour}" stroke-opacity="0.7"'
    yield f"<rect {box} {paint}/>"
    for index, value in enumerate(_thinned(values, MOST_DOTS)):
        # Multiples of the golden ratio spread dots evenly, and the same way each time.
        jitter = (index * 0.618034 % 1 - 0.5) * 20
        place = f'cx="{scale(value)}" cy="{y + jitter:.1f}"'
        yield f'<circle {place} r="2.2" fill="{colour}" fill-opacity="0.55"/>'
    yield _stroke(scale(p50), y - 15, scale(p50), y + 15, colour, 2.5, f"p50 {p50:.3g}")
    yield _stroke(scale(p99), y - 9, scale(p99), y + 9, colour, 1.5, f"p99 {p99:.3g}")
    yield _text(scale(p50), y - 18, f"{p50:.3g}", anchor="middle", size=11)


def line_plot(series: Mapping[str, Sequence[float]], colours: Mapping[str, str], unit: str) -> str:
    """Values in their order, a line a name, from 0 up.

    Beyond ``MOST_POINTS`` values each point is the largest of several.
    """
    height = 260
    top = 34
    most = max((max(values) for values in series.values() if values), default=1.0) or 1.0
    longest = max((len(values) for values in series.values()), default=1)
    x = Scale(1, max(2, longest), _LEFT - 90, _RIGHT)
    y = Scale(0, most * 1.06, height - 40, top)
    parts = [
        *_y_axis(y, x.start, x.end, unit),
        _text(x.end, height - 8, "run", anchor="end", size=11),
    ]
    for tick in x.ticks():
        if tick >= 1:
            parts.append(_text(x(tick), height - 22, f"{tick:g}", anchor="middle", size=11))
    parts += list(_legend(series, colours, x.start))
    for name, values in series.items():
        bucket = -(-len(values) // MOST_POINTS) or 1
        peaks = [max(values[start : start + bucket]) for start in range(0, len(values), bucket)]
        points = " ".join(
            f"{x(1 + index * bucket)},{y(value)}" for index, value in enumerate(peaks)
        )
        style = f'fill="none" stroke="{colours[name]}" stroke-width="1.6" stroke-linejoin="round"'
        parts.append(
            f'<polyline points="{points}" {style}><title>{escape(name)}</title></polyline>'
        )
    return _svg(height, parts, "Latency of each run, in order")


def share_bar(
    bars: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], unit: str
) -> str:
    """A bar a name, from 0, its parts side by side with their share of the bar."""
    longest = max((sum(parts.values()) for parts in bars.values()), default=1.0) or 1.0
    scale, height = Scale(0, longest, _LEFT, _RIGHT), 58 * len(bars) + 46
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    drawn = [*_x_axis(scale, height - 32, 26, unit), *_legend(names, colours, _LEFT)]
    for index, (label, parts) in enumerate(bars.items()):
        y, at, total = 54 + 58 * index, 0.0, sum(parts.values()) or 1.0
        drawn.append(_text(_LEFT - 14, y + 4, label, anchor="end"))
        for name, value in parts.items():
            drawn += _part(
                name, value, 100 * value / total, (scale(at), scale(at + value)), y, colours[name]
            )
            at += value
    return _svg(height, drawn, "Share of each stage")


def _part(
    name: str, value: float, percent: float, ends: tuple[float, float], y: float, colour: str
) -> Iterator[str]:
    width = max(0.5, ends[1] - ends[0] - 1)  # a hairline between parts
    title = escape(f"{name}: {value:.3g} ms, {percent:.0f} %")
    box = f'x="{ends[0]}" y="{y - 16}" width="{width:.1f}" height="32" rx="2" fill="{colour}"'
    yield f"<rect {box}><title>{title}</title></rect>"
    if width > 36:
        yield _text(ends[0] + width / 2, y + 4, f"{percent:.0f} %", anchor="middle", fill="#ffffff")


def _legend(
    names: Sequence[str] | Mapping[str, object], colours: Mapping[str, str], x: float
) -> Iterator[str]:
    for name in names:
        yield f'<rect x="{x:.1f}" y="6" width="11" height="11" rx="2" fill="{colours[name]}"/>'
        yield _text(x + 17, 16, name, size=12)
        x += 40 + 7.2 * len(name)


def _x_axis(scale: Scale, y: float, top: float, unit: str) -> Iterator[str]:
    for tick in scale.ticks():
        yield _stroke(scale(tick), top, scale(tick), y, GREY, 0.5)
        yield _text(scale(tick), y + 14, f"{tick:g} {unit}", anchor="middle", size=11)


def _y_axis(scale: Scale, left: float, right: float, unit: str) -> Iterator[str]:
    for tick in scale.ticks():
        yield _stroke(left, scale(tick), right, scale(tick), GREY, 0.5)
        yield _text(left - 8, scale(tick) + 4, f"{tick:g}", anchor="end", size=11)
    yield _text(left - 8, scale.end - 12, unit, anchor="end", size=11)


def _thinned(values: Sequence[float], most: int) -> Sequence[float]:
    """Every so many-th value, and the largest always."""
    if len(values) <= most:
        return values
    return [*values[:: -(-len(values) // most)], max(values)]


def _stroke(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float, title: str = ""
) -> str:
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    inside = f"<title>{escape(title)}</title>" if title else ""
    opacity = ' stroke-opacity="0.45"' if colour == GREY else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{opacity}>{inside}</line>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: int = 13, fill: str = "currentColor"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    size = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"'
    title = f'role="img" aria-label="{escape(label)}"'
    return "\n".join([f"<svg {size} {title} {_FONT}>", *parts, "</svg>"])
