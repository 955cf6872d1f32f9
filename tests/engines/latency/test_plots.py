"""The plots as SVG: every mark is drawn, and inside the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.engines.latency.plots import (
    MOST_DOTS,
    MOST_POINTS,
    WIDTH,
    Scale,
    colours_of,
    line_plot,
    share_bar,
    strip_plot,
)

LATENCIES = st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=60)


def elements(svg: str, tag: str) -> list[ET.Element]:
    return ET.fromstring(svg).findall(f"{{http://www.w3.org/2000/svg}}{tag}")


@given(st.dictionaries(st.sampled_from(["unet", "a <b> & 'c'"]), LATENCIES, min_size=1))
def test_every_dot_lies_inside_the_picture(rows):
    dots = elements(strip_plot(rows, colours_of(list(rows)), "ms"), "circle")
    assert len(dots) == sum(map(len, rows.values()))
    assert all(0 <= float(dot.get("cx")) <= WIDTH for dot in dots)


@given(LATENCIES)
def test_every_run_is_on_its_line(values):
    line = elements(line_plot({"unet": values}, {"unet": "#000000"}, "ms"), "polyline")[0]
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(points) == len(values)
    assert all(0 <= x <= WIDTH and 0 <= y <= 260 for x, y in points)


def test_many_runs_are_thinned_and_no_peak_is_lost():
    values = [1.0] * 50_000
    values[31_234] = 9.0
    strip = strip_plot({"unet": values}, {"unet": "#000000"}, "ms")
    assert len(elements(strip, "circle")) <= MOST_DOTS + 1

    svg = line_plot({"unet": values}, {"unet": "#000000"}, "ms")
    points = elements(svg, "polyline")[0].get("points").split()
    heights = {point.split(",")[1] for point in points}
    assert len(points) <= MOST_POINTS
    assert len(heights) == 2  # that of the 1s and that of the one 9


def test_the_width_of_a_part_is_its_share():
    colours = colours_of(["a", "b"])
    svg = share_bar({"host": {"a": 30.0, "b": 10.0}}, colours, "ms")
    widths = {}
    for rect in elements(svg, "rect"):
        if rect.get("height") == "32":  # the squares of the legend are smaller
            widths[rect.get("fill")] = float(rect.get("width"))
    assert widths[colours["a"]] == pytest.approx(3 * widths[colours["b"]], rel=0.02)
    assert re.findall(r">(\d+) %<", svg) == ["75", "25"]


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, span):
    scale = Scale(low, low + span, 0, 100)
    if span > 1e-9 * low:
        assert 1 <= len(scale.ticks()) <= 9
        assert all(-0.2 <= scale(tick) <= 100.2 for tick in scale.ticks())


def test_nothing_to_show_is_still_a_picture():
    ET.fromstring(strip_plot({"unet": []}, {"unet": "#0"}, "ms"))
    ET.fromstring(line_plot({}, {}, "ms"))
    ET.fromstring(share_bar({}, {}, "ms"))
