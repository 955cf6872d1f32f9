"""The measures of editing, inpainting and super-resolution: pure functions of uint8 images.

KID-Lite0, the paired DISTS-like distance and the high-frequency ratio are those of
``hipa_deploy.train.evaluation.quality``; the retrieval heads are those of benchmarks/quality. The
networks that published numbers of these tasks use (LPIPS' and DISTS' VGG16, CLIP, the DINO of
Splice's structure distance) are not among the project's dependencies: compare the values with each
other only.

Shapes: N images, B images of a chunk, H, W image size in pixels, C channels, K captions of an
image, D features, W width of the retrieval's common space. Masks are [N, H, W], 1 where repainted.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.retrieval import image_vectors, text_vectors
from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.quality import (
    high_frequency_ratio,
    kid_lite0,
    lite0_features,
    paired_distances,
)
from hipa_deploy.train.losses.backbones import Backbone, load_backbone
from hipa_deploy.train.losses.edge import sobel
from hipa_deploy.train.losses.lpips import EPSILON
from hipa_deploy.train.model.diffusion_model import to_float

# The measures of this module, and those of quality.py that the benchmark uses beside them.
__all__ = [
    "choice_recall",
    "high_frequency_ratio",
    "kid_lite0",
    "masked_distance",
    "masked_psnr",
    "paired_distances",
    "psnr",
    "seam_energies",
    "seam_ratio",
    "structure_distance",
]

CHUNK = 32  # images that go through a network at once
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in BT.601
TOLERANCE = 64  # an edge may lie one 64th of the image's side away


def psnr(images_NHWC: np.ndarray, truth_NHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image: 10 log10(255^2 / MSE).

    Args:
        images_NHWC: uint8 [N, H, W, 3].
        truth_NHWC: uint8, of the same shape.

    Returns:
        float64 [N], in dB; infinite where both images are equal.

    Raises:
        HipaError: The sets differ in shape.

    """
    return masked_psnr(images_NHWC, truth_NHWC, np.ones(images_NHWC.shape[:3]))


def masked_psnr(
    images_NHWC: np.ndarray, truth_NHWC: np.ndarray, masks_NHW: np.ndarray
) -> np.ndarray:
    """``psnr`` of the pixels inside each mask.

    Args:
        images_NHWC: uint8 [N, H, W, 3].
        truth_NHWC: uint8, of the same shape.
        masks_NHW: Above 0 where a pixel counts.

    Returns:
        float64 [N], in dB; infinite where both images are equal inside the mask.

    Raises:
        HipaError: The sets differ in shape, or a mask is empty.

    """
    _check(images_NHWC, truth_NHWC, masks_NHW)
    squared_NHW = np.square(images_NHWC.astype(np.float64) - truth_NHWC).mean(axis=3)
    inside_NHW = masks_NHW > 0
    error_N = (squared_NHW * inside_NHW).sum(axis=(1, 2)) / inside_NHW.sum(axis=(1, 2))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error_N)


@torch.no_grad()
def masked_distance(
    images_NHWC: np.ndarray,
    truth_NHWC: np.ndarray,
    masks_NHW: np.ndarray,
    backbone: Backbone | None = None,
) -> np.ndarray:
    """Perceptual distance inside each mask, which does not depend on what lies outside.

    The region inside the mask is pasted into the truth. LPIPS' squared differences of unit features
    (Zhang et al. 2018, equation 1) are then averaged over each feature map, with the mask's share
    of every place as its weight instead of evenly: a small hole counts as much as a large one. With
    Lite0's features and equal channel weights this is LPIPS-like, not LPIPS.

    Args:
        images_NHWC: uint8 [N, H, W, 3].
        truth_NHWC: uint8, of the same shape.
        masks_NHW: Above 0 where a pixel counts.
        backbone: Images float32 [B, 3, H, W] in [0, 1] -> feature maps; None is Lite0.

    Returns:
        float64 [N]: 0 where both images are equal inside the mask.

    Raises:
        HipaError: The sets differ in shape, or a mask is empty.

    """
    _check(images_NHWC, truth_NHWC, masks_NHW)
    backbone = backbone or _lite0()
    chunks = []
    for start in range(0, len(images_NHWC), CHUNK):
        chunk = slice(start, start + CHUNK)
        chunks.append(
            _masked_chunk(backbone, images_NHWC[chunk], truth_NHWC[chunk], masks_NHW[chunk])
        )
    return torch.cat(chunks).double().numpy()


