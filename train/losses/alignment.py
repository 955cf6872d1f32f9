"""A term that holds images to their prompts, by a frozen scorer of both.

    L_A = mean over rows of max(0, below - cos(image, prompt))

That is the clamped CLIP loss of SwiftBrush v2 (Dao et al. 2024, arXiv 2408.14176),
there beside score distillation. It is not the paper's. Unlike the other terms it does not ask what
the teacher drew: where the teacher misses its prompt, the student need not.

Scorers:

    a folder         a CLIP of transformers, in float32
    module:function  a user's own: ``function()`` is called once, and returns a callable of images
                     [B, 3, H, W] in [0, 1] and B prompts -> cosines [B] with a gradient. It is
                     code, and runs only inside ``hipa_deploy.user_code.code_allowed``

Shape suffixes: B rows of a batch, C colours, H W image size, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.train.losses.clip_folder import (
    FETCH_CLIP,
    SCORER,
    ClipParts,
    check_clip_folder,
    clip_config,
    clip_sha256,
    load_clip,
)
from hipa_deploy.train.losses.custom_loss import PROBE_SIZE, gradient_of
from hipa_deploy.train.recipes.alignment_settings import AlignmentSettings
from hipa_deploy.user_code import call_user_function, user_errors

# Images [B, 3, H, W] in [0, 1] and their prompts -> cosines [B].
Scorer = Callable[[Tensor, Sequence[str]], Tensor]
EXPECTED = (
    "Expected a callable: float32 images [B, 3, H, W] in [0, 1] and a list of B prompts -> "
    "cosines [B] with a gradient for the images."
)
PROBE_PROMPTS = ("a red apple", "a boat")


class Alignment(nn.Module):
    """The term as a module without trainable weights.

    Args:
        scorer: Of images and prompts; a module is registered, and moves with this one.
        below: Cosine above which an image adds nothing.

    Example:
        >>> alignment = Alignment(ClipScorer(load_clip(folder, SCORER, FETCH_CLIP)), below=0.35)
        >>> alignment(torch.rand(2, 3, 512, 512), ["a red apple", "a boat"]).shape
        torch.Size([])

    """

    def __init__(self, scorer: Scorer, below: float) -> None:
        super().__init__()
        self.scorer = scorer
        self.below = below
        self.eval().requires_grad_(False)

    def forward(self, image01_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The loss, a scalar.

        Args:
            image01_BCHW: The student's, in [0, 1] but for overshoot, which no image file has.
            prompts: B of them.

        """
        cosine_B = self.scorer(image01_BCHW.clamp(0, 1), prompts)
        return (self.below - cosine_B).clamp(min=0).mean()


