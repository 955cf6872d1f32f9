"""Stable Diffusion's safety checker, without torch: images prepared, cosines judged.

The checker (``StableDiffusionSafetyChecker`` of diffusers,
pipelines/stable_diffusion/safety_checker.py) compares CLIP's embedding of an image with those of
some concepts. The network is a stage of the bundle; what comes before and after it is here. The
preparation is that of transformers' ``CLIPImageProcessor``.

Shapes: B batch; H, W height and width in pixels; S side of the network's input; C = 3 channels; N
special and other concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.interrupts import raise_interruption
from hipa_deploy.marks.records import SafetySettings

SAFETY_STAGE = "safety_checker"
ADJUSTMENT = 0.01  # of every threshold, where a special-care concept is near
Checker = Callable[[np.ndarray], Sequence[bool | str]]
"""Takes images uint8 [B, H, W, 3]; gives for each False, True, or why it is flagged."""


class CheckerError(HipaError):
    """A checker failed, so no image is shown. No prompt is at fault."""


class Network(Protocol):
    """The network as a stage: pixels [1, 3, S, S] in, cosines [1, N] out."""

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the cosines."""


def prepare_pixels(images_BHWC: np.ndarray, settings: SafetySettings) -> np.ndarray:
    """Scale, crop and normalise images as ``CLIPImageProcessor`` does.

    Args:
        images_BHWC: uint8 [B, H, W, 3].
        settings: of the checker.

    Returns:
        float32 [B, 3, S, S].

    """
    pixels = []
    for image_HWC in images_BHWC:
        height, width = image_HWC.shape[:2]
        short = settings.shortest_edge
        if width <= height:
            size = (short, int(short * height / width))
        else:
            size = (int(short * width / height), short)
        scaled = Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC)
        cut_HWC = _centre_crop(np.asarray(scaled), *settings.crop)
        # First to [0, 1], then normalised, each step in float32 as the processor does it.
        values_HWC: np.ndarray = (cut_HWC.astype(np.float64) * (1 / 255)).astype(np.float32)
        values_HWC = values_HWC - np.asarray(settings.mean, np.float32)
        values_HWC = values_HWC / np.asarray(settings.std, np.float32)
        pixels.append(values_HWC.transpose(2, 0, 1))
    return np.stack(pixels).astype(np.float32, copy=False)


def _centre_crop(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the middle out of an image; one that is too small gets black borders first."""
    missing_h = max(0, height - image_HWC.shape[0])
    missing_w = max(0, width - image_HWC.shape[1])
    if missing_h or missing_w:
        # As the processor does: the larger half above and at the left.
        margins = (
            ((missing_h + 1) // 2, missing_h // 2),
            ((missing_w + 1) // 2, missing_w // 2),
            (0, 0),
        )
        image_HWC = np.pad(image_HWC, margins)
    top = (image_HWC.shape[0] - height) // 2
    left = (image_HWC.shape[1] - width) // 2
    return image_HWC[top : top + height, left : left + width]


def flagged_concepts(cosines_N: np.ndarray, settings: SafetySettings) -> list[int]:
    """The numbers of the concepts that an image is too near to; empty for a harmless image.

    Args:
        cosines_N: of the image with the special concepts, then with the others.
        settings: the thresholds.

    """
    special = len(settings.special_thresholds)
    adjustment = 0.0
    for cosine, threshold in zip(cosines_N[:special], settings.special_thresholds, strict=True):
        # diffusers rounds to three digits, which decides at the border.
        if round(float(cosine) - threshold + adjustment, 3) > 0:
            adjustment = ADJUSTMENT
    flagged = []
    pairs = zip(cosines_N[special:], settings.thresholds, strict=True)
    for number, (cosine, threshold) in enumerate(pairs):
        if round(float(cosine) - threshold + adjustment, 3) > 0:
            flagged.append(number)
    return flagged


@dataclass(frozen=True)
class SafetyChecker:
    """The bundle's own checker: its network on a backend, and its settings.

    Attributes:
        network: the stage ``safety_checker``, loaded.
        settings: of the manifest.

    """

    network: Network
    settings: SafetySettings

    def __call__(self, images_BHWC: np.ndarray) -> list[bool | str]:
        """Check images, uint8 [B, H, W, 3]; see ``Checker``."""
        verdicts: list[bool | str] = []
        for image_HWC in images_BHWC:
            pixels = prepare_pixels(image_HWC[None], self.settings)
            verdicts.append(self._verdict(self.network(pixels=pixels)["cosines"][0]))
        return verdicts

    def _verdict(self, cosines_N: np.ndarray) -> bool | str:
        # A comparison with NaN is false: it would let every image pass.
        if not np.isfinite(cosines_N).all():
            raise CheckerError(
                "the safety checker gave NaN or infinity, so no image is shown. "
                "Export the bundle with --dtype fp32."
            )
        concepts = flagged_concepts(cosines_N, self.settings)
        if not concepts:
            return False
        numbers = ", ".join(str(number) for number in concepts)
        return f"the bundle's safety checker, concept {numbers}"


def ask_checker(checker: Checker, images_BHWC: np.ndarray) -> list[str | None]:
    """Ask a checker; the reason for each image that it flags, None for the others.

    Raises:
        CheckerError: the checker fails, or gives not one answer for each image. Nothing is shown
            then.

    """
    try:
        answers = list(checker(images_BHWC))
    except (HipaError, KeyboardInterrupt):
        raise
    except BaseException as error:
        # SystemExit would end a command as if all were well.
        raise_interruption()
        raise CheckerError(
            f"the checker of images failed ({first_line(error)}), so no image is shown. "
            "Mend the function that was given as checker."
        ) from error
    if len(answers) != len(images_BHWC):
        raise CheckerError(
            f"the checker of images gave {len(answers)} answers for {len(images_BHWC)} images. "
            "Expected one for each: False, True, or a reason."
        )
    reasons: list[str | None] = []
    for answer in answers:
        if isinstance(answer, str) and answer:
            reasons.append(answer)
        else:
            reasons.append("the checker that was given" if answer else None)
    return reasons
