"""The source image of a task.

It goes from what a user has to what the stages take, and from what they give to the result.

Shapes: B batch, H W pixels, h w latents, C channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.errors import HipaError
from hipa_deploy.images.png import enlarge
from hipa_deploy.images.read import (
    ImageSource,
    check_mask,
    check_size,
    composite,
    fit_image,
    fit_mask,
    hide_hole,
    latent_mask,
    merge_tiles,
    read_image,
    read_mask,
    tiles,
)
from hipa_deploy.tasks import Task

MAX_UPSCALED_PIXELS = 16384 * 16384
OVERLAP = 8  # tiles overlap by this part of their shorter side
_CALLS: dict[Task, str] = {
    "generate": "pipe(prompt)",
    "edit": "pipe.edit(image, prompt)",
    "inpaint": "pipe.inpaint(image, mask, prompt)",
    "upscale": "pipe.upscale(image)",
}


def _as_made(images_BHWC: np.ndarray) -> np.ndarray:
    return images_BHWC


@dataclass(frozen=True)
class Source:
    """What an image is made from, beside prompt and seed.

    ``image_HWC`` uint8 is what the encoder sees, at a size of the bundle; ``mask_1hw`` float32 is
    inpainting's on the latent grid, 1 to repaint; ``step`` the number of the strength where a
    bundle has several. ``facts`` go into the recipe. ``finish`` makes of the stages' images [B, H,
    W, 3] those of the user.
    """

    task: Task
    image_HWC: np.ndarray
    mask_1hw: np.ndarray | None = None
    step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[np.ndarray], np.ndarray] = _as_made


def require_task(bundle: Bundle, task: Task) -> None:
    """Raise HipaError, with what to use, unless ``bundle`` was exported for ``task``."""
    have = bundle.manifest.task
    if have != task:
        raise HipaError(
            f"{bundle.root} is a bundle to {have}, not to {task}. "
            f"Use hipa-{have}, or {_CALLS[have]}."
        )


def edit_source(
    bundle: Bundle,
    image: ImageSource,
    *,
    strength: float | None = None,
    height: int | None,
    width: int | None,
) -> Source:
    """An image to edit, cropped and scaled to the bundle's size.

    A ``strength`` of None is the largest that the bundle has.

    Raises:
        HipaError: no image, a bundle for another task, a size or strength that it does not have.

    """
    require_task(bundle, "edit")
    number = _strength_number(bundle, strength)
    strengths = bundle.manifest.strengths
    original_HWC = _read_large_enough(bundle, image)
    return Source(
        task="edit",
        image_HWC=_fitted(bundle, original_HWC, height, width),
        step=number if len(strengths) > 1 else None,
        facts={**_facts("edit", original_HWC), "strength": strengths[number].strength},
    )


def _strength_number(bundle: Bundle, strength: float | None) -> int:
    known = [entry.strength for entry in bundle.manifest.strengths]
    if strength is None:
        return 0
    if not 0 < strength <= 1:
        raise HipaError(f"strength {strength} is out of range. Expected 0 < strength <= 1.")
    for number, entry in enumerate(known):
        if math.isclose(strength, entry, rel_tol=1e-6):
            return number
    have = ", ".join(map(str, known))
    raise HipaError(
        f"strength {strength} is not one of this bundle's: {have}. "
        "Export it with --strengths for others."
    )


def inpaint_source(
    bundle: Bundle,
    image: ImageSource,
    mask: ImageSource,
    *,
    feather: int,
    height: int | None,
    width: int | None,
) -> Source:
    """An image and the mask of what to repaint (white), cropped and scaled to the bundle's size.

    Outside the mask the result is the image as it was scaled, bit for bit, beyond ``feather``
    pixels from the seam.

    Raises:
        HipaError: no image, a bundle for another task, a size that it does not have, a mask of
        another size, empty or
            full, a negative ``feather``.

    """
    require_task(bundle, "inpaint")
    if feather < 0:
        raise HipaError(f"feather is {feather}. Expected 0 (a hard edge) or more pixels.")
    original_HWC = _read_large_enough(bundle, image)
    whole_mask_HW = read_mask(mask)
    check_mask(whole_mask_HW, original_HWC)
    known_HWC = _fitted(bundle, original_HWC, height, width)
    mask_HW = fit_mask(whole_mask_HW, *known_HWC.shape[:2])
    if not mask_HW.any():
        raise HipaError(
            "mask: what is white lies outside the centre crop to the bundle's shape. "
            "Crop the image first."
        )

    def finish(images_BHWC: np.ndarray) -> np.ndarray:
        return np.stack(
            [composite(made_HWC, known_HWC, mask_HW, feather) for made_HWC in images_BHWC]
        )

    return Source(
        task="inpaint",
        image_HWC=hide_hole(known_HWC, mask_HW),
        mask_1hw=latent_mask(mask_HW, _pixels_a_latent(bundle)),
        facts={
            **_facts("inpaint", original_HWC),
            "mask": _sha256(whole_mask_HW.astype(np.uint8)),
            "feather": feather,
        },
        finish=finish,
    )


@dataclass(frozen=True)
class Upscaling:
    """An image to enlarge: tiles of the bundle's size, and how to make one image of them."""

    tiles: tuple[Source, ...]
    offsets: tuple[tuple[int, int], ...]
    height: int
    width: int
    facts: Mapping[str, Any]

    def merge(self, tiles_NHWC: np.ndarray) -> np.ndarray:
        """The stages' images [N, H, W, 3] as one, uint8 [height, width, 3]."""
        # The padded image ends where its last tiles do; what was padded is cut off again.
        tile_height, tile_width = tiles_NHWC.shape[1:3]
        bottom = max(top for top, _ in self.offsets) + tile_height
        right = max(left for _, left in self.offsets) + tile_width
        merged_HWC = merge_tiles(tiles_NHWC, self.offsets, bottom, right)
        return merged_HWC[: self.height, : self.width]


