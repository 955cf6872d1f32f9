"""report.md and its pictures, from the results that exist so far."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bars import bars_section
from criteria import criteria_section, split_names
from evaluation import LOW_OF_MANY, LOW_OF_ONE, load_references
from items import CONSISTENCY_RATE, FIRST, Item
from run_item import Setting

from hipa_deploy.disk.files import write_file
from hipa_deploy.train.evaluation.evaluation_request import reference_teacher
from hipa_deploy.train.evaluation.figures import (
    new_figure,
    premise_picture,
    samples_picture,
    save_figure,
    save_picture,
    spectra_figure,
)
from hipa_deploy.train.evaluation.quality_report import BASE

Result = dict[str, Any]
"""What result.json of an item holds."""
GROUPS = {
    "main": "HiPA",
    "ingredients": "HiPA and more",
    "baselines": "Baselines, same pairs, same adaptor",
    "ablations": "Ablations",
    "sizes": "Ranks and presets",
    "seeds": "Another training seed",
}
# Left end of the plot of gaps. A result far below the base would squeeze all others; its bar is cut
# here and its number is written on it.
LEAST_SHOWN = -0.5
NUMBERS = {
    "kid": "KID-Lite0",
    "distance": "distance",
    "hf_ratio": "HF ratio",
    "recall@1": "R@1",
    "recall@5": "R@5",
    "variety": "variety",
}
PICTURED = (
    "shipped", "hipa", "score", "score-judge", "paper-loss", "latent-mse", "consistency",
    "progressive",
)  # fmt: skip


def write_report(setting: Setting, items: list[Item]) -> Path:
    """Write report.md and numbers.csv with the items that are done, and pictures beside them."""
    results = {}
    for item in items:
        result = setting.result(item.name)
        if result is not None:
            results[item.name] = result

    # The pictures need the teacher's images, which are among the references.
    text = render(setting, items, results)
    if FIRST in results:
        text += "\n" + pictures(setting, results)
        write_file(setting.out / "numbers.csv", numbers_csv(results).encode())
    write_file(setting.out / "report.md", text.encode())
    return setting.out / "report.md"


def render(setting: Setting, items: list[Item], results: dict[str, Result]) -> str:
    """The report's text without its pictures.

    Args:
        setting: What all items share.
        items: All items of the run.
        results: Result of each item that is done, by its name.

    """
    # A warning comes before any number that it is about.
    parts = ["# Quality of one-step adaptors on the embedded model", conditions(setting, results)]
    if setting.quick:
        parts.append("**A quick run: it shows that the benchmark runs. Its numbers mean nothing.**")
    missing = [item.name for item in items if item.name not in results]
    if missing:
        parts.append(f"Not done yet: {', '.join(missing)}.")
    if FIRST in results:
        parts.append(bars_section(results) if setting.ingredients else criteria_section(results))
        for split in split_names(results):
            parts.append(quality_section(split, results))
    parts.append(cost_section(results))
    return "\n\n".join(parts) + "\n"


def conditions(setting: Setting, results: dict[str, Result]) -> str:
    """What was measured, and how to read it."""
    recipe = setting.recipe
    teacher = recipe.teacher
    reference = reference_teacher(teacher)
    retrieval = results.get(FIRST, {}).get("retrieval", "not done yet")
    return (
        f"Teacher: {reference.sampler}, {reference.steps} steps, guidance {teacher.guidance:g}; "
        f"of the training pairs: {teacher.sampler}, {teacher.steps} steps. "
        f"Training: {recipe.steps} steps of {recipe.batch} of {teacher.pairs} pairs, "
        f"AdamW {recipe.optimiser.learning_rate:g} (latent consistency distillation "
        f"{CONSISTENCY_RATE:g}). Every row has the same held-out prompts and the same "
        f"{setting.repeats} noise seeds for each; ± is the standard deviation over those seeds. "
        "KID-Lite0 is measured to the teacher's images from other noise, without pairs of images "
        "of one prompt: the teacher's own row is its floor. Distance (DISTS-like) and "
        "high-frequency energy ratio are measured to the teacher's images from the same noise. "
        f"R@1 and R@5: caption retrieval by own heads, not CLIP; {retrieval}. KID-Lite0 and "
        "distance look at features of the same network as the perceptual term does: a loss with "
        "that term has an advantage."
    )


def quality_section(split: str, results: dict[str, Result]) -> str:
    """The table of one split: references, then the items by group."""
    reference = results[FIRST]
    gap = _gap_text(reference, split)
    keys = [key for key in NUMBERS if key in reference["rows"][BASE][split]["pooled"]]
    titles = [NUMBERS[key] for key in keys]
    head = ["", *titles, "KID gap closed"]

    rows = []
    for name, row in reference["rows"].items():
        rows.append([name, *_cells(row[split], keys), gap(row[split])])

    # Real images have a recall alone: the other numbers compare with the teacher's images.
    ceiling = reference.get("ceiling", {}).get(split)
    if ceiling is not None:
        cells = [f"{ceiling[key]:.2f}" if key in ceiling else "" for key in keys]
        rows.append(["real images (ceiling)", *cells, ""])

    for group, title in GROUPS.items():
        members = [result for result in results.values() if result.get("group") == group]
        if members:
            rows.append([f"**{title}**", *[""] * (len(head) - 1)])
        for result in members:
            measured = result["splits"][split]
            rows.append([result["title"], *_cells(measured, keys), gap(measured)])
    return f"## {split.capitalize()}\n\n{table(head, rows)}"


def numbers_csv(results: dict[str, Result]) -> str:
    """Every number of every item: one line for each item, split, noise seed and number.

    The noise seed 'all' is the number of all images together.
    """
    lines = ["item,split,noise_seed,number,value"]
    rows = {FIRST + ": " + name: row for name, row in results[FIRST]["rows"].items()}
    for name, result in results.items():
        if "splits" in result:
            rows[name] = result["splits"]
    for name, row in rows.items():
        for split, measured in row.items():
            groups = {"all": measured["pooled"]}
            for seed, numbers in enumerate(measured["repeats"]):
                groups[str(seed)] = numbers
            for seed, numbers in groups.items():
                for key, value in numbers.items():
                    lines.append(f'"{name}","{split}",{seed},{key},{value:.6g}')
    return "\n".join(lines) + "\n"


def cost_section(results: dict[str, Result]) -> str:
    """What each training took."""
    head = ["", "trainable parameters", "steps", "images seen", "seconds", "processor seconds"]
    rows = []
    for result in results.values():
        cost = result.get("cost")
        if not cost:
            continue
        row = [result["title"]]
        for key in ("trainable_parameters", "steps", "images_seen"):
            row.append(f"{cost[key]:,}")
        for key in ("wall_seconds", "cpu_seconds"):
            row.append(f"{cost[key]:.0f}" if key in cost else "not timed")
        rows.append(row)
    note = (
        "Time is that of the training steps alone; 'as much time' means as many processor seconds "
        "as HiPA's training, since other work on the machine stretches seconds and not those. "
        "Teacher pairs are made once, for all."
    )
    return f"## Cost\n\n{note}\n\n{table(head, rows)}"


def pictures(setting: Setting, results: dict[str, Result]) -> str:
    """Draw the pictures of the first split; returns the Markdown that shows them."""
    split = split_names(results)[0]
    reference = load_references(setting.folder(FIRST))[split]
    truth_images = reference.images[reference.truth]
    base_images = reference.images[BASE]
    shown = {reference.truth: truth_images, BASE: base_images}
    for name in PICTURED:
        if name in results:
            images = np.load(setting.folder(name) / "images.npz")
            shown[results[name]["title"]] = images[split]

    spectra_figure(setting.out / "spectra.png", shown, reference.truth)
    save_picture(setting.out / "premise.png", premise_picture(base_images, truth_images))
    save_picture(setting.out / "samples.png", samples_picture(shown))
    gap_figure(setting.out / "gap.png", results)
    return PICTURES.format(columns="; ".join(shown), one=LOW_OF_ONE, many=LOW_OF_MANY)


def gap_figure(path: Path, results: dict[str, Result]) -> None:
    """Horizontal bars of the KID gap closed on each split, with the spread over the noise seeds."""
    trained = [result for result in results.values() if "splits" in result]
    figure, axes = new_figure(9, 1.5 + 0.45 * len(trained))
    names = split_names(results)
    height = 0.8 / len(names)
    for number, split in enumerate(names):
        share = _share(results[FIRST], split)
        pooled = []
        spreads = []
        for result in trained:
            measured = result["splits"][split]
            pooled.append(share(measured["pooled"]))
            spreads.append(_spread([share(numbers) for numbers in measured["repeats"]]))
        places = [place + number * height for place in range(len(trained))]
        axes.barh(places, pooled, height, xerr=spreads, label=split)
        for place, value in zip(places, pooled, strict=True):
            if value < LEAST_SHOWN:
                _label_cut_bar(axes, place, value)

    axes.set_xlim(left=max(axes.get_xlim()[0], LEAST_SHOWN))
    middles = [place + height / 2 for place in range(len(trained))]
    titles = [result["title"] for result in trained]
    axes.set_yticks(middles, titles, fontsize="small")
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="KID gap closed: 0 is the base in one step, 1 the teacher")

    # Above the axes, where the legend hides no bar.
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    axes.legend(fontsize="small", ncols=len(names), **above)
    save_figure(path, figure)


def _label_cut_bar(axes: Any, place: float, value: float) -> None:
    """Write the value of a bar that reaches beyond the left end of the plot."""
    left = LEAST_SHOWN + 0.01
    axes.text(left, place, f"{value:.0%}", va="center", color="white", fontsize="small")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(measured: Result, keys: list[str]) -> list[str]:
    """'value ± spread' of each number of an image set."""
    cells = []
    for key in keys:
        spread = _spread([numbers[key] for numbers in measured["repeats"]])
        digits = 2 if key.startswith("recall") else 3
        cells.append(f"{measured['pooled'][key]:.{digits}f} ± {spread:.{digits}f}")
    return cells


def _gap_text(reference: Result, split: str) -> Callable[[Result], str]:
    """A function from the numbers of an image set to its KID gap closed, in percent."""
    share = _share(reference, split)
    return lambda measured: f"{share(measured['pooled']):.0%}"


def _share(reference: Result, split: str) -> Callable[[dict[str, float]], float]:
    """A function from numbers to the share of the KID gap between base and teacher they close.

    The gap itself is that over all seeds, also where the numbers are those of one seed.
    """
    base = reference["rows"][BASE][split]["pooled"]["kid"]
    floor = reference["rows"][reference["truth"]][split]["pooled"]["kid"]
    return lambda numbers: (base - numbers["kid"]) / (base - floor)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


PICTURES = """## Pictures, held-out pairs

![KID gap closed](gap.png)

![Radial power spectra](spectra.png)

![The premise](premise.png)

The paper's premise, left to right: one step of the base model; the teacher; \
{one}; {many}. The table's rows of those
names measure the same.

![Samples](samples.png)

Columns: {columns}.
"""
