"""One-step LoRAs and models of others, to compare an adaptor with: ``hipa-evaluate --rival``.

Shapes: N images of a row of the report, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import METADATA
from hipa_deploy.models.lora.open_style import OpenStyle
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.one_step_method import OneStepMethod, load_method
from hipa_deploy.models.one_step.step_constants import step_constants
from hipa_deploy.models.style import LoraChoice, Style
from hipa_deploy.train.evaluation.quality import decoded_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.one_step import one_step_latents


@dataclass(frozen=True)
class Rival:
    """A one-step method, and the LoRA that it is for.

    Attributes:
        method: how the step is taken.
        lora: its file or folder; None is the base model itself, such as SD-Turbo.

    """

    method: OneStepMethod
    lora: Path | None = None

    @property
    def row(self) -> str:
        """The name of its row in a report."""
        if self.lora is None:
            return f"{self.method.name}, one step"
        return f"{self.lora.stem} ({self.method.name}), one step"


def parse_rival(text: str) -> Rival:
    """The rival in ``[FILE_OR_FOLDER=]METHOD``.

    Raises:
        HipaError: there is no such file or method.

    Example:
        >>> parse_rival("Hyper-SD15-1step-lora.safetensors=hyper-sd15").row
        'Hyper-SD15-1step-lora (hyper-sd15), one step'

    """
    # The last sign: a path may have others.
    path, _, name = text.rpartition("=")
    return make_rival(name, Path(path) if path else None, f"--rival {text}")


def make_rival(name: str, lora: Path | None, option: str) -> Rival:
    """The rival of a method's name and a LoRA.

    Args:
        name: as for ``load_method``, but 'hipa'.
        lora: a file or folder.
        option: what the user said, for messages.

    Raises:
        HipaError: there is no such method or file; a method without the LoRA that it needs; an
            adaptor of HiPA, which says its step itself.

    """
    method = load_method(name)
    if method is None:
        raise HipaError(f"{option}: hipa is the step of --adaptor. Leave it out.")
    if lora is None:
        if method.needs_adaptor:
            raise HipaError(
                f"{option}: {name} is a LoRA. Name its file too: --rival FILE={name}, or --adaptor "
                f"FILE --one-step {name}."
            )
        return Rival(method)
    if not lora.exists():
        raise HipaError(
            f"{option}: {lora} does not exist. Expected a one-step LoRA's file or folder."
        )
    if (lora / METADATA).exists():
        raise HipaError(
            f"{option}: {lora} is an adaptor of HiPA, which says its own step. Give it as "
            "--adaptor alone; for a model that is one-step itself give --adaptor none."
        )
    return Rival(method, lora)


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
