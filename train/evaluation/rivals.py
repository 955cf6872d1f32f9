"""The images of what an adaptor is compared with: ``hipa-evaluate --rival``.

Shapes: N images of a row of the report, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.step_constants import step_constants
from hipa_deploy.models.style import LoraChoice, Style, check_same_loras
from hipa_deploy.train.evaluation.contenders import (
    BundleContender,
    Contender,
    ImageFolder,
    OtherAdaptor,
    Rival,
    adaptor_notes,
    bundle_notes,
)
from hipa_deploy.train.evaluation.image_folder import find_images
from hipa_deploy.train.evaluation.quality import decoded_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.one_step import one_step_latents
from hipa_deploy.train.model.unet_adaptor import one_step_model

if TYPE_CHECKING:
    from hipa_deploy.generate.pipeline import OneStepPipeline

Maker = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""A function from N prompts and their N noise seeds to images, uint8 [N, H, W, 3]."""


@dataclass(frozen=True)
class Facts:
    """What a report says of a contender beside its numbers.

    Attributes:
        same_noise: whether its images are of the same noise as the other rows'.
        notes: a sentence each.

    """

    same_noise: bool = True
    notes: tuple[str, ...] = ()


def check_rivals(
    contenders: Sequence[Contender],
    folder: Path,
    style: Style,
    size: tuple[int, int] | None = None,
) -> None:
    """Check that every contender fits the model in ``folder``; no weights of the model are loaded.

    Args:
        contenders: Of one report.
        folder: Diffusers folder of the base model.
        style: LoRAs and embeddings that are added to the model.
        size: Height and width of the report's images in pixels; None is the model's own.

    Raises:
        HipaError: a method, LoRA or adaptor that is not for this model, an adaptor or a bundle
            whose images have another size, or two contenders of one name.

    """
    config = ModelConfig.read(folder)
    rows = [contender.row for contender in contenders]
    for row in rows:
        if rows.count(row) > 1:
            raise HipaError(f"--rival: two of them are called {row!r}. Rename one of the files.")
    for contender in contenders:
        if isinstance(contender, Rival):
            step_constants(contender.method, config)
            OpenStyle.read(style_with_lora(style, contender), config)
        elif isinstance(contender, OtherAdaptor):
            loras = OpenStyle.read(style, config).info.loras
            trained = read_metadata(contender.folder)
            check_same_loras(contender.folder, trained.loras, loras)
            _check_adaptor_size(contender, trained.resolution, size or config.native_size)
        elif isinstance(contender, BundleContender):
            _check_bundle_size(contender, size or config.native_size)


def _check_adaptor_size(
    contender: OtherAdaptor, own: tuple[int, int], size: tuple[int, int]
) -> None:
    """Raise HipaError if an adaptor was trained at another size than the report's."""
    if own != size:
        raise HipaError(
            f"adaptor {contender.folder} was trained at {own[0]}x{own[1]} pixels (height x width), "
            f"and the report's images have {size[0]}x{size[1]}. Measure it in a report of its own, "
            "as --adaptor."
        )


def _check_bundle_size(contender: BundleContender, size: tuple[int, int]) -> None:
    """Raise HipaError if a bundle makes images of another size than the report's."""
    step = Bundle.open(contender.folder).manifest.one_step
    height = step.height
    width = step.width
    if (height, width) != size:
        raise HipaError(
            f"bundle {contender.folder} makes images of {height}x{width} pixels (height x width), "
            f"and the report's have {size[0]}x{size[1]}. Export it in that size."
        )


def contender_facts(
    contender: Contender,
    folder: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    text: TextSettings | None = None,
) -> Facts:
    """What is known of a contender before its images are made.

    Args:
        contender: checked by ``check_rivals``.
        folder: Diffusers folder of the base model.
        prompts: N prompts.
        seeds: The noise seed of each prompt.
        text: How the prompts of the other rows are encoded; None is not compared.

    Raises:
        HipaError: As ``find_images``.

    """
    if isinstance(contender, BundleContender):
        return Facts(notes=tuple(bundle_notes(contender, folder, text)))
    if isinstance(contender, OtherAdaptor):
        return Facts(notes=tuple(adaptor_notes(contender, folder, text)))
    if isinstance(contender, ImageFolder):
        found = find_images(contender.folder, prompts, seeds)
        return Facts(found.same_noise, tuple(found.notes))
    return Facts()


def rival_images(
    folder: Path,
    rival: Contender,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    style: Style | None = None,
    device: str | None = None,
    text: TextSettings | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Images of a contender.

    Args:
        folder: Diffusers folder of the base model.
        rival: What makes them.
        prompts: N prompts.
        seeds: The noise seed of each prompt.
        style: LoRAs and embeddings that are added to the model.
        device: 'cpu', 'cuda', ...; None is the GPU if there is one.
        text: How prompts are encoded; None is one chunk, all layers. Another adaptor reads them as
            it was trained, and a bundle as it was exported.
        size: Height and width in pixels; None is what the model was made for.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        HipaError: as ``check_rivals`` and ``find_images``; or not one seed for each prompt.

    """
    if isinstance(rival, ImageFolder):
        height, width = size or ModelConfig.read(folder).native_size
        return find_images(rival.folder, prompts, seeds).images(height, width)
    make = open_contender(folder, rival, style=style, device=device, text=text, size=size)
    return make(prompts, seeds)


def open_contender(
    folder: Path,
    contender: Rival | OtherAdaptor | BundleContender,
    *,
    style: Style | None = None,
    device: str | None = None,
    text: TextSettings | None = None,
    size: tuple[int, int] | None = None,
) -> Maker:
    """Load a contender once, to make many images; arguments and errors as for ``rival_images``."""
    if isinstance(contender, BundleContender):
        # Here, as a report without a bundle needs no runtime.
        from hipa_deploy.generate.pipeline import OneStepPipeline

        return partial(_bundle_images, OneStepPipeline.load(contender.folder))
    if isinstance(contender, OtherAdaptor):
        own_text = read_metadata(contender.folder).text
        model = DiffusionModel.load(folder, device, style=style, text=own_text, size=size)
        return partial(decoded_images, model, one_step_model(model, 999, contender.folder))

    added = style_with_lora(style or Style(), contender)
    model = DiffusionModel.load(folder, device, style=added, text=text, size=size)
    constants = step_constants(contender.method, model.config)
    latents = partial(
        one_step_latents,
        model.unet,
        timestep=constants.timestep,
        alpha_bar=constants.alpha_bar,
        prediction_type=constants.prediction_type,
        method=constants.method,
    )
    return partial(decoded_images, model, latents)


def _bundle_images(
    pipe: OneStepPipeline, prompts: Sequence[str], seeds: Sequence[int]
) -> np.ndarray:
    """The images of a bundle as its stages make them: no watermark, and none is withheld."""
    # Prompts that are too long are cut, as those of the other rows are.
    jobs = pipe.jobs(zip(prompts, seeds, strict=True), truncate=True)
    images = []
    start = 0
    while start < len(jobs):
        batch = jobs[start : start + max(pipe.batch_sizes)]
        for made in pipe.make(batch):
            images.append(made.finished())
        start += len(batch)
    return np.stack(images)


def style_with_lora(style: Style, rival: Rival) -> Style:
    """The style, and the rival's LoRA after it: both are merged in the same way."""
    if rival.lora is None:
        return style
    return replace(style, loras=(*style.loras, LoraChoice(rival.lora)))
