"""Source images of the tasks edit, inpaint, upscale and control: a user's image for the stages.

A ``Source`` also knows how to turn the images of the stages into the user's result.

Shapes: B batch; N tiles; H, W height and width in pixels; h, w of the latent; C channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from hipa_deploy.bundle.folder import Bundle, latent_shape
from hipa_deploy.errors import HipaError, RequestError, brief, whole_number
from hipa_deploy.images.compositing import check_mask, composite, hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.images.read import (
    ImageSource,
    check_size,
    fit_image,
    fit_mask,
    read_control,
    read_image,
    read_mask,
)
from hipa_deploy.images.tiling import merge_tiles, tiles
from hipa_deploy.tasks import Task

MAX_UPSCALED_PIXELS = 16384 * 16384
MAX_TILES = 10_000
MAX_FEATHER = 4096  # pixels
OVERLAP = 8  # by default tiles overlap by their shorter side divided by this
# What to call instead, where a bundle is for another task.
_CALLS: dict[Task, str] = {
    "generate": "pipe(prompt)",
    "edit": "pipe.edit(image, prompt)",
    "inpaint": "pipe.inpaint(image, mask, prompt)",
    "upscale": "pipe.upscale(image)",
    "control": "pipe.control(image, prompt)",
}
MAX_SCALE = 2.0  # of a control image; diffusers' pipelines are used with 0 to 1, seldom more


def _unchanged(images_BHWC: np.ndarray) -> np.ndarray:
    """Return the images of the stages as they are: most tasks need no finish."""
    return images_BHWC


@dataclass(frozen=True, eq=False)
class Source:
    """What an image is made from, besides the prompt and the seed.

    Attributes:
        task: the task that the source is for.
        image_HWC: the image that the VAE encoder or a ControlNet sees, uint8, at a size of the
            bundle.
        mask_1hw: for inpainting, the mask on the latent grid, float32; 1 is repainted.
        step: index of the strength, where a bundle has several.
        scale: of a control image, by which the ControlNet's outputs are multiplied.
        facts: entries for the generation parameters of the result.
        finish: turns the stages' images, uint8 [B, H, W, 3], into those of the user.

    """

    task: Task
    image_HWC: np.ndarray
    mask_1hw: np.ndarray | None = None
    step: int | None = None
    scale: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[np.ndarray], np.ndarray] = _unchanged


def require_task(bundle: Bundle, task: Task) -> None:
    """Check that a bundle was exported for a task.

    Raises:
        HipaError: the bundle is for another task; the message names the command to use.

    """
    exported_for = bundle.manifest.task
    if exported_for != task:
        raise HipaError(
            f"{bundle.root} is a bundle to {exported_for}, not to {task}. "
            f"Use hipa-{exported_for}, or {_CALLS[exported_for]}."
        )


def edit_source(
    bundle: Bundle,
    image: ImageSource,
    *,
    strength: float | None = None,
    height: int | None,
    width: int | None,
) -> Source:
    """Prepare an image to edit: cropped and scaled to the bundle's size.

    Args:
        bundle: a bundle that was exported for the task edit.
        image: a path, a Pillow image or an array.
        strength: one of the bundle's strengths, in (0, 1]; None is the largest.
        height: of the result in pixels; None is the bundle's own height.
        width: of the result in pixels; None is the bundle's own width.

    Raises:
        HipaError: the image cannot be read or is too small, the bundle is for another task, or it
            lacks the size or the strength.

    """
    require_task(bundle, "edit")
    number = _strength_number(bundle, strength)
    strengths = bundle.manifest.strengths
    original_HWC = _read_large_enough(bundle, image)
    facts = _facts("edit", original_HWC)
    facts["strength"] = strengths[number].strength
    return Source(
        task="edit",
        image_HWC=_fitted(bundle, original_HWC, height, width),
        # A graph with one strength holds it as a constant and has no input for its index.
        step=number if len(strengths) > 1 else None,
        facts=facts,
    )


def _strength_number(bundle: Bundle, strength: float | None) -> int:
    """Return the index of a strength among those of the bundle; None is the first, the largest."""
    if strength is None:
        return 0
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise RequestError(
            f"strength {brief(strength)} is out of range. Expected 0 < strength <= 1.",
            argument="strength",
        )

    # A strength that was written as JSON or on a command line may differ in its last digits.
    known = [entry.strength for entry in bundle.manifest.strengths]
    for number, entry in enumerate(known):
        if math.isclose(strength, entry, rel_tol=1e-6):
            return number
    listed = ", ".join(map(str, known))
    raise RequestError(
        f"strength {strength} is not one of this bundle's: {listed}. "
        "Export the model with --strengths for others.",
        argument="strength",
        told=f"strength {strength} is not one of this model's. Expected one of: {listed}.",
        owner="export it for other strengths",
    )


def inpaint_source(
    bundle: Bundle,
    image: ImageSource,
    mask: ImageSource,
    *,
    feather: int,
    match: bool = True,
    height: int | None,
    width: int | None,
) -> Source:
    """Prepare an image and the mask of what to repaint: cropped and scaled to the bundle's size.

    In the result, every pixel farther than ``feather`` from the mask is that of the scaled image in
    sRGB, bit for bit.

    Args:
        bundle: a bundle that was exported for the task inpaint.
        image: a path, a Pillow image or an array.
        mask: the same, of the image's size; white is repainted.
        feather: width of the seam outside the mask, in pixels; 0 is a hard edge.
        match: shift the colours of the new part, so that they meet those around it.
        height: of the result in pixels; None is the bundle's own height.
        width: of the result in pixels; None is the bundle's own width.

    Raises:
        HipaError: the image cannot be read or is too small, the bundle is for another task or lacks
            the size, the mask is empty, full or of another size, or ``feather`` is negative.

    """
    require_task(bundle, "inpaint")
    feather = whole_number(feather, "feather")
    if not 0 <= feather <= MAX_FEATHER:
        raise RequestError(
            f"feather is {feather}. Expected 0 (a hard edge) to {MAX_FEATHER} pixels.",
            argument="feather",
        )

    # The mask is checked as the user has it, so that the message shows sizes that the user knows.
    original_HWC = _read_large_enough(bundle, image)
    original_mask_HW = read_mask(mask)
    check_mask(original_mask_HW, original_HWC)

    # The crop may cut all that was to be repainted away.
    fitted_HWC = _fitted(bundle, original_HWC, height, width)
    mask_HW = fit_mask(original_mask_HW, *fitted_HWC.shape[:2])
    if not mask_HW.any():
        raise RequestError(
            "mask: what is white lies outside the centre crop to the bundle's shape. "
            "Crop the image first.",
            argument="mask",
            code="invalid_mask",
            # Of OpenAI's API, what is transparent is repainted.
            told="mask: the part to repaint lies outside the centre crop to the shape of the "
            "result. Crop image and mask first.",
        )

    def finish(images_BHWC: np.ndarray) -> np.ndarray:
        finished = []
        for image_HWC in images_BHWC:
            finished.append(composite(image_HWC, fitted_HWC, mask_HW, feather, match=match))
        return np.stack(finished)

    facts = _facts("inpaint", original_HWC)
    facts["mask"] = _sha256(original_mask_HW.astype(np.uint8))
    facts["feather"] = feather
    facts["match"] = match
    return Source(
        task="inpaint",
        image_HWC=hide_hole(fitted_HWC, mask_HW),
        mask_1hw=latent_mask(mask_HW, _pixels_per_latent(bundle)),
        facts=facts,
        finish=finish,
    )


def control_source(
    bundle: Bundle,
    image: ImageSource,
    *,
    scale: float = 1.0,
    height: int | None,
    width: int | None,
) -> Source:
    """Prepare a control image: cropped and scaled to the bundle's size.

    Its numbers are taken as they are, whatever the file says about colours: edges are drawn, depth
    is estimated and poses are found by other programs. Transparent pixels count as black.

    Args:
        bundle: a bundle that was exported with a ControlNet.
        image: a path, a Pillow image or an array, as the ControlNet was trained to see.
        scale: 0 (the prompt alone) to 2; 1 is the ControlNet as it was trained.
        height: of the result in pixels; None is the bundle's own height.
        width: of the result in pixels; None is the bundle's own width.

    Raises:
        HipaError: the image cannot be read or is too small, the bundle is for another task or lacks
            the size, or the scale is out of range.

    """
    require_task(bundle, "control")
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= scale <= MAX_SCALE:
        raise RequestError(
            f"scale {brief(scale)} is out of range. Expected 0 to {MAX_SCALE:g}.", argument="scale"
        )
    original_HWC = read_control(image)
    check_size(original_HWC, _pixels_per_latent(bundle))
    return Source(
        task="control",
        image_HWC=_fitted(bundle, original_HWC, height, width),
        scale=float(scale),
        # No 'source': none of the control image's pixels is in the result. So it counts as made by
        # a model, and not as a picture that was changed.
        facts={"task": "control", "control": _sha256(original_HWC), "scale": float(scale)},
    )


@dataclass(frozen=True, eq=False)
class Upscaling:
    """An image to enlarge, cut into tiles of the bundle's size.

    Attributes:
        tiles: the sources of the tiles, row by row.
        offsets: (top, left) of every tile in the enlarged image.
        height: of the result in pixels.
        width: of the result in pixels.
        facts: entries for the generation parameters of the result.

    """

    tiles: tuple[Source, ...]
    offsets: tuple[tuple[int, int], ...]
    height: int
    width: int
    facts: Mapping[str, Any]

    def merge(self, made: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Merge the stages' images of all tiles into one.

        Args:
            made: uint8 [H, W, 3] each, in the order of ``tiles``.

        Returns:
            uint8 [height, width, 3].

        """
        tile_h, tile_w = made[0].shape[:2]
        # The tiles cover the padded image, which is larger than the result where that is small.
        padded_h = max(top for top, _ in self.offsets) + tile_h
        padded_w = max(left for _, left in self.offsets) + tile_w
        merged_HWC = merge_tiles(made, self.offsets, padded_h, padded_w)
        return merged_HWC[: self.height, : self.width]


