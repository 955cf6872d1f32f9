"""Whether a measured latency counts, after MLPerf's habit that a result carries its own validity.

A figure that misses one of the bounds below is kept, and marked invalid with the reason. The
estimate of the 99th percentile is MLPerf's early stopping for a single stream: MLPerf Inference
Rules, appendix on early stopping (github.com/mlcommons/inference_policies, inference_rules.adoc),
as computed by its load generator (github.com/mlcommons/inference, loadgen/early_stopping.cc and
loadgen/results.cc). The rules of MLPerf ask for 600 seconds; these bounds are shorter, so nothing
here is an MLPerf result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from hipa_deploy.engines.latency.machine_state import Reading
from hipa_deploy.record import Record

LEAST_QUERIES = 100
LEAST_SECONDS = 10.0
# Of the GPU's clock between its lowest and its highest reading, as a share of the highest.
CLOCK_SPREAD = 0.1
# Between the lowest and the highest reading of the GPU's temperature.
CELSIUS_SPREAD = 10.0
PERCENTILE = 0.99
CONFIDENCE = 0.99
# A card at its power limit is at work as it was built to be: what matters is a steady clock.
HARMLESS_THROTTLE = "power cap"
# The GPU's own zone: nvidia-smi's, and that of the Jetsons.
_GPU_ZONES = ("gpu", "gpu-thermal", "GPU-therm")


class Steadiness(Record):
    """The GPU's clock and temperature while the queries ran; None where nothing reports them.

    Attributes:
        readings: how many readings there were.
        clock_low_mhz: the lowest clock of them.
        clock_high_mhz: the highest.
        celsius_low: the lowest temperature, in degrees Celsius.
        celsius_high: the highest.
        throttled_by: what throttled the clock in any of them.

    """

    readings: int
    clock_low_mhz: float | None
    clock_high_mhz: float | None
    celsius_low: float | None
    celsius_high: float | None
    throttled_by: tuple[str, ...] = ()


class Validity(Record):
    """Whether a figure counts, and by which bounds.

    Attributes:
        valid: no bound is missed.
        reasons: the bounds that are missed, a sentence each, without a full stop.
        queries: timed queries; a query is one batch.
        seconds: the time that they took together.
        least_queries: the bound of ``queries``.
        least_seconds: the bound of ``seconds``.
        p99_estimate_ms: MLPerf's early stopping estimate of the 99th percentile: with a confidence
            of 99 %, at most 1 % of queries take longer. None if there are too few queries for it.
        p99_least_queries: how many queries the estimate needs.
        steadiness: of the GPU; None where none took part.

    """

    valid: bool
    reasons: tuple[str, ...]
    queries: int
    seconds: float
    least_queries: int = LEAST_QUERIES
    least_seconds: float = LEAST_SECONDS
    p99_estimate_ms: float | None
    p99_least_queries: int
    steadiness: Steadiness | None = None

    def __str__(self) -> str:
        if not self.valid:
            return f"invalid: {'; '.join(self.reasons)}"
        return f"valid: {self.queries} queries in {self.seconds:.1f} s"


def judge(
    samples_ms: Sequence[float],
    *,
    readings: Sequence[Reading] | None,
    disturbances: Sequence[str] = (),
) -> Validity:
    """Say whether a measurement counts.

    Args:
        samples_ms: milliseconds of each timed query, after the warm-up, in order.
        readings: of the GPU's state while the queries ran; None if no GPU took part. A GPU that
            reports neither clock nor temperature makes the figure invalid.
        disturbances: further reasons why it does not count, a sentence each.

    Example:
        >>> judge([200.0] * 99, readings=None).reasons
        ('99 queries, and at least 100 are needed',)

    """
    queries = len(samples_ms)
    seconds = sum(samples_ms) / 1e3
    reasons = []
    if queries < LEAST_QUERIES:
        reasons.append(f"{queries} queries, and at least {LEAST_QUERIES} are needed")
    if seconds < LEAST_SECONDS:
        reasons.append(f"{seconds:.1f} s of queries, and at least {LEAST_SECONDS:g} s are needed")
    reasons += disturbances

    steadiness = None
    if readings is not None:
        steadiness = summarise_readings(readings)
        reasons += unsteady(steadiness)
    return Validity(
        valid=not reasons,
        reasons=tuple(reasons),
        queries=queries,
        seconds=round(seconds, 3),
        p99_estimate_ms=early_stopping_estimate(samples_ms),
        p99_least_queries=least_queries(),
        steadiness=steadiness,
    )


def summarise_readings(readings: Sequence[Reading]) -> Steadiness:
    """The extremes of the GPU's clock and temperature in ``readings``."""
    clocks = []
    celsius = []
    throttles: dict[str, None] = {}
    for reading in readings:
        clock = reading.clocks.get("gpu")
        if clock is not None and clock.now_mhz is not None:
            clocks.append(clock.now_mhz)
        zone = next((zone for zone in _GPU_ZONES if zone in reading.temperatures_c), None)
        if zone is not None:
            celsius.append(reading.temperatures_c[zone])
        throttles |= dict.fromkeys(reading.throttled_by or ())
    return Steadiness(
        readings=len(readings),
        clock_low_mhz=min(clocks, default=None),
        clock_high_mhz=max(clocks, default=None),
        celsius_low=min(celsius, default=None),
        celsius_high=max(celsius, default=None),
        throttled_by=tuple(throttles),
    )