def _masked_chunk(
    backbone: Backbone, images_BHWC: np.ndarray, truth_BHWC: np.ndarray, masks_BHW: np.ndarray
) -> Tensor:
    """``masked_distance`` of one chunk, float32 [B]."""
    mask_B1HW = torch.from_numpy((masks_BHW > 0).astype(np.float32))[:, None]
    truth_BCHW = _float(truth_BHWC)
    pasted_BCHW = torch.where(mask_B1HW > 0, _float(images_BHWC), truth_BCHW)
    differences = []
    for pasted, truth in zip(backbone(pasted_BCHW), backbone(truth_BCHW), strict=True):
        differences.append(_weighted_difference(pasted, truth, mask_B1HW))
    return torch.stack(differences).sum(dim=0)


def seam_energies(images_NHWC: np.ndarray, masks_NHW: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels across each mask's border.

    The mean is over the colours and over all pairs of neighbours, side by side or one above the
    other, of which one lies inside the mask.

    Args:
        images_NHWC: uint8 [N, H, W, 3].
        masks_NHW: Above 0 inside.

    Returns:
        float64 [N] in [0, 1], in levels of [0, 1].

    Raises:
        HipaError: A mask has no border, is empty, or has another size.

    """
    _check(images_NHWC, images_NHWC, masks_NHW)
    inside_NHW = masks_NHW > 0
    images = images_NHWC.astype(np.float64) / 255
    total_N = np.zeros(len(images))
    pairs_N = np.zeros(len(images))
    for axis in (1, 2):
        # The border lies where the mask changes from one pixel to the next.
        crosses_NHW = np.diff(inside_NHW, axis=axis)
        step_NHW = np.abs(np.diff(images, axis=axis)).mean(axis=3)
        total_N += (step_NHW * crosses_NHW).sum(axis=(1, 2))
        pairs_N += crosses_NHW.sum(axis=(1, 2))
    if not pairs_N.all():
        raise HipaError(
            f"mask {int(pairs_N.argmin())} is full: it has no seam. Expected a border in every one."
        )
    return total_N / pairs_N


def seam_ratio(images_NHWC: np.ndarray, truth_NHWC: np.ndarray, masks_NHW: np.ndarray) -> float:
    """Mean seam energy of an image set over that of the truth.

    It is a ratio of means, because the truth of a single image may well be flat there. Where the
    seam of a composite lies elsewhere than at the mask's border (at the far end of a feather, or
    around the latent cells of the hole), pass that region as the mask.

    Args:
        images_NHWC: uint8 [N, H, W, 3].
        truth_NHWC: uint8, of the same shape.
        masks_NHW: Above 0 inside.

    Returns:
        1 at best, above 1 where the border shows, below 1 where it is blurred.

    Raises:
        HipaError: As ``seam_energies``, or a truth that is flat across every border.

    """
    _check(images_NHWC, truth_NHWC, masks_NHW)
    truth = seam_energies(truth_NHWC, masks_NHW).mean()
    if truth == 0:
        raise HipaError(
            "the truth is flat across every mask's border: the ratio of seam energies would divide "
            "by zero. Expected images with some detail at the borders."
        )
    return float(seam_energies(images_NHWC, masks_NHW).mean() / truth)


def structure_distance(images_NHWC: np.ndarray, source_NHWC: np.ndarray) -> np.ndarray:
    """How far the edges of an edit lie from those of its source: 1 - correlation of the edge maps.

    An edge map is the magnitude of the luminance's Sobel gradient, averaged over a 64th of the
    image's side, so that a shift of a pixel or two is forgiven. The correlation (Pearson's) ignores
    how strong edges are and which side of them is brighter: an edit that recolours keeps its
    structure.

    Args:
        images_NHWC: uint8 [N, H, W, 3].
        source_NHWC: uint8, of the same shape.

    Returns:
        float64 [N] in [0, 2]. 0: edges in the same places; about 1: unrelated. An image without any
        edge has distance 1 to one with edges and 0 to another one without.

    Raises:
        HipaError: The sets differ in shape.

    """
    _check(images_NHWC, source_NHWC)
    a_ND = _edges(images_NHWC)
    b_ND = _edges(source_NHWC)
    norm_a_N = a_ND.norm(dim=1)
    norm_b_N = b_ND.norm(dim=1)
    norms_N = norm_a_N * norm_b_N
    correlation_N = (a_ND * b_ND).sum(dim=1) / norms_N.clamp_min(1e-12)
    both_flat_N = (norm_a_N < 1e-6) & (norm_b_N < 1e-6)
    return torch.where(both_flat_N, torch.zeros(()).double(), 1 - correlation_N).numpy()


@torch.no_grad()
def choice_recall(
    heads: tuple[nn.Linear, nn.Linear], images_NHWC: np.ndarray, texts_NKD: Tensor
) -> float:
    """Share of images that are nearest to the first of their K captions.

    Args:
        heads: Image head and text head of ``benchmarks.quality.retrieval.train_heads``.
        images_NHWC: uint8 [N, H, W, 3].
        texts_NKD: Sentence vectors of each image's captions: for an edit its prompt, then the same
            thing in the other styles.

    Returns:
        In [0, 1].

    """
    image_NW = image_vectors(heads[0], lite0_features(images_NHWC))
    text_NKW = text_vectors(heads[1], texts_NKD)
    nearest_N = torch.einsum("nw,nkw->nk", image_NW, text_NKW).argmax(dim=1)
    return float((nearest_N == 0).float().mean())


def _weighted_difference(x_BCHW: Tensor, y_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """LPIPS' squared difference of one map [B], averaged with the mask's share of each place."""
    weight_BHW = F.adaptive_avg_pool2d(mask_B1HW, x_BCHW.shape[-2:])[:, 0]
    squared_BHW = (_unit(x_BCHW) - _unit(y_BCHW)).square().sum(dim=1)
    return (squared_BHW * weight_BHW).sum(dim=(1, 2)) / weight_BHW.sum(dim=(1, 2))


def _unit(map_BCHW: Tensor) -> Tensor:
    """Features of unit length at each place, as LPIPS has them."""
    return map_BCHW / (map_BCHW.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()


def _edges(images_NHWC: np.ndarray) -> Tensor:
    """Edge maps as rows with mean 0, float64 [N, H' W']."""
    weights_1C11 = torch.tensor(LUMA).double().view(1, 3, 1, 1)
    luma_N1HW = (_float(images_NHWC).double() * weights_1C11).sum(dim=1, keepdim=True)
    magnitude_N1HW = sobel(luma_N1HW).norm(dim=1, keepdim=True)

    # An odd window, so that it has a middle.
    window = 1 + 2 * (min(images_NHWC.shape[1:3]) // TOLERANCE)
    blurred_ND = F.avg_pool2d(magnitude_N1HW, window, stride=1).flatten(1)
    return blurred_ND - blurred_ND.mean(dim=1, keepdim=True)


def _float(images_NHWC: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [0, 1], copied: torch wants it writable."""
    return to_float(torch.from_numpy(np.array(images_NHWC)))


@cache
def _lite0() -> Backbone:
    return load_backbone("lite0")


def _check(
    images_NHWC: np.ndarray, truth_NHWC: np.ndarray, masks_NHW: np.ndarray | None = None
) -> None:
    """Raise HipaError unless all sizes agree and no mask is empty."""
    if images_NHWC.shape != truth_NHWC.shape:
        raise HipaError(
            f"images of shapes {images_NHWC.shape} and {truth_NHWC.shape}. Expected equal ones."
        )
    if masks_NHW is None:
        return
    if masks_NHW.shape != images_NHWC.shape[:3]:
        raise HipaError(
            f"masks of shape {masks_NHW.shape} for images {images_NHWC.shape}. Expected [N, H, W]."
        )
    if not (masks_NHW > 0).any(axis=(1, 2)).all():
        raise HipaError("a mask is empty. Expected a region to measure in every one.")