def upscaling(
    bundle: Bundle,
    image: ImageSource,
    *,
    overlap: int | None = None,
    most_tiles: int = MAX_TILES,
) -> Upscaling:
    """Prepare an image to enlarge by the bundle's factor: cut into overlapping tiles.

    An image whose result is smaller than a tile is continued with the colours of its border, and
    the result is cropped.

    Args:
        bundle: a bundle that was exported for the task upscale.
        image: a path, a Pillow image or an array.
        overlap: tiles share at least this many pixels of the result, at most half a tile; None is
                an eighth.
        most_tiles: that the image may take.

    Raises:
        HipaError: the image cannot be read, the bundle is for another task, the result would be
            larger than ``MAX_UPSCALED_PIXELS`` or take more than ``most_tiles`` tiles, or the
            overlap is more than half a tile.

    """
    require_task(bundle, "upscale")
    step = bundle.manifest.one_step
    tile = min(step.height, step.width)
    if overlap is None:
        overlap = tile // OVERLAP
    overlap = whole_number(overlap, "overlap")
    # More would make a pixel in more than four tiles, and a large image in ten thousands of them.
    if not 0 <= overlap <= tile // 2:
        raise RequestError(
            f"overlap is {overlap} pixels, a tile {step.width}x{step.height}. "
            f"Expected 0 to {tile // 2}.",
            argument="overlap",
        )
    small_HWC = read_image(image)
    factor = bundle.manifest.upscale or 1
    small_h, small_w = small_HWC.shape[:2]
    height = small_h * factor
    width = small_w * factor
    if height * width > MAX_UPSCALED_PIXELS:
        raise RequestError(
            f"{width}x{height} pixels are too many. "
            f"Expected at most {MAX_UPSCALED_PIXELS} in the result.",
            argument="image",
            code="image_too_large",
        )

    padded_h = max(height, step.height)
    padded_w = max(width, step.width)
    offsets = tiles(padded_h, padded_w, step.height, step.width, overlap)
    # Before the image is enlarged: a small file of one colour can take gigabytes.
    if len(offsets) > most_tiles:
        raise RequestError(
            f"the image takes {len(offsets)} tiles of this model. Expected at most {most_tiles}. "
            "Make it smaller. A lower overlap takes fewer tiles.",
            argument="image",
            code="image_too_large",
        )

    # The stages take complete tiles only. Repeating the border adds no edge for them to sharpen.
    below = padded_h - height
    right = padded_w - width
    large_HWC = enlarge(small_HWC, factor)
    padded_HWC = np.pad(large_HWC, ((0, below), (0, right), (0, 0)), mode="edge")

    sources = []
    for top, left in offsets:
        tile_HWC = padded_HWC[top : top + step.height, left : left + step.width]
        sources.append(Source("upscale", tile_HWC))

    facts = {**_facts("upscale", small_HWC), "upscale": factor, "overlap": overlap}
    return Upscaling(tuple(sources), tuple(offsets), height, width, facts)


