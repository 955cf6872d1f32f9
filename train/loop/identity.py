"""Which run a folder holds: what a run that goes on must have in common with its start.

Imports no torch, so that a command can ask before any slow work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError, as_line, brief
from hipa_deploy.train.recipes.recipe import DecoderRecipe, Recipe

# Settings that a run may change when it goes on: they do not decide what a step does. Prompts,
# real images and a scorer are compared by their hash instead, wherever their files lie.
CHANGEABLE_SETTINGS = (
    "steps",
    "checkpoint_every",
    "sample_every",
    "samples",
    "gradient_checkpointing",
    "micro_batch",
    "written",
    "prompts",
    "prompts_column",
    "latent_discriminator.real_images",
    "alignment.scorer",
)
CHANGEABLE_TABLE = "held_out."  # it measures the steps, and changes none
# The parts of a run's identity beside its recipe, and what a message calls another value of each.
OTHER_IDENTITY = {
    "base_unet_sha256": "another base model",
    "base_vae_sha256": "another VAE",
    "adaptor_sha256": "another adaptor",
    "initial_sha256": "another adaptor to start from",
    "prompts_sha256": "other prompts",
    "loras": "other LoRAs, or at other scales",
    "embeddings": "other embeddings",
}
# The same of what an older run does not know; it goes on.
FURTHER_IDENTITY = {
    "schedule": "another noise schedule or prediction type (scheduler_config.json)",
    "text_encoders_sha256": "another text encoder",
    "decoding_vae_sha256": "another VAE",
    "source_prompts_sha256": "other prompts in source.prompts",
    "source_images_sha256": "other images or captions in source.images",
    "real_images_sha256": "other images or captions in latent_discriminator.real_images",
    "scorer": "another alignment.scorer",
}
# What an older run did otherwise: its checkpoint lacks the key, and it does not go on.
REPLACED = {
    "edit_noise": "edits of the teacher's images by the very noise that these were made of, which "
    "changes them too little",
}
# Keys of a recipe that are paths, with their table.
PATHS = (
    (None, "prompts"),
    ("source", "prompts"),
    ("source", "images"),
    ("latent_discriminator", "real_images"),
    ("held_out", "prompts"),
    ("alignment", "scorer"),
)
MAY_CHANGE = (
    "A run that goes on may change steps, checkpoint_every, sample_every, samples, micro_batch, "
    "gradient_checkpointing, written and [held_out]"
)


def check_same_run(
    folder: Path,
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    kind: type[Recipe | DecoderRecipe],
) -> None:
    """Check that a stored run is the one that is to go on.

    Args:
        folder: of the run, for messages.
        stored: its identity: ``recipe``, and keys of OTHER_IDENTITY and FURTHER_IDENTITY.
        now: the identity of the training that was asked for.
        kind: of the recipe.

    Raises:
        HipaError: it is another run; the message names the first difference, and says what may
            differ.

    """
    for key, other in OTHER_IDENTITY.items():
        # What a run of an older version does not know is none.
        if (stored.get(key) or None) != (now.get(key) or None):
            raise _another(folder, f"was started with {other}")
    check_same_recipe(folder, stored["recipe"], now["recipe"], kind)
    for key, other in FURTHER_IDENTITY.items():
        if key in stored and stored[key] != now.get(key):
            raise _another(folder, f"was started with {other}")


def check_not_replaced(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a checkpoint is not of a training that is done otherwise now.

    Args:
        folder: of the run, for messages.
        stored: the checkpoint's identity.
        now: the identity of the training that was asked for.

    Raises:
        HipaError: it is; the message says what is done otherwise.

    """
    for key, before in REPLACED.items():
        if now.get(key) is not None and stored.get(key) is None:
            raise HipaError(
                f"run folder {folder} was started with {before}. This version does so no more, and "
                "the run cannot go on. Choose another output folder. hipa-train --from starts from "
                "what an adaptor has learned."
            )


def check_same_recipe(
    folder: Path,
    stored: dict[str, Any],
    now: dict[str, Any],
    kind: type[Recipe | DecoderRecipe],
) -> None:
    """Check the settings of two recipes one by one, so that a message can name the first change.

    Raises:
        HipaError: a setting differs that may not.

    """
    with as_line(f"checkpoint {folder / 'state.pt'} is damaged", f"Remove {folder}."):
        before = _flat_recipe(stored, kind)
    after = _flat_recipe(now, kind)
    for key in sorted(before.keys() | after.keys()):
        may_change = key in CHANGEABLE_SETTINGS or key.startswith(CHANGEABLE_TABLE)
        if may_change or before.get(key) == after.get(key):
            continue
        change = f"{shown(key)} was {_text(before.get(key))}, is {_text(after.get(key))}"
        raise _another(folder, f"has another recipe: {change}")


def stored_recipe(recipe: Recipe | DecoderRecipe) -> dict[str, Any]:
    """The recipe as a result stores it: paths are shortened to their file names.

    Folders are of no use to another user, and a run whose files were moved must still go on.
    """
    values: dict[str, Any] = recipe.model_dump()
    for table, key in PATHS:
        holder = values if table is None else values.get(table)
        if holder and holder.get(key):
            holder[key] = Path(holder[key]).name
    return values


def _another(folder: Path, why: str) -> HipaError:
    return HipaError(
        f"run folder {folder} {why}. {MAY_CHANGE}. For another run choose another output folder, "
        "or remove this one."
    )


def _flat_recipe(recipe: dict[str, Any], kind: type[Recipe | DecoderRecipe]) -> dict[str, Any]:
    """A stored recipe as 'table.key' -> JSON value, with defaults for settings that it lacks.

    A setting that was introduced after the recipe was stored has its default, so that older runs
    go on. A recipe with settings that exist no more does not validate, and stays as it is.
    """
    with suppress(ValidationError):
        recipe = kind.model_validate(recipe).model_dump(mode="json")
    # Through JSON and back: a tuple and the list that was stored for it are then equal.
    return flat(json.loads(json.dumps(recipe)))


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with keys such as 'loss.hf_weight'."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def _text(value: Any) -> str:
    """A setting's value for a message, as it stands in a recipe."""
    return shown(value) if isinstance(value, str) else brief(value)
