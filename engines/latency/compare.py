"""Two latency reports side by side: whether the second is slower, by more than chance.

The suffix _RN marks an array of shape [R, N]: R resamples of N runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from rich.table import Table

from hipa_deploy.engines.latency.report import LatencyReport, LatencyStats
from hipa_deploy.engines.latency.stage_timer import END_TO_END
from hipa_deploy.errors import HipaError
from hipa_deploy.record import Record

RESAMPLES = 2000
CONFIDENCE = 0.95
# With fewer runs a bootstrap has too little to draw from.
LEAST_RUNS = 10
# How many numbers are drawn at once; it bounds the memory.
_CHUNK = 1_000_000

Metric = Literal["p50", "p90", "p95", "p99", "mean"]


class Ratio(Record):
    """The second report over the first.

    Attributes:
        first_ms: the metric of the first report, in milliseconds.
        second_ms: of the second.
        ratio: second over first; above 1 is slower.
        low: lower bound of the ratio, with 95 % confidence for the interval.
        high: upper bound.
        verdict: 'slower' and 'faster' need a change past the threshold and an interval without 1.

    """

    first_ms: float
    second_ms: float
    ratio: float
    low: float
    high: float
    verdict: Literal["slower", "faster", "same"]


class ConditionDifference(Record):
    """A condition that differs between the reports, with its two values as text."""

    field: str
    first: str
    second: str


class Comparison(Record):
    """The result of ``hipa-profile compare``.

    Attributes:
        metric: what was compared.
        threshold_percent: smaller changes are no verdict.
        rows: by stage, by stage on the device, and end to end.
        only_in_one: the names that only one of the reports has.
        differences: the conditions that differ.
        warnings: those of the two reports, and that one is invalid and why.
        regression: end to end, the verdict is 'slower'.

    """

    metric: Metric
    threshold_percent: float
    rows: dict[str, Ratio]
    only_in_one: tuple[str, ...]
    differences: tuple[ConditionDifference, ...]
    warnings: tuple[str, ...]
    regression: bool


def compare_reports(
    first: LatencyReport,
    second: LatencyReport,
    *,
    metric: Metric = "p50",
    threshold_percent: float = 5.0,
) -> Comparison:
    """Compare ``metric`` by stage and end to end, and the device time if both reports have it.

    The verdicts 'slower' and 'faster' need a change past the threshold and also a confidence
    interval without 1. The interval describes these runs only: it cannot know how another day,
    another boot or another room temperature would change them.

    Args:
        first: the base of the ratios.
        second: the report that is judged.
        metric: a percentile or the mean.
        threshold_percent: 0 or more; smaller changes are no verdict.

    Raises:
        HipaError: a threshold below 0 or not finite, or a report with too few samples or none.

    Example:
        >>> compare_reports(read_report(Path("old.json")), read_report(Path("new.json"))).regression
        False

    """
    if not 0 <= threshold_percent < float("inf"):
        raise HipaError(f"threshold is {threshold_percent} %. Expected 0 or more.")
    _check_samples(first, "first")
    _check_samples(second, "second")

    # Only what both reports have can be compared; the caption names the other stages.
    first_parts = _parts(first)
    second_parts = _parts(second)
    rows = {}
    for name, stats in first_parts.items():
        if name in second_parts:
            rows[name] = _ratio(stats, second_parts[name], metric, threshold_percent / 100)

    warnings = [f"first: {text}" for text in _doubts(first)]
    warnings += [f"second: {text}" for text in _doubts(second)]
    return Comparison(
        metric=metric,
        threshold_percent=threshold_percent,
        rows=rows,
        only_in_one=tuple(sorted(first_parts.keys() ^ second_parts.keys())),
        differences=tuple(condition_differences(first, second)),
        warnings=tuple(warnings),
        regression=rows[END_TO_END].verdict == "slower",
    )


def parse_percent(text: str) -> float:
    """Read a percentage: '5%', '5 %' and '5' are all 5.0.

    Raises:
        HipaError: the text is not a number.

    """
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise HipaError(f"threshold {text!r} is not a percentage. Expected one like 5%.") from None


def _parts(report: LatencyReport) -> dict[str, LatencyStats]:
    """The statistics of a report by the name of their row."""
    device = {f"{name}, device": stats for name, stats in report.device.items()}
    return {**report.stages, **device, END_TO_END: report.end_to_end}


def _check_samples(report: LatencyReport, which: str) -> None:
    runs = len(report.end_to_end.samples_ms)
    if runs == 0:
        raise HipaError(
            f"the {which} report has no samples (schema {report.schema_version}): "
            "no interval can be drawn. Measure again with this version."
        )
    if runs < LEAST_RUNS:
        raise HipaError(
            f"the {which} report has {runs} runs. "
            f"Expected {LEAST_RUNS} or more: hipa-profile --runs 50."
        )


def _doubts(report: LatencyReport) -> list[str]:
    """What a reader must know: of a GPU whose clock fell, the validity alone tells."""
    validity = report.validity
    invalid = [str(validity)] if validity and not validity.valid else []
    return [*invalid, *report.warnings]


def _ratio(first: LatencyStats, second: LatencyStats, metric: Metric, threshold: float) -> Ratio:
    first_N = np.asarray(first.samples_ms)
    second_N = np.asarray(second.samples_ms)
    base = float(_statistic(first_N[None], metric)[0])
    new = float(_statistic(second_N[None], metric)[0])

    # The interval is that of the ratios of resampled reports. Different seeds make the two
    # independent; fixed seeds give the same verdict every time.
    first_R = resampled(first_N, metric, 0)
    second_R = resampled(second_N, metric, 1)
    tail = 50 * (1 - CONFIDENCE)
    # A stage may take 0 ms on a clock that is too coarse: its ratio is then not a number.
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.percentile(second_R / first_R, [tail, 100 - tail])
        ratio = new / base if base else float("nan")

    verdict: Literal["slower", "faster", "same"] = "same"
    if ratio > 1 + threshold and low > 1:
        verdict = "slower"
    elif ratio < 1 - threshold and high < 1:
        verdict = "faster"
    return Ratio(
        first_ms=base,
        second_ms=new,
        ratio=ratio,
        low=float(low),
        high=float(high),
        verdict=verdict,
    )


def resampled(samples: np.ndarray, metric: Metric, seed: int) -> np.ndarray:
    """Resample the metric with the circular block bootstrap.

    Neighbouring runs stay together, because runs are not independent: clocks and temperatures
    drift. Drawing runs one by one would make the interval too narrow.

    Returns:
        ``RESAMPLES`` values of the metric, float64.

    Sources: blocks, Politis and Romano (1992); their length, the cube root of the runs, Hall,
    Horowitz and Jing (1995), https://doi.org/10.1093/biomet/82.3.561.
    """
    runs = len(samples)
    rng = np.random.default_rng(seed)
    length = max(1, round(runs ** (1 / 3)))
    blocks = -(-runs // length)  # rounded up, and the last one cut

    # In chunks, so that memory does not grow with the number of runs.
    at_once = max(1, _CHUNK // runs)
    values = []
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        index = rng.integers(0, runs, (draws, blocks, 1)) + np.arange(length)
        values.append(_statistic(samples[index.reshape(draws, -1)[:, :runs] % runs], metric))
    return np.concatenate(values)


def _statistic(samples_RN: np.ndarray, metric: Metric) -> np.ndarray:
    """The metric of each row of ``samples_RN``, of shape [R]."""
    if metric == "mean":
        return samples_RN.mean(axis=1)
    return np.percentile(samples_RN, int(metric.removeprefix("p")), axis=1)


def condition_differences(
    first: LatencyReport, second: LatencyReport
) -> Iterator[ConditionDifference]:
    """Find the conditions that differ, field by field.

    The conditions are software, device, bundle, power mode, governors and allowed clocks.
    """
    left = _flat(_settings(first))
    right = _flat(_settings(second))
    for field in dict.fromkeys((*left, *right)):
        before = left.get(field, "unknown")
        after = right.get(field, "unknown")
        if before != after:
            yield ConditionDifference(field=field, first=before, second=after)


def _settings(report: LatencyReport) -> dict[str, Any]:
    """The conditions, without what changes from minute to minute or had no part in the runs."""
    conditions = report.conditions.model_dump(mode="json")
    # Backends that are installed and did not run have no part in the runs.
    conditions["device"].pop("backends")
    state = conditions.pop("state") or {}
    for name in ("before", "after", "others_cores", "performance_state"):
        state.pop(name, None)

    # Of the readings only the allowed clocks are a setting.
    clocks = report.conditions.state.after.clocks if report.conditions.state else {}
    allowed = {}
    for name, clock in clocks.items():
        allowed[name] = {"max_mhz": clock.max_mhz, "locked": clock.locked}
    return {"warmup": report.warmup, **conditions, "state": {**state, "clocks": allowed}}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as one, with names such as 'state.power_mode'."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "unknown" if value is None else str(value)
    return flat


def render_comparison(comparison: Comparison) -> Table:
    """Make the table of ratios for a terminal; its caption has the warnings and differences."""
    title = f"{comparison.metric} of the second report over the first, {CONFIDENCE:.0%} confidence"
    table = Table(title=title, caption=_caption(comparison), caption_justify="left")
    table.add_column("stage")
    for heading in ("first, ms", "second, ms", "ratio", "interval", "verdict"):
        table.add_column(heading, justify="right")
    for name, row in comparison.rows.items():
        interval = f"{row.low:.3f} to {row.high:.3f}"
        cells = (
            f"{row.first_ms:.2f}",
            f"{row.second_ms:.2f}",
            f"{row.ratio:.3f}",
            interval,
            row.verdict,
        )
        table.add_row(name, *cells, style="bold" if name == END_TO_END else None)
    return table


def _caption(comparison: Comparison) -> str:
    word = "regression" if comparison.regression else "no regression"
    lines = [
        f"{word}: end to end decides, past {comparison.threshold_percent:g} % "
        "and with 1 outside the interval."
    ]
    if comparison.only_in_one:
        lines.append(f"in one report alone: {', '.join(comparison.only_in_one)}.")
    if comparison.differences:
        lines.append("warning: the conditions differ, so the ratio is not the software's alone:")
    for difference in comparison.differences:
        lines.append(f"  {difference.field}: {difference.first} -> {difference.second}")
    lines += [f"warning: {text}." for text in comparison.warnings]
    return "\n".join(lines)