def batch_inputs(sources: Sequence[Source]) -> dict[str, np.ndarray]:
    """Return the inputs that a batch of sources gives to the stages; no sources give none.

    Returns:
        'image' uint8 [B, H, W, 3]; for inpainting 'mask' float32 [B, 1, h, w]; where the bundle
        has several strengths 'step' int64 [1]. Of control images 'control' uint8 [B, H, W, 3] and
        'control_scale' float32 [B].

    """
    if not sources:
        return {}
    # All sources of a batch are for one task and one strength: the first tells which inputs.
    first = sources[0]
    if first.task == "control":
        scales = [source.scale for source in sources]
        return {
            "control": np.stack([source.image_HWC for source in sources]),
            "control_scale": np.asarray(scales, np.float32),
        }
    inputs = {"image": np.stack([source.image_HWC for source in sources])}
    masks = [source.mask_1hw for source in sources if source.mask_1hw is not None]
    if masks:
        inputs["mask"] = np.stack(masks)
    if first.step is not None:
        inputs["step"] = np.asarray([first.step], np.int64)
    return inputs


def trial_sources(bundle: Bundle, count: int) -> list[Source]:
    """Different sources of the bundle's own size, to try its stages with.

    Returns:
        ``count`` sources of noise; none for a bundle that makes images from text.

    """
    manifest = bundle.manifest
    if manifest.task == "generate":
        return []
    step = manifest.one_step
    numbers = np.random.default_rng(0)
    sources = []
    for _ in range(count):
        image_HWC = numbers.integers(0, 256, (step.height, step.width, 3), np.uint8)
        mask_1hw = None
        if manifest.task == "inpaint":
            mask_1hw = numbers.integers(0, 2, (1, *step.latent_shape[1:])).astype(np.float32)
        number = 0 if len(manifest.strengths) > 1 else None
        scale = 1.0 if manifest.task == "control" else None
        sources.append(Source(manifest.task, image_HWC, mask_1hw, number, scale))
    return sources


