"""The bounds of a valid figure, and MLPerf's estimate of the 99th percentile."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.engines.device.sysfs import Clock
from hipa_deploy.engines.latency.machine_state import Machine, Reading, Watch
from hipa_deploy.engines.latency.table import markdown_table, render_table
from hipa_deploy.engines.latency.validity import (
    early_stopping_estimate,
    judge,
    least_queries,
    most_slow,
)
from tests.engines.report_samples import READING, a_report

STEADY_MS = [100.0] * 120  # 12 seconds


def a_reading(
    mhz: float | None = 1755, celsius: float | None = 60, throttled: tuple[str, ...] = ()
) -> Reading:
    clocks = {} if mhz is None else {"gpu": Clock(now_mhz=mhz, max_mhz=1980)}
    temperatures = {} if celsius is None else {"gpu": celsius}
    update = {"clocks": clocks, "temperatures_c": temperatures, "throttled_by": throttled}
    return READING.model_copy(update=update)


def test_enough_steady_queries_are_valid_and_say_what_was_seen():
    validity = judge(STEADY_MS, readings=[a_reading(1700, 60), a_reading(1755, 65)])
    assert validity.valid
    assert validity.reasons == ()
    assert str(validity) == "valid: 120 queries in 12.0 s"
    assert validity.steadiness.clock_low_mhz == 1700
    assert validity.steadiness.celsius_high == 65
    assert validity.steadiness.readings == 2


@pytest.mark.parametrize(
    ("samples_ms", "readings", "reason"),
    [
        ([200.0] * 99, None, "99 queries, and at least 100 are needed"),
        ([99.0] * 101, None, "10.0 s of queries"),
        (STEADY_MS, [], "clock is not known"),
        (STEADY_MS, [a_reading(None)], "clock is not known"),
        (STEADY_MS, [a_reading(celsius=None)], "temperature is not known"),
        (STEADY_MS, [a_reading(1755), a_reading(1500)], "from 1500 to 1755 MHz"),
        (STEADY_MS, [a_reading(celsius=41), a_reading(celsius=52)], "from 41 to 52 degrees"),
        (STEADY_MS, [a_reading(throttled=("power cap", "hardware slowdown"))], "hardware slow"),
    ],
)
def test_each_bound_that_is_missed_is_the_reason(samples_ms, readings, reason):
    validity = judge(samples_ms, readings=readings)
    assert not validity.valid
    assert len(validity.reasons) == (2 if readings == [] else 1)
    assert reason in validity.reasons[0]
    assert str(validity).startswith("invalid: ")


def test_a_power_cap_with_a_steady_clock_is_no_fault():
    assert judge(STEADY_MS, readings=[a_reading(throttled=("power cap",))]).valid


def test_a_jetsons_zone_is_the_gpus():
    validity = judge(STEADY_MS, readings=[READING])
    assert validity.steadiness.celsius_low == 54.5


def test_the_numbers_of_mlperfs_load_generator():
    """Its floors: 64 queries for the 90th and 662 for the 99th percentile, 459 without a slow one.

    mlcommons/endpoints, pull request 417, names them as values of loadgen/early_stopping.cc.
    """
    assert least_queries(0.9) == 64
    assert least_queries(0.99) == 662
    assert most_slow(458, 0.99, 0.99) == -1
    assert most_slow(459, 0.99, 0.99) == 0


def exact_odds(slow: int, queries: int) -> Fraction:
    """P(at most ``slow`` of ``queries`` are slow), each with a chance of 1 %, in whole numbers."""
    total = 0
    for count in range(slow + 1):
        total += math.comb(queries, count) * 99 ** (queries - count)
    return Fraction(total, 100**queries)


@given(st.integers(1, 3000))
def test_the_count_is_that_of_exact_arithmetic(queries):
    slow = most_slow(queries, 0.99, 0.99)
    limit = Fraction(1, 100)
    assert slow < 0 or exact_odds(slow, queries) < limit
    assert exact_odds(slow + 1, queries) >= limit


def test_the_estimate_is_above_the_percentile_and_comes_near_it():
    draws = np.random.default_rng(0)
    above = 0
    for _ in range(200):
        above += early_stopping_estimate(draws.exponential(size=1000)) >= -math.log(0.01)
    assert above >= 190  # 99 % of 200, less three standard deviations
    many = draws.exponential(size=100_000)
    assert early_stopping_estimate(many) == pytest.approx(-math.log(0.01), rel=0.04)
    assert early_stopping_estimate([1.0] * 661) is None
    assert early_stopping_estimate([1.0] * 661 + [9.0]) == 9.0


def test_a_watch_reads_until_it_ends(tmp_path):
    machine = Machine(tmp_path)
    machine.read = lambda: READING
    with Watch(machine, interval=0.01) as watch:
        deadline = time.monotonic() + 5
        while len(watch.readings) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(watch.readings)
    assert count >= 2
    time.sleep(0.05)
    assert len(watch.readings) == count
    with Watch(None) as idle:
        pass
    assert idle.readings == []


def test_reports_say_that_they_are_invalid():
    report = a_report(validity=judge([1.0] * 5, readings=None), warnings=("hot",))
    assert "[1] invalid: 5 queries, and at least 100" in markdown_table([report])
    assert "[2] hot" in markdown_table([report])
    assert render_table(report).caption.count("invalid: 5 queries") == 1

    long = a_report(validity=judge([20.0] * 700, readings=None))
    assert "valid: 700 queries in 14.0 s" in render_table(long).caption
    assert "below 20.00 with 99 % confidence" in render_table(long).caption
    assert "invalid" not in markdown_table([long])