class ClipScorer(nn.Module):
    """The cosine of CLIP's two embeddings, with a gradient for the images.

    Images are resized, cropped and normalised as the folder's preprocessing says, on tensors: it
    rounds to whole levels of 255, and this does not.

    Args:
        parts: Of the folder.

    """

    mean: Tensor
    std: Tensor

    def __init__(self, parts: ClipParts) -> None:
        super().__init__()
        self.model = parts.model
        self._parts = parts
        self._short_side = int(parts.processor.size["shortest_edge"])
        crop = parts.processor.crop_size
        self._crop = (int(crop["height"]), int(crop["width"]))
        self.register_buffer("mean", torch.tensor(parts.processor.image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(parts.processor.image_std).view(1, 3, 1, 1))

    def forward(self, image01_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines [B]; prompts that are too long for the text encoder are cut."""
        with torch.no_grad():
            tokens = {
                name: ids.to(self.mean.device) for name, ids in self._parts.tokens(prompts).items()
            }
            text = self.model.text_model(**tokens).pooler_output
            text_BD = self.model.text_projection(text)
        return F.cosine_similarity(self.embedded(image01_BCHW), text_BD, dim=1)

    def embedded(self, image01_BCHW: Tensor) -> Tensor:
        """Embeddings [B, D] of images."""
        pixels_BCHW = (self._cropped(image01_BCHW) - self.mean) / self.std
        vision = self.model.vision_model(pixel_values=pixels_BCHW).pooler_output
        embedding_BD: Tensor = self.model.visual_projection(vision)
        return embedding_BD

    def _cropped(self, image01_BCHW: Tensor) -> Tensor:
        """The middle of the images, their short side resized, in the size that CLIP takes."""
        height, width = image01_BCHW.shape[-2:]
        scale = self._short_side / min(height, width)
        # Whole pixels as the folder's preprocessing counts them: the long side is rounded down.
        size = (int(height * scale + 1e-6), int(width * scale + 1e-6))
        resized = F.interpolate(
            image01_BCHW, size=size, mode="bicubic", antialias=True, align_corners=False
        )
        top = (size[0] - self._crop[0]) // 2
        left = (size[1] - self._crop[1]) // 2
        return resized[..., top : top + self._crop[0], left : left + self._crop[1]].clamp(0, 1)


def load_alignment(settings: AlignmentSettings) -> Alignment | None:
    """The term of a recipe; None without a weight.

    Raises:
        HipaError: the folder cannot be loaded; code was not allowed, or what it returns is no
            scorer.

    """
    if not settings.weight:
        return None
    assert settings.scorer is not None  # its validator
    with torch.device("cpu"):  # whichever is the default; it moves with the other terms
        if settings.is_code:
            return Alignment(_own_scorer(settings.scorer), settings.below)
        folder = Path(settings.scorer)
        check_clip_folder(folder, SCORER, FETCH_CLIP)
        return Alignment(ClipScorer(load_clip(folder, SCORER, FETCH_CLIP)), settings.below)


def unloaded_scorer(folder: Path) -> ClipScorer:
    """A CLIP's scorer on torch's default device, with drawn weights: what it costs to run.

    Raises:
        HipaError: the folder's configuration or preprocessing cannot be read.

    """
    from transformers import CLIPImageProcessor, CLIPModel

    config = clip_config(folder, SCORER, FETCH_CLIP)
    with as_line(f"{SCORER} {folder} cannot be loaded", FETCH_CLIP):
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    model = CLIPModel(config).eval().requires_grad_(False)
    return ClipScorer(ClipParts(model, None, processor))


def scorer_identity(settings: AlignmentSettings) -> str | None:
    """What tells one scorer from another: the hash of a CLIP, the name of code; None without."""
    if not settings.weight or settings.scorer is None:
        return None
    return settings.scorer if settings.is_code else clip_sha256(Path(settings.scorer))


def _own_scorer(name: str) -> Scorer:
    """A user's scorer, 'module:function', tried on two images."""
    scorer: Any = call_user_function("scorer", name)
    if not callable(scorer):
        raise HipaError(f"scorer {name} is {type(scorer).__name__}. {EXPECTED}")
    if isinstance(scorer, nn.Module):
        scorer.eval().requires_grad_(False)
    _check(name, scorer)
    checked: Scorer = scorer
    return checked


def _check(name: str, scorer: Scorer) -> None:
    """Raise HipaError unless a scorer gives two images two finite cosines with a gradient."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, PROBE_SIZE, PROBE_SIZE, generator=generator).requires_grad_()
    what = f"scorer {name}"
    with user_errors(f"{what} fails on two images", EXPECTED):
        cosine = scorer(image, list(PROBE_PROMPTS))
    shape = tuple(getattr(cosine, "shape", ()))
    if not isinstance(cosine, Tensor) or shape != (2,):
        got = f"a tensor {list(shape)}" if isinstance(cosine, Tensor) else type(cosine).__name__
        raise HipaError(f"{what} gives {got}. {EXPECTED}")
    values = cosine.detach()
    if not torch.isfinite(values).all() or float(values.abs().max()) > 1 + 1e-3:
        got = ", ".join(f"{float(value):g}" for value in values)
        raise HipaError(f"{what} gives {got} of two images: no cosines. {EXPECTED}")
    gradient = gradient_of(cosine.sum(), image, what, EXPECTED)
    if gradient is None or not torch.isfinite(gradient).all():
        raise HipaError(f"{what} has no finite gradient for the images. {EXPECTED}")
