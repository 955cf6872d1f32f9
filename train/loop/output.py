"""What a training writes, and the run folder beside it: new, finished, or somebody's own.

Imports no torch, so that a command can ask before any slow work.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hipa_deploy.disk.files import refuse_to_overwrite
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA, read_metadata
from hipa_deploy.models.decoder_folder import DECODER_METADATA, read_decoder_metadata
from hipa_deploy.train.loop.identity import check_same_recipe, stored_recipe
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

LOCK = ".lock"
CHECKPOINT = "state.pt"
TRACKERS = "trackers"
FINISHED = "finished"  # earlier results of a run that was extended, by their number of steps
BEST = "best-step-"
# What a run folder holds. A folder of this name with anything else is somebody's own, unless it has
# a checkpoint, whose identity is compared when it is loaded.
CONTENT = {CHECKPOINT, "state.tmp", "samples", "tensorboard", TRACKERS, FINISHED, LOCK}
_OURS = {
    "samples": re.compile(r"step-\d{8}\.png"),
    "tensorboard": re.compile(r"events\.out\..*"),
}


def run_folder(out: Path) -> Path:
    """The folder of the checkpoint, scalars and samples of a training that writes ``out``."""
    return out.with_name(out.name + ".run")


def check_run_folder(folder: Path) -> None:
    """Check that a run folder is one, or is not there.

    Raises:
        HipaError: it is a file, or a folder of something else.

    """
    if not folder.exists() or _is_run_folder(folder):
        return
    raise HipaError(
        f"{folder} is needed for checkpoints, and is not a training's folder. "
        "Choose another output folder."
    )


def _is_run_folder(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if CHECKPOINT in names:
        return True
    if any(name not in CONTENT and not name.startswith(BEST) for name in names):
        return False
    for name, pattern in _OURS.items():
        held = (folder / name).iterdir() if (folder / name).is_dir() else ()
        if not all(pattern.fullmatch(path.name) for path in held):
            return False
    return True


def check_new_or_finished(out: Path) -> bool:
    """Whether ``out`` holds the result of a run whose run folder is there; otherwise it is new.

    Raises:
        HipaError: ``out`` is neither: it would be overwritten.

    """
    has_result = any((out / name).is_file() for name in (METADATA, DECODER_METADATA))
    if has_result and (run_folder(out) / CHECKPOINT).is_file():
        return True
    if has_result:
        raise HipaError(
            f"{out} exists and is not empty: it is a finished training whose run folder "
            f"{run_folder(out)} is gone, so that it cannot go on. Choose another name, or remove "
            "it first."
        )
    refuse_to_overwrite(out)
    check_run_folder(run_folder(out))
    return False


def check_output(out: Path, recipe: Recipe | DecoderRecipe) -> int:
    """Check that a training of ``recipe`` may write ``out``.

    Returns:
        How many steps the finished run in ``out`` has taken, which is to be extended; 0 where
        ``out`` is new.

    Raises:
        HipaError: ``out`` is something else, a finished run of another recipe, or one with nothing
            left to do.

    """
    if not check_new_or_finished(out):
        return 0
    taken, recorded = _finished(out, recipe)
    folder = run_folder(out)
    check_same_recipe(folder, recorded, stored_recipe(recipe), type(recipe))
    if recipe.steps <= taken:
        raise HipaError(
            f"{out} exists and is not empty: its run is finished after {taken} steps, and "
            f"{recipe.steps} were asked for. There is nothing to do. To go on from its last "
            f"checkpoint, ask for more steps (--steps {2 * taken}); for another run choose "
            "another output folder."
        )
    asked = _what_ends(recorded)
    if asked == _what_ends(stored_recipe(recipe)):
        raise HipaError(
            f"{out} exists and is not empty: its run stopped early, after {taken} of "
            f"{recipe.steps} steps. There is nothing to do. To go on from its last checkpoint, "
            f"ask for more steps than {recipe.steps}, or for another held_out.patience."
        )
    return taken


def _what_ends(recipe: dict[str, Any]) -> tuple[Any, ...]:
    """What decides when a run ends."""
    held_out = recipe.get("held_out") or {}
    return recipe.get("steps"), held_out.get("patience", 0), held_out.get("min_delta", 0.0)


def _finished(out: Path, recipe: Recipe | DecoderRecipe) -> tuple[int, dict[str, Any]]:
    """Steps and recipe of the result in ``out``."""
    is_adaptor = (out / METADATA).is_file()
    if is_adaptor != isinstance(recipe, Recipe):
        held = "an adaptor" if is_adaptor else "a decoder"
        raise HipaError(
            f"{out} exists and is not empty: it is {held}, and the recipe is of kind "
            f"{recipe.kind}. Choose another name, or remove it first."
        )
    record = read_metadata(out) if is_adaptor else read_decoder_metadata(out)
    return record.steps_trained, record.recipe


@contextmanager
def replacing(out: Path, steps: int) -> Iterator[None]:
    """Move a finished ``out`` into its run folder while a longer run's result is written.

    It is kept as finished/step-00001000. If the block fails it is moved back.

    Args:
        out: The folder to write.
        steps: How many steps the finished run took; 0 where ``out`` is new.

    """
    if not steps:
        yield
        return
    place = Path(os.path.realpath(out))
    holder = run_folder(out) / FINISHED
    holder.mkdir(parents=True, exist_ok=True)
    kept = holder / f"step-{steps:08d}"
    number = 1
    while kept.exists():  # nothing is overwritten, however it came there
        number += 1
        kept = holder / f"step-{steps:08d}-{number}"
    shutil.move(place, kept)
    try:
        yield
    except BaseException:
        shutil.move(kept, place)
        raise
