"""Two latency reports side by side: is the second slower, and is that more than chance?"""

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
LEAST_RUNS = 10
_CHUNK = 1_000_000  # numbers drawn at once

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
    """A condition that is not the same in both, as text."""

    field: str
    first: str
    second: str


class Comparison(Record):
    """``hipa-profile compare``'s result. ``regression``: end to end, the verdict is 'slower'."""

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
    """The ratio of ``metric``, by stage and end to end, with device time where both have it.

    'slower' and 'faster' need both: a change past the threshold, and a confidence interval without
    1. The interval is of these runs: it does not know of another day, another boot or another room
    temperature.

    Raises:
        HipaError: a threshold that is not 0 or more, or a report without samples or with too few.

    """
    if not 0 <= threshold_percent < float("inf"):
        raise HipaError(f"threshold is {threshold_percent} %. Expected 0 or more.")
    parts = [_parts(report) for report in (first, second)]
    for report, which in ((first, "first"), (second, "second")):
        _check_samples(report, which)
    names = [name for name in parts[0] if name in parts[1]]
    rows = {
        name: _ratio(parts[0][name], parts[1][name], metric, threshold_percent / 100)
        for name in names
    }
    warnings = [f"first: {text}" for text in first.warnings]
    warnings += [f"second: {text}" for text in second.warnings]
    return Comparison(
        metric=metric,
        threshold_percent=threshold_percent,
        rows=rows,
        only_in_one=tuple(sorted(parts[0].keys() ^ parts[1].keys())),
        differences=tuple(condition_differences(first, second)),
        warnings=tuple(warnings),
        regression=rows[END_TO_END].verdict == "slower",
    )


def parse_percent(text: str) -> float:
    """'5%', '5 %' and '5' as 5.0.

    Raises:
        HipaError: not a number.

    """
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise HipaError(f"threshold {text!r} is not a percentage. Expected one like 5%.") from None


def _parts(report: LatencyReport) -> dict[str, LatencyStats]:
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


def _ratio(first: LatencyStats, second: LatencyStats, metric: Metric, threshold: float) -> Ratio:
    pair = [np.asarray(stats.samples_ms) for stats in (first, second)]
    base, new = (float(_statistic(samples[None], metric)[0]) for samples in pair)
    drawn = [resampled(samples, metric, seed) for seed, samples in enumerate(pair)]
    tail = 50 * (1 - CONFIDENCE)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.percentile(drawn[1] / drawn[0], [tail, 100 - tail])
        ratio = new / base if base else float("nan")
    verdict: Literal["slower", "faster", "same"] = "same"
    if ratio > 1 + threshold and low > 1:
        verdict = "slower"
    elif ratio < 1 - threshold and high < 1:
        verdict = "faster"
    return Ratio(
        first_ms=base, second_ms=new, ratio=ratio, low=float(low), high=float(high), verdict=verdict
    )


def resampled(samples: np.ndarray, metric: Metric, seed: int) -> np.ndarray:
    """``RESAMPLES`` values of the metric, float64, by the circular block bootstrap.

    Neighbouring runs stay together. Runs are not independent (clocks and temperatures drift), and
    drawing them one by one would give too narrow an interval.

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
    """The metric of each row."""
    if metric == "mean":
        return samples_RN.mean(axis=1)
    return np.percentile(samples_RN, int(metric.removeprefix("p")), axis=1)


def condition_differences(
    first: LatencyReport, second: LatencyReport
) -> Iterator[ConditionDifference]:
    """Conditions that differ, field by field.

    They are software, device, bundle, power mode, governors and allowed clocks.
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
    conditions["device"].pop("backends")
    state = conditions.pop("state") or {}
    for name in ("before", "after", "others_cores", "performance_state"):
        state.pop(name, None)
    clocks = report.conditions.state.after.clocks if report.conditions.state else {}
    allowed = {
        name: {"max_mhz": clock.max_mhz, "locked": clock.locked} for name, clock in clocks.items()
    }
    return {"warmup": report.warmup, **conditions, "state": {**state, "clocks": allowed}}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "unknown" if value is None else str(value)
    return flat


def render_comparison(comparison: Comparison) -> Table:
    """Ratios for a terminal; differences of conditions and warnings in the caption."""
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
