"""report.md and its pictures from the results that exist."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bars import bars_section
from evaluation import LOW_OF_MANY, LOW_OF_ONE, SPLITS, load_references
from item import Setting
from plan import CONSISTENCY_RATE, FIRST, Item

from hipa_deploy.files import write_file
from hipa_deploy.train.evaluation.figures import (
    new_figure,
    premise_picture,
    samples_picture,
    save_figure,
    save_picture,
    spectra_figure,
)
from hipa_deploy.train.evaluation.quality_report import BASE, reference_teacher

GROUPS = {
    "main": "HiPA",
    "baselines": "Baselines, same pairs, same adaptor",
    "ablations": "Ablations",
    "sizes": "Ranks and presets",
    "seeds": "Another training seed",
}
LEAST_SHOWN = (
    -0.5
)  # of the plot of gaps: what lies far below the base would squeeze the rest, and is a number
NUMBERS = {
    "kid": "KID-Lite0",
    "distance": "distance",
    "hf_ratio": "HF ratio",
    "recall@1": "R@1",
    "recall@5": "R@5",
}
PICTURED = ("shipped", "hipa", "latent-mse", "consistency", "progressive")


def write_report(setting: Setting, items: list[Item]) -> Path:
    """report.md with what is done so far; pictures as soon as the references are."""
    results = {
        item.name: result for item in items if (result := setting.result(item.name)) is not None
    }
    text = render(setting, items, results)
    if FIRST in results:
        text += "\n" + pictures(setting, results)
    write_file(setting.out / "report.md", text.encode())
    return setting.out / "report.md"


def render(setting: Setting, items: list[Item], results: dict[str, dict[str, Any]]) -> str:
    """The report's text but for its pictures."""
    missing = [item.name for item in items if item.name not in results]
    parts = ["# Quality of one-step adaptors on the embedded model", conditions(setting, results)]
    if setting.quick:
        parts.append("**A quick run: it shows that the benchmark runs. Its numbers mean nothing.**")
    if missing:
        parts.append(f"Not done yet: {', '.join(missing)}.")
    if FIRST in results:
        parts += [bars_section(results), *(quality_section(split, results) for split in SPLITS)]
    parts.append(cost_section(results))
    return "\n\n".join(parts) + "\n"


def conditions(setting: Setting, results: dict[str, dict[str, Any]]) -> str:
    """What was measured, and how to read it."""
    recipe, teacher, reference = (
        setting.recipe,
        setting.recipe.teacher,
        reference_teacher(setting.recipe.teacher),
    )
    retrieval = results.get(FIRST, {}).get("retrieval", "not done yet")
    return (
        f"Teacher: {reference.sampler}, {reference.steps} steps, guidance {teacher.guidance:g}; of the training "
        f"pairs: {teacher.sampler}, {teacher.steps} steps. Training: {recipe.steps} steps of {recipe.batch} of "
        f"{teacher.pairs} pairs, AdamW {recipe.optimiser.learning_rate:g} (latent consistency distillation "
        f"{CONSISTENCY_RATE:g}). Every row has the same held-out prompts and the same {setting.repeats} noise seeds "
        "for each; ± is the standard deviation over those seeds. KID-Lite0 is measured to the teacher's images from "
        "other noise, without pairs of images of one prompt: the teacher's own row is its floor. Distance (DISTS-like) "
        "and high-frequency energy ratio are measured to the teacher's images from the same noise. R@1 and R@5: "
        "caption retrieval by own heads, not CLIP; "
        f"{retrieval}. KID-Lite0 and distance look at features of the same network as the perceptual term does: a loss "
        "with that term has an advantage."
    )


def quality_section(split: str, results: dict[str, dict[str, Any]]) -> str:
    """One table of a split."""
    reference = results[FIRST]
    gap = _gap(reference, split)
    keys = [key for key in NUMBERS if key in reference["rows"][BASE][split]["pooled"]]
    head = ["", *(NUMBERS[key] for key in keys), "KID gap closed"]
    rows = [
        [name, *_cells(row[split], keys), gap(row[split])]
        for name, row in reference["rows"].items()
    ]
    if split in reference.get("ceiling", {}):
        ceiling = reference["ceiling"][split]
        rows.append(
            [
                "real images (ceiling)",
                *(f"{ceiling[k]:.2f}" if k in ceiling else "" for k in keys),
                "",
            ]
        )
    for group, title in GROUPS.items():
        members = [r for r in results.values() if r.get("group") == group]
        rows += [[f"**{title}**", *[""] * (len(head) - 1)]] if members else []
        rows += [
            [r["title"], *_cells(r["splits"][split], keys), gap(r["splits"][split])]
            for r in members
        ]
    return f"## {split.capitalize()}\n\n{table(head, rows)}"


