"""The bars of the ingredients, each item against them, on every caption level."""

from __future__ import annotations

import statistics
from typing import Any

from criteria import Results, split_names
from items import FIRST, MAIN

from hipa_deploy.train.evaluation.quality_report import BASE, teacher_row

LEAST_GAP = 0.95  # share of the KID gap that must be closed
HF_RANGE = (0.95, 1.05)  # of the high-frequency ratio
LEAST_VARIETY = 0.9  # of the teacher's
RECALL_STEPS = 8  # of the teacher whose caption retrieval must be reached
HEAD = ("", "KID gap closed", "HF ratio", "variety kept", "R@1", "missed")


def bars_section(results: Results) -> str:
    """One table for each split: every item's numbers that have a bar, and which bars it misses."""
    parts = [
        "## Bars",
        f"KID gap closed at least {LEAST_GAP:.0%}; high-frequency ratio {HF_RANGE[0]} to "
        f"{HF_RANGE[1]}; variety at least {LEAST_VARIETY:.0%} of the teacher's; R@1 at least that "
        f"of the teacher at {RECALL_STEPS} steps. ± is the standard deviation over noise seeds; "
        "'difference' is HiPA's KID-Lite0 less the item's, from the same noise: above 0 the item "
        "is better.",
    ]
    for split in split_names(results):
        parts.append(f"### {split.capitalize()}\n\n{_table(results, split)}")
    return "\n\n".join(parts)


def _table(results: Results, split: str) -> str:
    lines = [[*HEAD, "difference"], ["---"] * (len(HEAD) + 1)]
    for result in results.values():
        if "splits" in result:
            lines.append(_row(results, result, split))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(results: Results, result: dict[str, Any], split: str) -> list[str]:
    """The cells of one item."""
    measured = result["splits"][split]
    reference = results[FIRST]
    truth = reference["rows"][reference["truth"]][split]
    base = reference["rows"][BASE][split]["pooled"]["kid"]
    floor = truth["pooled"]["kid"]

    def gap(numbers: dict[str, float]) -> float:
        return (base - numbers["kid"]) / (base - floor)

    pooled = measured["pooled"]
    closed = gap(pooled)
    spread = statistics.stdev([gap(numbers) for numbers in measured["repeats"]])
    missed = []
    if closed < LEAST_GAP:
        missed.append("gap")
    if not HF_RANGE[0] <= pooled["hf_ratio"] <= HF_RANGE[1]:
        missed.append("HF")
    cells = [result["title"], f"{closed:.0%} ± {spread:.0%}", f"{pooled['hf_ratio']:.3f}"]

    kept = pooled["variety"] / truth["pooled"]["variety"]
    if kept < LEAST_VARIETY:
        missed.append("variety")
    cells.append(f"{kept:.0%}")

    # Without MiniLM there is no caption retrieval.
    recall = pooled.get("recall@1")
    eight = reference["rows"].get(teacher_row(RECALL_STEPS))
    if recall is not None and eight is not None and recall < eight[split]["pooled"]["recall@1"]:
        missed.append("R@1")
    cells.append("" if recall is None else f"{recall:.2f}")
    return [*cells, ", ".join(missed) or "none", _difference(results, measured, split)]


def _difference(results: Results, measured: dict[str, Any], split: str) -> str:
    """HiPA's KID-Lite0 less the item's, with the spread over the noise seeds."""
    if MAIN not in results:
        return ""
    main = results[MAIN]["splits"][split]["repeats"]
    differences = []
    for own, other in zip(main, measured["repeats"], strict=True):
        differences.append(own["kid"] - other["kid"])
    if not any(differences):
        return ""
    return f"{statistics.mean(differences):.3f} ± {statistics.stdev(differences):.3f}"
