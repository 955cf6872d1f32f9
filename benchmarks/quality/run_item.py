"""One item of the quality benchmark: train, make images, measure, write result.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distillation import train_consistency, train_progressive
from evaluation import Split, load_references, make_references, measure_adaptor, splits
from items import FIRST, Item
from rich.console import Console
from safetensors import safe_open
from timing import spent_in, timed_training

from hipa_deploy.disk.files import write_file
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata
from hipa_deploy.train.average_adaptors import average_adaptors
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor

RESULT = "result.json"
QUICK_CAPTIONS = 4
# How KID-Lite0 is measured, as part of a report's identity: earlier reports kept those pairs.
KID = "without pairs of one prompt"
LEAST_STEPS = 10  # two for each phase of a progressive distillation from 25 steps


@dataclass(frozen=True)
class Setting:
    """What all items of a report share.

    Attributes:
        out: The report's folder.
        model: Diffusers folder of the base model.
        adaptor: Folder of the trained adaptor that the item 'shipped' measures.
        recipe: The recipe that the items change.
        repeats: Noise seeds for each held-out prompt.
        quick: A run with very few steps and images.
        data: Folder of real images for retrieval.
        cache: Folder of the teacher pairs' cache; None is the user's own.
        ingredients: Whether this is the set of ingredients, which measures variety and levels.
        captions: The largest number of captions of a split; None is all.
        start: Adaptor that trainings of HiPA start from; None is none.

    """

    out: Path
    model: Path
    adaptor: Path
    recipe: Recipe
    repeats: int
    quick: bool
    data: Path | None = None
    cache: Path | None = None
    ingredients: bool = False
    captions: int | None = None
    start: Path | None = None

    def folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of an item; None if it is not done, or measured another trained adaptor."""
        path = self.folder(name) / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

        # Only the item 'shipped' stores a hash: of the adaptor that it was given.
        measured = result.get("adaptor_sha256")
        if measured is not None and measured != file_sha256(self.adaptor / WEIGHTS):
            return None
        return result

    @property
    def identity(self) -> dict[str, Any]:
        """What the results depend on: all results of a report folder have the same."""
        identity: dict[str, Any] = {
            "kid": KID,
            "model": str(self.model),
            "recipe": self.recipe.model_dump(mode="json"),
            "repeats": self.repeats,
            "quick": self.quick,
            "data": str(self.data) if self.data else None,
        }
        # What older report folders do not name is none.
        if self.ingredients:
            identity["set"] = "ingredients"
        if self.captions is not None:
            identity["captions"] = self.captions
        if self.start is not None:
            identity["start_sha256"] = file_sha256(self.start / WEIGHTS)
        return identity

    def held_out(self) -> list[Split]:
        """The prompts to measure on."""
        most = QUICK_CAPTIONS if self.quick else self.captions
        return splits(self.model, self.repeats, most, levels=self.ingredients)


def run_item(item: Item, setting: Setting, console: Console) -> None:
    """Run one item and write its result; the same call resumes a stopped training.

    Raises:
        HipaError: An item that it needs is not done, or the training was stopped.

    """
    for name in item.needs:
        if setting.result(name) is None:
            raise HipaError(
                f"item {item.name} needs item {name}, which is not done. Run: --only {name}"
            )

    folder = setting.folder(item.name)
    held_out = setting.held_out()
    result = {"name": item.name, "title": item.title, "group": item.group, "method": item.method}
    if item.name == FIRST:
        result |= make_references(
            setting.recipe,
            setting.model,
            folder,
            held_out,
            cache=setting.cache,
            data=setting.data,
            variety=setting.ingredients,
        )
    else:
        adaptor, cost = _adaptor(item, setting, console)
        references = load_references(setting.folder(FIRST))
        measured = measure_adaptor(adaptor, setting.model, references, held_out, folder)
        result |= cost | {"splits": measured}
    write_json(folder / RESULT, result)


def matched_steps(item: Item, setting: Setting) -> int | None:
    """How many steps fit into the training time of the item that ``as_long_as`` names.

    Time is processor time: it measures the cost of a training even on a machine that does other
    work as well.

    Returns:
        The number of steps; None for an item whose budget is a number of steps.

    """
    if item.as_long_as is None or item.pace is None:
        return None
    budget = setting.result(item.as_long_as)
    pace = setting.result(item.pace)
    if budget is None or pace is None:
        raise HipaError(f"item {item.name} needs items {item.as_long_as} and {item.pace} first.")
    steps = round(budget["cost"]["cpu_seconds"] / pace["cost"]["cpu_seconds_a_step"])
    return max(LEAST_STEPS, steps)


def _adaptor(item: Item, setting: Setting, console: Console) -> tuple[Path, dict[str, Any]]:
    """The item's adaptor, trained unless it exists, and the part of the result about its cost."""
    folder = setting.folder(item.name)
    folder.mkdir(parents=True, exist_ok=True)

    # An adaptor that was trained elsewhere: its metadata say how long, but not how fast.
    if item.method == "adaptor":
        metadata = read_metadata(setting.adaptor, setting.model)
        batch = int(metadata.recipe.get("batch", 0))
        known_cost = {
            "trainable_parameters": parameters(setting.adaptor),
            "steps": metadata.steps_trained,
            "images_seen": metadata.steps_trained * batch,
        }
        sha256 = file_sha256(setting.adaptor / WEIGHTS)
        return setting.adaptor, {"cost": known_cost, "adaptor_sha256": sha256}

    adaptor = folder / "adaptor"
    if item.method == "average":
        return _averaged(item, setting, adaptor)

    recipe = item.recipe(setting.recipe, matched_steps(item, setting))
    if not adaptor.exists():
        _train(item, recipe, setting, adaptor, console)

    # The first step of each sitting is not timed, so the total is the mean times the steps.
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


def _averaged(item: Item, setting: Setting, out: Path) -> tuple[Path, dict[str, Any]]:
    """The average of other items' adaptors, and the sum of their costs."""
    if not out.exists():
        average_adaptors([setting.folder(name) / "adaptor" for name in item.of], out)
    cost: dict[str, Any] = {"trainable_parameters": parameters(out)}
    for name in item.of:
        result = setting.result(name)
        assert result is not None  # run_item has checked the item's needs
        for key in ("steps", "images_seen", "wall_seconds", "cpu_seconds"):
            cost[key] = cost.get(key, 0) + result["cost"][key]
    return out, {"cost": cost, "left_out": read_metadata(out).recipe["average"]["left_out"]}


def _train(item: Item, recipe: Recipe, setting: Setting, out: Path, console: Console) -> None:
    if item.method == "consistency":
        train_consistency(recipe, setting.model, out, cache=setting.cache, console=console)
    elif item.method == "progressive":
        train_progressive(recipe, setting.model, out, cache=setting.cache, console=console)
    else:
        with timed_training():
            train_adaptor(
                recipe,
                setting.model,
                out,
                initial_adaptor=setting.start,
                cache=setting.cache,
                console=console,
            )


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON; a write that fails leaves no partial file."""
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def parameters(adaptor: Path) -> int:
    """How many numbers the weights of an adaptor folder have."""
    total = 0
    with safe_open(adaptor / WEIGHTS, "numpy") as file:
        for name in file.keys():  # noqa: SIM118  (the file is no dictionary)
            total += math.prod(file.get_slice(name).get_shape())
    return total