def cost_section(results: dict[str, dict[str, Any]]) -> str:
    """What each training took."""
    head = ["", "trainable parameters", "steps", "images seen", "seconds", "processor seconds"]
    rows = []
    for result in results.values():
        if cost := result.get("cost"):
            times = [
                f"{cost[k]:.0f}" if k in cost else "not timed"
                for k in ("wall_seconds", "cpu_seconds")
            ]
            counts = [f"{cost[k]:,}" for k in ("trainable_parameters", "steps", "images_seen")]
            rows.append([result["title"], *counts, *times])
    note = (
        "Time is that of the training steps alone; 'as much time' means as many processor seconds as HiPA's training, "
        "since other work on the machine stretches seconds and not those. Teacher pairs are made once, for all."
    )
    return f"## Cost\n\n{note}\n\n{table(head, rows)}"


def pictures(setting: Setting, results: dict[str, dict[str, Any]]) -> str:
    """Draw the pictures; the Markdown that shows them."""
    split = next(iter(SPLITS))
    reference = load_references(setting.folder(FIRST))[split]
    truth = reference.truth
    trained = {
        results[name]["title"]: np.load(setting.folder(name) / "images.npz")[split]
        for name in PICTURED
        if name in results
    }
    shown = {truth: reference.images[truth], BASE: reference.images[BASE]} | trained
    spectra_figure(setting.out / "spectra.png", shown, truth)
    save_picture(
        setting.out / "premise.png",
        premise_picture(reference.images[BASE], reference.images[truth]),
    )
    save_picture(setting.out / "samples.png", samples_picture(shown))
    gap_figure(setting.out / "gap.png", results)
    return PICTURES.format(columns="; ".join(shown), one=LOW_OF_ONE, many=LOW_OF_MANY)


def gap_figure(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """Bars of the KID gap closed on each split, with the spread over the noise seeds."""
    trained = [r for r in results.values() if "splits" in r]
    figure, axes = new_figure(9, 1.5 + 0.45 * len(trained))
    height = 0.8 / len(SPLITS)
    for n, split in enumerate(SPLITS):
        share = _share(results[FIRST], split)
        repeats = [[share(numbers) for numbers in r["splits"][split]["repeats"]] for r in trained]
        middle = [share(r["splits"][split]["pooled"]) for r in trained]
        places = [k + n * height for k in range(len(trained))]
        axes.barh(places, middle, height, xerr=[_spread(values) for values in repeats], label=split)
        for place, value in zip(places, middle, strict=True):
            if value < LEAST_SHOWN:
                axes.text(
                    LEAST_SHOWN + 0.01,
                    place,
                    f"{value:.0%}",
                    va="center",
                    color="white",
                    fontsize="small",
                )
    axes.set_xlim(left=max(axes.get_xlim()[0], LEAST_SHOWN))
    axes.set_yticks(
        [k + height / 2 for k in range(len(trained))],
        [r["title"] for r in trained],
        fontsize="small",
    )
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="KID gap closed: 0 is the base in one step, 1 the teacher")
    axes.legend(
        fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=len(SPLITS)
    )  # off the bars
    save_figure(path, figure)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(measured: dict[str, Any], keys: list[str]) -> list[str]:
    cells = []
    for key in keys:
        spread = _spread([numbers[key] for numbers in measured["repeats"]])
        digits = 2 if key.startswith("recall") else 3
        cells.append(f"{measured['pooled'][key]:.{digits}f} ± {spread:.{digits}f}")
    return cells


def _gap(reference: dict[str, Any], split: str) -> Callable[[dict[str, Any]], str]:
    share = _share(reference, split)
    return lambda measured: f"{share(measured['pooled']):.0%}"


def _share(reference: dict[str, Any], split: str) -> Callable[[dict[str, float]], float]:
    """How much of the way from the base's KID to the teacher's, both over all seeds."""
    base = reference["rows"][BASE][split]["pooled"]["kid"]
    floor = reference["rows"][reference["truth"]][split]["pooled"]["kid"]
    return lambda numbers: (base - numbers["kid"]) / (base - floor)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


PICTURES = """## Pictures, held-out pairs

![KID gap closed](gap.png)

![Radial power spectra](spectra.png)

![The premise](premise.png)

The paper's premise, left to right: one step of the base model; the teacher; {one}; {many}. The table's rows of those
names measure the same.

![Samples](samples.png)

Columns: {columns}.
"""
