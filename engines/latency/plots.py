"""Three plots as SVG text: the distribution of runs, the runs in order, and the shares of stages.

The SVG needs no library, no script and no fonts. Coordinates are in its own units, which a browser
scales; they are called pixels here. x grows to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH = 860
# Legible on white and on black, since the page follows the reader's choice of a dark scheme.
COLOURS = ("#3f74d8", "#d9822b", "#2f9e74", "#8d63d2", "#c7506a", "#4aa3b8")
GREY = "#8a919e"

# A page must stay small after 100,000 runs, and more marks than these overlap anyway.
MOST_DOTS = 400
MOST_POINTS = 800

# The horizontal extent of a plot; the names of its rows are to the left of it.
_LEFT = 150
_RIGHT = WIDTH - 30
_ROW = 72  # the height of a row of the strip plot
_FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif"'


class Scale(NamedTuple):
    """A linear map of values from ``low`` to ``high`` to pixels from ``start`` to ``end``.

    Example:
        >>> Scale(0, 10, 100, 200)(5)
        150.0

    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of ``value``, to a tenth."""
        # 1 if all values are equal: there is nothing to divide by.
        span = (self.high - self.low) or 1
        share = (value - self.low) / span
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        """About seven values inside the range, multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / 7 or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        # The smallest round step that is not below the rough one; 0.999 allows for rounding.
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        # 1e-9 keeps a tick that lies exactly on an end of the range.
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(step * index, 10) for index in range(first, last + 1)]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; after six names they repeat."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def strip_plot(rows: Mapping[str, Sequence[float]], colours: Mapping[str, str], unit: str) -> str:
    """Draw the distribution of the values of each name, in a row with a scale of its own.

    A row has a dot for each value (about ``MOST_DOTS`` at most), a box from the 25th to the 75th
    percentile, a long stroke at the median and a short one at the 99th percentile.

    Args:
        rows: values by name; a name without values has an empty row.
        colours: a colour by name.
        unit: of the values, for the axes.

    Returns:
        An ``<svg>`` element.

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

    # The box is drawn first, so that the dots lie on top of it.
    p25, p50, p75, p99 = np.percentile(values, [25, 50, 75, 99]).tolist()
    width = max(1.0, scale(p75) - scale(p25))
    box = f'x="{scale(p25)}" y="{y - 13}" width="{width:.1f}" height="26" rx="3"'
    paint = f'fill="{colour}" fill-opacity="0.22" stroke="{colour}" stroke-opacity="0.7"'
    yield f"<rect {box} {paint}/>"

    for index, value in enumerate(_thinned(values, MOST_DOTS)):
        # Multiples of the golden ratio spread dots evenly, and the same way each time.
        jitter = (index * 0.618034 % 1 - 0.5) * 20
        place = f'cx="{scale(value)}" cy="{y + jitter:.1f}"'
        yield f'<circle {place} r="2.2" fill="{colour}" fill-opacity="0.55"/>'

    # The strokes come last, so that no dot covers them.
    yield _stroke(scale(p50), y - 15, scale(p50), y + 15, colour, 2.5, f"p50 {p50:.3g}")
    yield _stroke(scale(p99), y - 9, scale(p99), y + 9, colour, 1.5, f"p99 {p99:.3g}")
    yield _text(scale(p50), y - 18, f"{p50:.3g}", anchor="middle", size=11)


def line_plot(series: Mapping[str, Sequence[float]], colours: Mapping[str, str], unit: str) -> str:
    """Draw the values of each name in their order, as a line above an axis that starts at 0.

    A line has at most ``MOST_POINTS`` points. If there are more values, each point is the largest
    of several neighbours, so that no peak is lost.

    Args:
        series: values by name, in the order of the runs.
        colours: a colour by name.
        unit: of the values, for the axis.

    Returns:
        An ``<svg>`` element.

    """
    height = 260
    top = 34

    # The scales fit the longest and the highest line; without any values they are arbitrary.
    peaks = [max(values) for values in series.values() if values]
    highest = max(peaks, default=1.0) or 1.0
    longest = max(map(len, series.values()), default=1)
    x = Scale(1, max(2, longest), _LEFT - 90, _RIGHT)
    y = Scale(0, highest * 1.06, height - 40, top)

    # Axes and legend first; the lines are drawn on top of them.
    parts = list(_y_axis(y, x.start, x.end, unit))
    parts.append(_text(x.end, height - 8, "run", anchor="end", size=11))
    for tick in x.ticks():
        if tick >= 1:  # runs are counted from 1
            parts.append(_text(x(tick), height - 22, f"{tick:g}", anchor="middle", size=11))
    parts += _legend(series, colours, x.start)

    for name, values in series.items():
        points = _line_points(values, x, y)
        style = f'fill="none" stroke="{colours[name]}" stroke-width="1.6" stroke-linejoin="round"'
        title = f"<title>{escape(name)}</title>"
        parts.append(f'<polyline points="{points}" {style}>{title}</polyline>')
    return _svg(height, parts, "Latency of each run, in order")


def _line_points(values: Sequence[float], x: Scale, y: Scale) -> str:
    """The points of a polyline, 'x,y x,y …', each the largest of a group of neighbours."""
    # Rounded up, so that there are never more than MOST_POINTS groups.
    group = -(-len(values) // MOST_POINTS) or 1
    points = []
    for start in range(0, len(values), group):
        highest = max(values[start : start + group])
        points.append(f"{x(1 + start)},{y(highest)}")
    return " ".join(points)


def share_bar(
    bars: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], unit: str
) -> str:
    """Draw a bar for each label, with its parts side by side and their share of the bar.

    Args:
        bars: by label, the values of the parts by name.
        colours: a colour by the name of a part.
        unit: of the values, for the axis.

    Returns:
        An ``<svg>`` element.

    """
    height = 58 * len(bars) + 46

    # All bars share one scale, so that their lengths can be compared.
    totals = [sum(parts.values()) for parts in bars.values()]
    scale = Scale(0, max(totals, default=1.0) or 1.0, _LEFT, _RIGHT)

    # A part that is in several bars has one entry in the legend.
    names: dict[str, None] = {}
    for parts in bars.values():
        names |= dict.fromkeys(parts)
    drawn = [*_x_axis(scale, height - 32, 26, unit), *_legend(names, colours, _LEFT)]

    for index, (label, parts) in enumerate(bars.items()):
        y = 54 + 58 * index
        drawn.append(_text(_LEFT - 14, y + 4, label, anchor="end"))
        total = sum(parts.values()) or 1.0
        start = 0.0
        for name, value in parts.items():
            percent = 100 * value / total
            left = scale(start)
            right = scale(start + value)
            title = f"{name}: {value:.3g} ms, {percent:.0f} %"
            drawn += _part(left, right, y, colours[name], title, f"{percent:.0f} %")
            start += value
    return _svg(height, drawn, "Share of each stage")


def _part(
    left: float, right: float, y: float, colour: str, title: str, label: str
) -> Iterator[str]:
    # One pixel less leaves a hairline between parts. A part without width can still be pointed at.
    width = max(0.5, right - left - 1)
    box = f'x="{left}" y="{y - 16}" width="{width:.1f}" height="32" rx="2" fill="{colour}"'
    yield f"<rect {box}><title>{escape(title)}</title></rect>"
    if width > 36:  # the label fits
        yield _text(left + width / 2, y + 4, label, anchor="middle", fill="#ffffff")


def _legend(
    names: Sequence[str] | Mapping[str, object], colours: Mapping[str, str], x: float
) -> Iterator[str]:
    for name in names:
        yield f'<rect x="{x:.1f}" y="6" width="11" height="11" rx="2" fill="{colours[name]}"/>'
        yield _text(x + 17, 16, name, size=12)
        # SVG cannot measure text: 7.2 pixels a letter is an estimate for this size.
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
    """At most ``most`` evenly spaced values, and the largest in addition."""
    if len(values) <= most:
        return values
    stride = -(-len(values) // most)
    return [*values[::stride], max(values)]


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