def upscaling(bundle: Bundle, image: ImageSource, *, overlap: int | None = None) -> Upscaling:
    """An image to enlarge by the bundle's factor, in tiles.

    The tiles overlap by ``overlap`` pixels of the result.

    One that is smaller than a tile is continued with its border's colours, and cut again.

    Raises:
        HipaError: no image, a bundle for another task, an absurdly large result, or an overlap as
        large as a tile.

    """
    require_task(bundle, "upscale")
    small_HWC = read_image(image)
    step = bundle.manifest.one_step
    factor = bundle.manifest.upscale or 1
    height, width = (size * factor for size in small_HWC.shape[:2])
    if height * width > MAX_UPSCALED_PIXELS:
        raise HipaError(
            f"{width}x{height} pixels are too many. "
            f"Expected at most {MAX_UPSCALED_PIXELS} in the result."
        )
    margins = [max(0, tile - size) for tile, size in ((step.height, height), (step.width, width))]
    padded_HWC = np.pad(
        enlarge(small_HWC, factor), ((0, margins[0]), (0, margins[1]), (0, 0)), mode="edge"
    )
    least = min(step.height, step.width) // OVERLAP if overlap is None else overlap
    rows, columns = padded_HWC.shape[:2]
    offsets = tiles(rows, columns, step.height, step.width, least)
    cut = [padded_HWC[top : top + step.height, left : left + step.width] for top, left in offsets]
    facts = {**_facts("upscale", small_HWC), "upscale": factor, "overlap": least}
    return Upscaling(
        tuple(Source("upscale", tile) for tile in cut), tuple(offsets), height, width, facts
    )


def batch_inputs(sources: Sequence[Source]) -> dict[str, np.ndarray]:
    """What the stages take of a batch of sources; nothing where there are none.

    Returns:
        'image' uint8 [B, H, W, 3], and where the task has them 'mask' float32 [B, 1, h, w] and
        'step' int64 [1].

    """
    if not sources:
        return {}
    feed = {"image": np.stack([source.image_HWC for source in sources])}
    if sources[0].mask_1hw is not None:
        feed["mask"] = np.stack(
            [source.mask_1hw for source in sources if source.mask_1hw is not None]
        )
    if sources[0].step is not None:
        feed["step"] = np.asarray([sources[0].step], np.int64)
    return feed


class EncodedImages:
    """The latents of the latest batch of source images.

    Several prompts and seeds take them from one encoding.
    """

    def __init__(self) -> None:
        self._latest: tuple[np.ndarray, np.ndarray] | None = None

    def feed(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``inputs``, with the latents 'source' in place of the 'image' where they are known."""
        if "image" not in inputs or self._latest is None:
            return inputs
        image_BHWC, source_BCHW = self._latest
        if not np.array_equal(image_BHWC, inputs["image"]):
            return inputs
        without_image = {name: value for name, value in inputs.items() if name != "image"}
        return without_image | {"source": source_BCHW}

    def keep(self, image_BHWC: np.ndarray, source_BCHW: np.ndarray) -> None:
        """Remember a batch, and forget the one before."""
        self._latest = image_BHWC, source_BCHW


def _read_large_enough(bundle: Bundle, image: ImageSource) -> np.ndarray:
    image_HWC = read_image(image)
    check_size(image_HWC, _pixels_a_latent(bundle))
    return image_HWC


def _fitted(
    bundle: Bundle, image_HWC: np.ndarray, height: int | None, width: int | None
) -> np.ndarray:
    _, rows, columns = latent_shape(bundle, height, width)
    factor = _pixels_a_latent(bundle)
    return fit_image(image_HWC, rows * factor, columns * factor)


def _pixels_a_latent(bundle: Bundle) -> int:
    step = bundle.manifest.one_step
    return step.height // step.latent_shape[1]


def _facts(task: Task, image_HWC: np.ndarray) -> dict[str, Any]:
    return {"task": task, "source": _sha256(image_HWC)}


def _sha256(pixels: np.ndarray) -> str:
    """SHA-256 of the shape and the pixels: the same in every file format."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
