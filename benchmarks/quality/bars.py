"""The bars that the method is held to, each with what was measured: on prompts that the training never saw."""

from __future__ import annotations

import statistics
from typing import Any

from evaluation import SPLITS
from plan import BASELINES, MAIN

from hipa_deploy.train.evaluation.quality_report import BASE

Results = dict[str, dict[str, Any]]
LEAST_GAP, HF_RANGE = 0.9, (0.85, 1.15)


def bars_section(results: Results) -> str:
    """A list of the bars that can be judged by now, for HiPA as trained here and for the given adaptor."""
    lines = []
    for split in SPLITS:
        for name in ("shipped", MAIN):
            if name in results:
                lines += [
                    f"- {split}, {results[name]['title']}: {text}"
                    for text in of_one(results, name, split)
                ]
        lines += [f"- {split}: {text}" for text in against_others(results, split)]
    return "## Bars\n\n" + ("\n".join(lines) or "Nothing trained yet.")


def of_one(results: Results, name: str, split: str) -> list[str]:
    """KID gap and high-frequency ratio of one item."""
    reference, measured = results["references"], results[name]["splits"][split]["pooled"]
    base = reference["rows"][BASE][split]["pooled"]["kid"]
    floor = reference["rows"][reference["truth"]][split]["pooled"]["kid"]
    gap, ratio = (base - measured["kid"]) / (base - floor), measured["hf_ratio"]
    return [
        f"KID gap closed {gap:.0%}, at least {LEAST_GAP:.0%} asked: {_met(gap >= LEAST_GAP)}",
        f"high-frequency ratio {ratio:.2f}, {HF_RANGE[0]} to {HF_RANGE[1]} asked: "
        f"{_met(HF_RANGE[0] <= ratio <= HF_RANGE[1])}",
    ]


def against_others(results: Results, split: str) -> list[str]:
    """HiPA beside each baseline, by steps and by time, and beside itself without the high-frequency term."""
    if MAIN not in results:
        return []
    lines = []
    for name in (
        *(f"{baseline}{suffix}" for baseline in BASELINES for suffix in ("", "-time")),
        "no-hf",
    ):
        if name in results:
            verdicts = [_better(results, name, split, key) for key in ("kid", "distance")]
            verdicts += [_better_ratio(results, split)] if name == "no-hf" else []
            lines.append(f"HiPA against {results[name]['title']}: {'; '.join(verdicts)}")
    return lines


def _better(results: Results, name: str, split: str, key: str) -> str:
    """Lower is better; 'measurably' when every noise seed says so."""
    ours, theirs = (results[n]["splits"][split] for n in (MAIN, name))
    differences = [
        b[key] - a[key] for a, b in zip(ours["repeats"], theirs["repeats"], strict=True)
    ]  # the same prompts and noise on both sides
    word = {"kid": "KID-Lite0", "distance": "distance"}[key]
    return f"{word} {ours['pooled'][key]:.3f} against {theirs['pooled'][key]:.3f}, {_verdict(differences)}"


def _better_ratio(results: Results, split: str) -> str:
    ours, theirs = (results[n]["splits"][split] for n in (MAIN, "no-hf"))
    differences = [
        abs(b["hf_ratio"] - 1) - abs(a["hf_ratio"] - 1)
        for a, b in zip(ours["repeats"], theirs["repeats"], strict=True)
    ]
    values = f"high-frequency ratio {ours['pooled']['hf_ratio']:.3f} against {theirs['pooled']['hf_ratio']:.3f}"
    return f"{values}, {_verdict(differences)}"


def _verdict(differences: list[float]) -> str:
    """Of paired differences that are positive where HiPA is better."""
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    word = (
        "better" if min(differences) > 0 else "worse" if max(differences) < 0 else "not told apart"
    )
    return f"{word} (difference {mean:.3f} ± {spread:.3f} over {len(differences)} noise seeds)"


def _met(condition: bool) -> str:
    return "met" if condition else "**not met**"
