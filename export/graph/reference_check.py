"""Whether PyTorch's own reference can be right, before anything is compared with it.

A stage that agrees with a wrong reference passes every comparison. So the reference is held against
what such tensors can be at all:

- All of them are finite.
- What a UNet predicts has a mean square of about 1, whichever it predicts: noise has, latents have
  because the VAE's scaling factor makes it so (Rombach et al. 2022, https://arxiv.org/abs/2112.10752,
  section G), and v is a mixture of both. Untrained weights give less, since a normalisation stands
  before the last layer. A root mean square above 100 is an error.
- x0 of a trained model has a root mean square of about 1 too. Where eps is predicted, an error of
  the prediction is enlarged 1 / sqrt(alpha_bar) times in x0. Untrained weights reach 15 with Stable
  Diffusion's schedule, and 1,400 at the least signal that an export accepts. Above 10,000 is an
  error; above 5 is worth a warning, since such latents lie outside of what a VAE decodes.
- Images are not of one value. Images with more than 99 of 100 values black or white are worth a
  warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from hipa_deploy.errors import HipaError

MOST_OUTPUT = 100.0
MOST_LATENTS = 10_000.0
USUAL_LATENTS = 5.0
USUAL_SATURATED = 0.99
# What makes each tensor, by its key without the number of a strength.
MAKERS = {
    "context": "the text encoder",
    "pooled": "the second text encoder",
    "conditioning": "the UNet's embedding of the prompt",
    "source": "the VAE's encoder",
    "output": "the UNet",
    "latents": "the one step",
    "latent_sample": "the one step",
    "sample": "the decoder",
    "images": "the decoder",
}
LOOK = "Check that part's weights, and the adaptor or LoRA that is merged and its scale."


def check_reference(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Check reference tensors, and return a sentence for each that is doubtful.

    Args:
        tensors: by the keys of ``hipa_deploy.export.references``. Further keys are ignored.

    Raises:
        HipaError: a tensor that no working model gives.

    Example:
        >>> check_reference({"latents": np.zeros((1, 4, 8, 8), np.float32)})
        []

    """
    doubts = []
    for key, value in tensors.items():
        name = re.sub(r"_\d+$", "", key)
        if name not in MAKERS:
            continue
        if not np.isfinite(value).all():
            raise HipaError(
                f"the reference is wrong: {MAKERS[name]} gives NaN or infinity in PyTorch, in "
                f"float32 ({key}). {LOOK}"
            )
        if name == "output":
            _check_output(key, value)
        elif name == "latents":
            doubts += _check_latents(key, value)
        elif name == "images":
            doubts += _check_images(key, value)
    return doubts


def _check_output(key: str, output_BCHW: np.ndarray) -> None:
    size = _root_mean_square(output_BCHW)
    if size > MOST_OUTPUT:
        raise HipaError(
            f"the reference is wrong: the UNet's prediction has a root mean square of {size:.3g} "
            f"({key}). Expected about 1, at most {MOST_OUTPUT:g}. {LOOK}"
        )


def _check_latents(key: str, latents_BCHW: np.ndarray) -> list[str]:
    size = _root_mean_square(latents_BCHW)
    said = f"the latents of the one step have a root mean square of {size:.3g} ({key})"
    schedule = "prediction_type and betas in scheduler/scheduler_config.json"
    if size > MOST_LATENTS:
        raise HipaError(
            f"the reference is wrong: {said}. Expected about 1. Check {schedule}, and the timestep."
        )
    if size > USUAL_LATENTS:
        return [
            f"{said}, and those of a trained model about 1. The images may be noise: check "
            f"{schedule}, and that the adaptor is for this model."
        ]
    return []


def _check_images(key: str, images_BHWC: np.ndarray) -> list[str]:
    lowest = images_BHWC.min()
    highest = images_BHWC.max()
    if lowest == highest:
        raise HipaError(
            f"the reference is wrong: every pixel of its images is {lowest} ({key}). Expected "
            "images. Check the weights of the decoder and of the UNet."
        )
    saturated = float(np.mean((images_BHWC == 0) | (images_BHWC == 255)))
    if saturated > USUAL_SATURATED:
        return [
            f"{saturated:.1%} of the reference images' values are black or white ({key}). Look at "
            "an image before the bundle is used."
        ]
    return []


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