def unsteady(steadiness: Steadiness) -> list[str]:
    """The bounds that the GPU's clock and temperature miss, a sentence each."""
    low = steadiness.clock_low_mhz
    high = steadiness.clock_high_mhz
    coolest = steadiness.celsius_low
    warmest = steadiness.celsius_high
    reasons = []
    if not low or not high:
        reasons.append("the GPU's clock is not known: nothing reports it")
    elif (high - low) / high > CLOCK_SPREAD:
        reasons.append(
            f"the GPU's clock went from {low:.0f} to {high:.0f} MHz, "
            f"and at most {CLOCK_SPREAD:.0%} is allowed"
        )
    if coolest is None or warmest is None:
        reasons.append("the GPU's temperature is not known: nothing reports it")
    elif warmest - coolest > CELSIUS_SPREAD:
        reasons.append(
            f"the GPU's temperature went from {coolest:.0f} to {warmest:.0f} degrees, "
            f"and at most {CELSIUS_SPREAD:g} are allowed"
        )
    harmful = [name for name in steadiness.throttled_by if name != HARMLESS_THROTTLE]
    if harmful:
        reasons.append(f"the GPU was throttled: {', '.join(harmful)}")
    return reasons


def early_stopping_estimate(
    samples_ms: Sequence[float],
    percentile: float = PERCENTILE,
    confidence: float = CONFIDENCE,
) -> float | None:
    """MLPerf's early stopping estimate of a percentile; None with too few queries.

    Let a query be too slow with a probability of ``1 - percentile``. t is the largest number of
    slow queries of which so few, or fewer, come by chance with a probability below
    ``1 - confidence``. The estimate is the t-th slowest query.

    Args:
        samples_ms: the queries in any order.
        percentile: in (0, 1).
        confidence: in (0, 1).

    Example:
        >>> early_stopping_estimate(range(1, 663))  # the slowest of the fewest that suffice
        662

    """
    queries = len(samples_ms)
    slow = most_slow(queries, percentile, confidence)
    if slow < 1:
        return None
    return sorted(samples_ms)[queries - slow]


@cache
def most_slow(queries: int, percentile: float, confidence: float) -> int:
    """The largest t with P(at most t of ``queries`` are slow) < 1 - ``confidence``; -1 for none."""
    slow = 1 - percentile
    allowed = 1 - confidence
    below = 0.0
    for count in range(queries + 1):
        below += _binomial(count, queries, slow)
        if below >= allowed:
            return count - 1
    return queries


def _binomial(count: int, queries: int, chance: float) -> float:
    """The probability of exactly ``count`` of ``queries`` events, by logarithms.

    Its factors alone would overflow: a report has up to 100,000 runs.
    """
    ways = math.lgamma(queries + 1) - math.lgamma(count + 1) - math.lgamma(queries - count + 1)
    return math.exp(ways + count * math.log(chance) + (queries - count) * math.log1p(-chance))


@cache
def least_queries(percentile: float = PERCENTILE, confidence: float = CONFIDENCE) -> int:
    """The fewest queries that give an estimate: 662 for the 99th percentile, 64 for the 90th."""
    queries = 1
    while most_slow(queries, percentile, confidence) < 1:
        queries += 1
    return queries