class EncodedImages:
    """The latents of the latest batch of source images.

    Several prompts and seeds of one image then need only one run of the VAE encoder.
    """

    def __init__(self) -> None:
        self._latest: tuple[np.ndarray, np.ndarray] | None = None

    def feed(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return ``inputs`` with the latents, 'source', in place of an 'image' that is known."""
        latest = self._latest  # read once: another thread may keep another batch meanwhile
        if "image" not in inputs or latest is None:
            return inputs
        image_BHWC, source_BCHW = latest
        if not np.array_equal(image_BHWC, inputs["image"]):
            return inputs
        known = {name: tensor for name, tensor in inputs.items() if name != "image"}
        known["source"] = source_BCHW
        return known

    def keep(self, image_BHWC: np.ndarray, source_BCHW: np.ndarray) -> None:
        """Remember the latents of a batch, and forget those of the batch before."""
        self._latest = (image_BHWC, source_BCHW)


def _read_large_enough(bundle: Bundle, image: ImageSource) -> np.ndarray:
    """Read an image of at least one latent cell, uint8 [H, W, 3]."""
    image_HWC = read_image(image)
    check_size(image_HWC, _pixels_per_latent(bundle))
    return image_HWC


def _fitted(
    bundle: Bundle, image_HWC: np.ndarray, height: int | None, width: int | None
) -> np.ndarray:
    """Crop and scale an image to a size that the bundle has; None is the bundle's own size."""
    _, latent_h, latent_w = latent_shape(bundle, height, width)
    factor = _pixels_per_latent(bundle)
    return fit_image(image_HWC, latent_h * factor, latent_w * factor)


def _pixels_per_latent(bundle: Bundle) -> int:
    """Return the side of a latent cell in pixels: 8 for Stable Diffusion."""
    step = bundle.manifest.one_step
    return step.height // step.latent_shape[1]


def _facts(task: Task, image_HWC: np.ndarray) -> dict[str, Any]:
    """Return the generation parameters that every task with a source image has."""
    return {"task": task, "source": _sha256(image_HWC)}


def _sha256(pixels: np.ndarray) -> str:
    """Hash the shape and the pixels: the same picture in another file format has the same hash."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
