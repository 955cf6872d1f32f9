"""One-step LoRAs and models of others, to compare an adaptor with: ``hipa-evaluate --rival``.

Shapes: N images of a row of the report, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.step_constants import step_constants
from hipa_deploy.models.style import LoraChoice, Style
from hipa_deploy.train.evaluation.evaluation_request import Rival
from hipa_deploy.train.evaluation.quality import decoded_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.one_step import one_step_latents


def check_rivals(rivals: Sequence[Rival], folder: Path, style: Style) -> None:
    """Check that every rival fits the model in ``folder``; no weights of the model are loaded.

    Raises:
        HipaError: a method or LoRA that is not for this model, or two rivals of one name.

    """
    config = ModelConfig.read(folder)
    rows = [rival.row for rival in rivals]
    for row in rows:
        if rows.count(row) > 1:
            raise HipaError(f"--rival: two of them are called {row!r}. Rename one of the files.")
    for rival in rivals:
        step_constants(rival.method, config)
        OpenStyle.read(_with_lora(style, rival), config)


def rival_images(
    folder: Path,
    rival: Rival,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    style: Style | None = None,
    device: str | None = None,
    text: TextSettings | None = None,
) -> np.ndarray:
    """One-step images of a rival.

    Args:
        folder: Diffusers folder of the base model.
        rival: The LoRA and its method.
        prompts: N prompts.
        seeds: The noise seed of each prompt.
        style: LoRAs and embeddings that are added to the model.
        device: 'cpu', 'cuda', ...; None is the GPU if there is one.
        text: How prompts are encoded; None is one chunk, all layers.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        HipaError: as ``check_rivals``; or not one seed for each prompt.

    """
    model = DiffusionModel.load(
        folder, device, style=_with_lora(style or Style(), rival), text=text
    )
    constants = step_constants(rival.method, model.config)
    latents = partial(
        one_step_latents,
        model.unet,
        timestep=constants.timestep,
        alpha_bar=constants.alpha_bar,
        prediction_type=constants.prediction_type,
        method=constants.method,
    )
    return decoded_images(model, latents, prompts, seeds)


def _with_lora(style: Style, rival: Rival) -> Style:
    """The style, and the rival's LoRA after it: both are merged in the same way."""
    if rival.lora is None:
        return style
    return replace(style, loras=(*style.loras, LoraChoice(rival.lora)))
