"""The criteria that the method must meet, each with its measurement, on held-out prompts."""

from __future__ import annotations

import statistics
from typing import Any

from evaluation import SPLITS
from items import BASELINES, FIRST, MAIN

from hipa_deploy.train.evaluation.quality_report import BASE

Results = dict[str, dict[str, Any]]
"""Result by name of the item."""
LEAST_GAP = 0.9  # share of the KID gap that must be closed
HF_RANGE = (0.85, 1.15)  # of the high-frequency ratio
# The sentences below keep their wording: docs/quality has reports of several versions to compare.
METRIC_TITLES = {"kid": "KID-Lite0", "distance": "distance"}


def criteria_section(results: Results) -> str:
    """Markdown list of the criteria that can be judged so far.

    They are judged for HiPA as the benchmark trains it, and for the adaptor trained elsewhere.
    """
    lines = []
    for split in split_names(results):
        for name in ("shipped", MAIN):
            if name in results:
                title = results[name]["title"]
                for text in criteria_of_item(results, name, split):
                    lines.append(f"- {split}, {title}: {text}")
        for text in comparisons(results, split):
            lines.append(f"- {split}: {text}")
    return "## Bars\n\n" + ("\n".join(lines) or "Nothing trained yet.")


def split_names(results: Results) -> list[str]:
    """The splits that were measured; those of every report before there are references."""
    if FIRST not in results:
        return list(SPLITS)
    return list(results[FIRST]["rows"][BASE])


def criteria_of_item(results: Results, name: str, split: str) -> list[str]:
    """KID gap and high-frequency ratio of one item, each with its verdict."""
    reference = results["references"]
    measured = results[name]["splits"][split]["pooled"]
    base = reference["rows"][BASE][split]["pooled"]["kid"]
    floor = reference["rows"][reference["truth"]][split]["pooled"]["kid"]
    gap = (base - measured["kid"]) / (base - floor)
    ratio = measured["hf_ratio"]
    gap_verdict = _met(gap >= LEAST_GAP)
    ratio_verdict = _met(HF_RANGE[0] <= ratio <= HF_RANGE[1])
    return [
        f"KID gap closed {gap:.0%}, at least {LEAST_GAP:.0%} asked: {gap_verdict}",
        f"high-frequency ratio {ratio:.2f}, {HF_RANGE[0]} to {HF_RANGE[1]} asked: {ratio_verdict}",
    ]


def comparisons(results: Results, split: str) -> list[str]:
    """HiPA compared with each baseline, and with itself without the high-frequency term.

    Each baseline appears twice: with as many steps as HiPA, and with as much time.
    """
    if MAIN not in results:
        return []
    names = []
    for baseline in BASELINES:
        names += [baseline, f"{baseline}-time"]
    names.append("no-hf")

    lines = []
    for name in names:
        if name not in results:
            continue
        verdicts = [_compare_metric(results, name, split, key) for key in METRIC_TITLES]
        if name == "no-hf":
            verdicts.append(_compare_ratio(results, split))
        lines.append(f"HiPA against {results[name]['title']}: {'; '.join(verdicts)}")
    return lines


def _compare_metric(results: Results, name: str, split: str, key: str) -> str:
    """HiPA against an item in a metric of which less is better."""
    ours = results[MAIN]["splits"][split]
    theirs = results[name]["splits"][split]

    # A repeat has the same prompts and noise on both sides, so the differences are paired.
    differences = []
    for own, other in zip(ours["repeats"], theirs["repeats"], strict=True):
        differences.append(other[key] - own[key])
    values = f"{ours['pooled'][key]:.3f} against {theirs['pooled'][key]:.3f}"
    return f"{METRIC_TITLES[key]} {values}, {_verdict(differences)}"


def _compare_ratio(results: Results, split: str) -> str:
    """HiPA against itself without the high-frequency term: which ratio is closer to 1."""
    ours = results[MAIN]["splits"][split]
    theirs = results["no-hf"]["splits"][split]
    differences = []
    for own, other in zip(ours["repeats"], theirs["repeats"], strict=True):
        differences.append(abs(other["hf_ratio"] - 1) - abs(own["hf_ratio"] - 1))
    values = f"{ours['pooled']['hf_ratio']:.3f} against {theirs['pooled']['hf_ratio']:.3f}"
    return f"high-frequency ratio {values}, {_verdict(differences)}"


def _verdict(differences: list[float]) -> str:
    """Verdict on paired differences, which are positive where HiPA is better.

    HiPA is better, or worse, only where every noise seed says so.
    """
    if min(differences) > 0:
        word = "better"
    elif max(differences) < 0:
        word = "worse"
    else:
        word = "not told apart"
    mean = statistics.mean(differences)
    spread = statistics.stdev(differences)
    return f"{word} (difference {mean:.3f} ± {spread:.3f} over {len(differences)} noise seeds)"


def _met(condition: bool) -> str:
    return "met" if condition else "**not met**"
