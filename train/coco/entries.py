"""The rows of a table: what makes the images of each, and what they depend on.

Shapes: N images, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.models.adaptor_folder import read_metadata, weights_sha256
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.style import Style
from hipa_deploy.models.weights.weight_identity import weights_identity
from hipa_deploy.train.data.teacher_pairs import teacher_latents
from hipa_deploy.train.evaluation.contenders import (
    BundleContender,
    Contender,
    ImageFolder,
    OtherAdaptor,
)
from hipa_deploy.train.evaluation.image_folder import find_images
from hipa_deploy.train.evaluation.quality import decoded_images
from hipa_deploy.train.evaluation.quality_report import ADAPTED, teacher_row
from hipa_deploy.train.evaluation.rivals import (
    Maker,
    contender_facts,
    open_contender,
    style_with_lora,
)
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import one_step_model
from hipa_deploy.train.recipes.recipe import TeacherSettings


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        row: its name.
        identity: what its images depend on beside prompts and seeds, as JSON values.
        load_maker: loads what makes the images; None where they exist already.
        files: the images that exist already, in the prompts' order.
        notes: what a reader should know, a sentence each.

    """

    row: str
    identity: dict[str, Any]
    load_maker: Callable[[], Maker] | None = None
    files: Sequence[Path] = ()
    notes: tuple[str, ...] = ()


# The settings of a teacher that its images depend on.
TEACHER_KEYS = ("sampler", "steps", "guidance", "mixed_precision")


@dataclass(frozen=True)
class Models:
    """What the rows have in common.

    Attributes:
        folder: Diffusers folder of the base model.
        style: LoRAs and embeddings that are added to it.
        text: How prompts are encoded.
        size: Height and width of the images in pixels; None is what the model was made for.

    """

    folder: Path
    style: Style
    text: TextSettings
    size: tuple[int, int] | None = None

    def identity(self) -> dict[str, Any]:
        """What images of the base model depend on."""
        config = ModelConfig.read(self.folder)
        parts = ("unet", "vae", *config.text_parts)
        known: dict[str, Any] = {
            "model": {part: weights_identity(self.folder / part) for part in parts},
            "schedule": config.schedule,
            "style": self.style_info(self.style),
            "text": self.text.model_dump(mode="json"),
        }
        # Measurements from before there were sizes go on.
        if self.size is not None and self.size != config.native_size:
            known["size"] = list(self.size)
        return known

    def load(self) -> DiffusionModel:
        """The base model with its style."""
        return DiffusionModel.load(self.folder, style=self.style, text=self.text, size=self.size)

    def style_info(self, style: Style) -> dict[str, Any]:
        """What the files of a style say, hashes included."""
        return OpenStyle.read(style, ModelConfig.read(self.folder)).info.model_dump(mode="json")


def teacher_entry(models: Models, teacher: TeacherSettings) -> Entry:
    """The row of the multi-step model."""

    def load() -> Maker:
        model = models.load()
        unguided = model.unguided()

        def latents(noise_BCHW: Tensor, conditions: Conditions) -> Tensor:
            return teacher_latents(model, noise_BCHW, conditions, unguided, teacher)

        return partial(decoded_images, model, latents)

    # Not how many pairs a training makes of it, and how: its images do not depend on that.
    settings = teacher.model_dump(mode="json", include=set(TEACHER_KEYS))
    identity = {**models.identity(), "teacher": settings}
    note = f"{teacher.sampler}, guidance {teacher.guidance:g}."
    return Entry(teacher_row(teacher.steps), identity, load, notes=(note,))


def adaptor_entry(models: Models, adaptor: Path) -> Entry:
    """The row of the adaptor that the report is about."""

    def load() -> Maker:
        model = models.load()
        return partial(decoded_images, model, one_step_model(model, 999, adaptor))

    identity = {**models.identity(), "adaptor": weights_sha256(adaptor)}
    identity["timestep"] = read_metadata(adaptor).timestep
    return Entry(ADAPTED, identity, load)


def contender_entry(
    models: Models, contender: Contender, prompts: Sequence[str], seeds: Sequence[int]
) -> Entry:
    """The row of something to compare with.

    Args:
        models: what the rows have in common.
        contender: checked by ``check_rivals``.
        prompts: N prompts.
        seeds: the noise seed of each.

    Raises:
        HipaError: as ``contender_facts``.

    """
    facts = contender_facts(contender, models.folder, prompts, seeds, models.text)
    if isinstance(contender, ImageFolder):
        files = find_images(contender.folder, prompts, seeds).paths
        return Entry(contender.row, {"files": _files(files)}, files=files, notes=facts.notes)
    if isinstance(contender, BundleContender):
        identity: dict[str, Any] = {"bundle": Bundle.open(contender.folder).sha256}
    elif isinstance(contender, OtherAdaptor):
        identity = {**models.identity(), "adaptor": weights_sha256(contender.folder)}
        identity["text"] = read_metadata(contender.folder).text.model_dump(mode="json")
    else:
        added = models.style_info(style_with_lora(models.style, contender))
        method = contender.method.model_dump(mode="json")
        identity = {**models.identity(), "style": added, "method": method}
    load = partial(
        open_contender,
        models.folder,
        contender,
        style=models.style,
        text=models.text,
        size=models.size,
    )
    return Entry(contender.row, identity, load, notes=facts.notes)


def _files(paths: Sequence[Path]) -> list[list[str | int]]:
    """Names, sizes and times of files: to hash their contents would take as long as to use them."""
    found: list[list[str | int]] = []
    for path in paths:
        status = path.stat()
        found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return found
