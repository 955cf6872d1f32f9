"""Stable Diffusion's safety checker as a stage: its network, loaded and wrapped.

Shapes: B batch; S side of the network's input; N concepts: the special ones first, then the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker,
    cosine_distance,
)
from torch.nn import functional
from transformers import CLIPConfig, CLIPVisionConfig

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.marks.records import SafetySettings
from hipa_deploy.marks.safety import SAFETY_STAGE
from hipa_deploy.models.weights.load_part import CONFIG, fill_part, number_positions
from hipa_deploy.models.weights.part_config import AGAIN, known_values, read_config
from hipa_deploy.models.weights.weight_identity import weights_identity

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3


class SafetyNetwork(torch.nn.Module):
    """pixels float32 [B, 3, S, S] -> cosines float32 [B, N] with the concepts' embeddings.

    The cosines are computed in float32 in a float16 graph too: thresholds are compared with three
    of their digits.
    """

    places: ClassVar = {
        "vision_model": "safety_checker.vision_model",
        "visual_projection": "safety_checker.visual_projection",
        "concepts": "safety_checker.concepts",
    }

    def __init__(self, checker: StableDiffusionSafetyChecker) -> None:
        super().__init__()
        self.vision_model = checker.vision_model
        self.visual_projection = checker.visual_projection
        embeds_ND = torch.cat([checker.special_care_embeds, checker.concept_embeds])
        # Not a buffer: it must stay float32 when the module is converted to float16.
        self.concepts = functional.normalize(embeds_ND.detach().float()).T.contiguous()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """CLIP's embedding of the image, compared with each concept's."""
        sample = pixels.to(self.visual_projection.weight.dtype)
        embeds_BD = self.visual_projection(self.vision_model(sample)[1])
        return functional.normalize(embeds_BD.float()) @ self.concepts


def load_safety_checker(folder: Path) -> StableDiffusionSafetyChecker:
    """Load the checker of a model, in float32, whole.

    Args:
        folder: the model's ``safety_checker``.

    Raises:
        HipaError: it is damaged or incomplete, or of another class.

    """
    path = folder / CONFIG
    config = read_config(folder, CONFIG)
    vision = config.get("vision_config") or {}
    width = config.get("projection_dim", 768)
    if not isinstance(vision, dict) or not isinstance(width, int) or not 1 <= width <= 16_384:
        raise HipaError(f"{path} is no configuration of a safety checker. {AGAIN}")
    known = known_values(CLIPVisionConfig, vision, path)
    with as_line(f"{path} cannot be used", AGAIN), torch.device("meta"):
        clip = CLIPConfig(vision_config=known, projection_dim=width)
        checker = StableDiffusionSafetyChecker(clip)
    number_positions(checker)
    return fill_part(checker, folder)


def safety_settings(
    checker: StableDiffusionSafetyChecker, folder: Path, processor: Path
) -> SafetySettings:
    """What surrounds the network: the preparation of its images, and the thresholds.

    Args:
        checker: as ``load_safety_checker`` gives it.
        folder: the model's ``safety_checker``.
        processor: the model's ``feature_extractor``; where it is missing, CLIP's values count.

    Raises:
        HipaError: the processor does something that is not done here.

    """
    config: Mapping[str, Any] = {}
    if (processor / "preprocessor_config.json").exists():
        config = read_config(processor, "preprocessor_config.json")
    path = processor / "preprocessor_config.json"
    side = int(checker.config.vision_config.image_size)
    steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb")
    skipped = [step for step in steps if config.get(step) is False and step != "do_convert_rgb"]
    if skipped or config.get("resample", _BICUBIC) != _BICUBIC:
        raise HipaError(
            f"{path} prepares images in a way that is not supported "
            f"({', '.join(skipped) or 'another resampling'}). Export with --mark no-safety."
        )
    crop = _size(config.get("crop_size", side), path)
    if crop != (side, side):
        raise HipaError(
            f"{path} crops images to {crop}, and the safety checker takes {side}x{side}. {AGAIN}"
        )
    with as_line(f"{path} cannot be used", AGAIN):
        return SafetySettings(
            shortest_edge=_edge(config.get("size", side), path),
            crop=crop,
            mean=tuple(config.get("image_mean", _CLIP_MEAN)),
            std=tuple(config.get("image_std", _CLIP_STD)),
            special_thresholds=tuple(checker.special_care_embeds_weights.tolist()),
            thresholds=tuple(checker.concept_embeds_weights.tolist()),
            sha256=weights_identity(folder),
        )


def _size(value: Any, path: Path) -> tuple[int, int]:
    """(height, width), which files of several ages write in several ways."""
    if isinstance(value, dict):
        value = (value.get("height"), value.get("width"))
    if isinstance(value, int):
        value = (value, value)
    if len(value) != 2 or not all(isinstance(side, int) for side in value):
        raise HipaError(f"{path} has crop_size={value}. Expected two numbers of pixels. {AGAIN}")
    return int(value[0]), int(value[1])


def _edge(value: Any, path: Path) -> int:
    if isinstance(value, dict):
        value = value.get("shortest_edge")
    if not isinstance(value, int):
        raise HipaError(f"{path} has size={value}. Expected the shortest edge. {AGAIN}")
    return value


def safety_spec(settings: SafetySettings) -> StageSpec:
    """Inputs and outputs of the stage.

    It takes one image at a time, whatever the bundle's batch is: a verdict on an image shall not
    depend on the others.
    """
    concepts = len(settings.special_thresholds) + len(settings.thresholds)
    pixels = TensorSpec(name="pixels", dtype="float32", shape=(1, 3, *settings.crop))
    cosines = TensorSpec(name="cosines", dtype="float32", shape=(1, concepts))
    return StageSpec(name=SAFETY_STAGE, inputs=(pixels,), outputs=(cosines,))


@torch.no_grad()
def reference_cosines(checker: StableDiffusionSafetyChecker, pixels: torch.Tensor) -> torch.Tensor:
    """The cosines as diffusers computes them, [B, N]."""
    embeds_BD = checker.visual_projection(checker.vision_model(pixels)[1])
    special = cosine_distance(embeds_BD, checker.special_care_embeds)
    return torch.cat([special, cosine_distance(embeds_BD, checker.concept_embeds)], dim=1)
