"""Run one item of the plan: train, make images, measure, write result.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baselines import train_consistency, train_progressive
from evaluation import load_references, make_references, measure_adaptor, splits
from plan import FIRST, Item
from rich.console import Console
from safetensors import safe_open
from timing import spent_in, timed_training

from hipa_deploy.errors import HipaError
from hipa_deploy.files import write_file
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor

RESULT = "result.json"
QUICK_CAPTIONS = 4
KID = "without pairs of one prompt"  # how KID-Lite0 is measured; reports from before kept those
LEAST_STEPS = 10  # two for each phase of a progressive distillation from 25 steps


@dataclass(frozen=True)
class Setting:
    """What all items of a report share."""

    out: Path
    model: Path
    adaptor: Path
    recipe: Recipe
    repeats: int
    quick: bool
    data: Path | None = None
    cache: Path | None = None

    def folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def result(self, name: str) -> dict[str, Any] | None:
        """What an item wrote, or None: not done yet, or of another given adaptor."""
        path = self.folder(name) / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        given = result.get("adaptor_sha256")
        return result if given is None or given == file_sha256(self.adaptor / WEIGHTS) else None

    @property
    def identity(self) -> dict[str, Any]:
        """What the results depend on: a report folder keeps to one."""
        return {
            "kid": KID,
            "model": str(self.model),
            "recipe": self.recipe.model_dump(mode="json"),
            "repeats": self.repeats,
            "quick": self.quick,
            "data": str(self.data) if self.data else None,
        }


def run_item(item: Item, setting: Setting, console: Console) -> None:
    """Write the item's result; the same call resumes a stopped training.

    Raises:
        HipaError: what it needs is not done yet, or the training was stopped.

    """
    for name in item.needs:
        if setting.result(name) is None:
            raise HipaError(
                f"item {item.name} needs item {name}, which is not done. Run: --only {name}"
            )
    folder = setting.folder(item.name)
    held_out = splits(setting.model, setting.repeats, QUICK_CAPTIONS if setting.quick else None)
    if item.name == FIRST:
        result = make_references(
            setting.recipe, setting.model, folder, held_out, cache=setting.cache, data=setting.data
        )
    else:
        adaptor, cost = _adaptor(item, setting, console)
        references = load_references(setting.folder(FIRST))
        result = cost | {
            "splits": measure_adaptor(adaptor, setting.model, references, held_out, folder)
        }
    describes = {"name": item.name, "title": item.title, "group": item.group, "method": item.method}
    write_json(folder / RESULT, describes | result)


def matched_steps(item: Item, setting: Setting) -> int | None:
    """How many steps fit into the time of the item named by ``as_long_as``; None where steps are the budget.

    Time is that of the processor: it says what a training costs on a machine that does other work as well.
    """
    if item.as_long_as is None or item.pace is None:
        return None
    budget, pace = setting.result(item.as_long_as), setting.result(item.pace)
    if budget is None or pace is None:
        raise HipaError(f"item {item.name} needs items {item.as_long_as} and {item.pace} first.")
    return max(
        LEAST_STEPS, round(budget["cost"]["cpu_seconds"] / pace["cost"]["cpu_seconds_a_step"])
    )


def _adaptor(item: Item, setting: Setting, console: Console) -> tuple[Path, dict[str, Any]]:
    """The item's adaptor, trained unless it is there, and what it cost."""
    folder = setting.folder(item.name)
    folder.mkdir(parents=True, exist_ok=True)
    if item.method == "adaptor":
        metadata = read_metadata(setting.adaptor, setting.model)
        cost = {
            "trainable_parameters": parameters(setting.adaptor),
            "steps": metadata.steps_trained,
        }
        images = metadata.steps_trained * int(metadata.recipe.get("batch", 0))
        sha256 = file_sha256(setting.adaptor / WEIGHTS)
        return setting.adaptor, {"cost": cost | {"images_seen": images}, "adaptor_sha256": sha256}
    recipe = item.recipe(setting.recipe, matched_steps(item, setting))
    adaptor = folder / "adaptor"
    if not adaptor.exists():
        _train(item, recipe, setting, adaptor, console)
    spent = spent_in(folder / "adaptor.run")
    cost = {
        "trainable_parameters": parameters(adaptor),
        "steps": recipe.steps,
        "images_seen": recipe.steps * recipe.batch,
        "wall_seconds": spent.wall / spent.steps * recipe.steps,
        "cpu_seconds": spent.cpu / spent.steps * recipe.steps,
        "cpu_seconds_a_step": spent.cpu / spent.steps,
        "timed": asdict(spent),
    }
    return adaptor, {"cost": cost, "recipe": recipe.model_dump(mode="json")}


def _train(item: Item, recipe: Recipe, setting: Setting, out: Path, console: Console) -> None:
    shared = {"cache": setting.cache, "console": console}
    if item.method == "consistency":
        train_consistency(recipe, setting.model, out, **shared)
    elif item.method == "progressive":
        train_progressive(recipe, setting.model, out, **shared)
    else:
        with timed_training():
            train_adaptor(recipe, setting.model, out, **shared)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Indented, whole or not at all."""
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def parameters(adaptor: Path) -> int:
    """How many weights an adaptor folder holds."""
    with safe_open(adaptor / WEIGHTS, "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
