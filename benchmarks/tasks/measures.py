"""What editing, inpainting and super-resolution are measured by: pure functions of uint8 images [N, H, W, 3].

A value for each image, [N], unless said otherwise; masks are [N, H, W], 1 where repainted. KID-Lite0, the paired
DISTS-like distance and the high-frequency ratio are those of ``hipa_deploy.train.evaluation.quality``, the retrieval heads those
of benchmarks/quality. The networks that published numbers of these tasks use (LPIPS' and DISTS' VGG16, CLIP, the DINO
of Splice's structure distance) are not among the project's dependencies: compare the values with each other only.
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

__all__ = ["choice_recall", "high_frequency_ratio", "kid_lite0", "masked_distance", "masked_psnr", "paired_distances",
           "psnr", "seam_energies", "seam_ratio", "structure_distance"]  # fmt: skip

CHUNK = 32
LUMA = (0.299, 0.587, 0.114)  # BT.601
TOLERANCE = 64  # an edge may lie one 64th of the image's side away


def psnr(images_NHWC: np.ndarray, truth_NHWC: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / MSE) in dB, float64 [N]; infinite where equal."""
    return masked_psnr(images_NHWC, truth_NHWC, np.ones(images_NHWC.shape[:3]))


def masked_psnr(
    images_NHWC: np.ndarray, truth_NHWC: np.ndarray, masks_NHW: np.ndarray
) -> np.ndarray:
    """PSNR of the pixels inside the mask, in dB, float64 [N]; infinite where equal."""
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
    """Perceptual distance inside the mask, float64 [N]: 0 when equal there, whatever lies outside.

    The masked region goes into the truth. LPIPS' squared differences of unit features (Zhang et al. 2018, equation 1)
    are then averaged over each map with the mask's share of every place as weight, rather than evenly: a small hole
    counts as much as a large one. With Lite0's features and equal channel weights: LPIPS-like, not LPIPS.
    """
    _check(images_NHWC, truth_NHWC, masks_NHW)
    backbone = backbone or _lite0()
    sets = (images_NHWC, truth_NHWC, masks_NHW)
    starts = range(0, len(images_NHWC), CHUNK)
    chunks = [_masked_chunk(backbone, *(part[n : n + CHUNK] for part in sets)) for n in starts]
    return torch.cat(chunks).double().numpy()


def _masked_chunk(
    backbone: Backbone, images_BHWC: np.ndarray, truth_BHWC: np.ndarray, masks_BHW: np.ndarray
) -> Tensor:
    mask_B1HW = torch.from_numpy((masks_BHW > 0).astype(np.float32))[:, None]
    truth_BCHW = _float(truth_BHWC)
    pasted_BCHW = torch.where(mask_B1HW > 0, _float(images_BHWC), truth_BCHW)
    pairs = zip(backbone(pasted_BCHW), backbone(truth_BCHW), strict=True)
    return torch.stack([_weighted_difference(x, y, mask_B1HW) for x, y in pairs]).sum(dim=0)


def seam_energies(images_NHWC: np.ndarray, masks_NHW: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels across the mask's border, in levels of [0, 1]: float64 [N].

    Of every pair of neighbours, beside or above each other, of which one lies inside; the mean over pairs and colours.

    Raises:
        HipaError: a mask without a border, or of another size.

    """
    _check(images_NHWC, images_NHWC, masks_NHW)
    inside_NHW, images = masks_NHW > 0, images_NHWC.astype(np.float64) / 255
    total_N, pairs_N = np.zeros(len(images)), np.zeros(len(images))
    for axis in (1, 2):
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
    """Mean seam energy of a set over the truth's: 1 at best, more where the border shows, less where it is smeared.

    A ratio of means, because the truth of one image may well be flat there. Wherever a composite has its seam but at
    the mask's border (a feather's far end, the latent cells around the hole), give that region as the mask.

    Raises:
        HipaError: as ``seam_energies``, or a truth that is flat across every border.

    """
    _check(images_NHWC, truth_NHWC, masks_NHW)
    truth = seam_energies(truth_NHWC, masks_NHW).mean()
    if truth == 0:
        raise HipaError(
            "the truth is flat across every mask's border: the seam energy has nothing to be divided by."
        )
    return float(seam_energies(images_NHWC, masks_NHW).mean() / truth)


def structure_distance(images_NHWC: np.ndarray, source_NHWC: np.ndarray) -> np.ndarray:
    """How far the edges of an edit lie from its source's, float64 [N] in [0, 2]: 1 - correlation of the edge maps.

    An edge map is the magnitude of the luminance's Sobel gradient, averaged over a 64th of the image's side, so that a
    shift of a pixel or two is forgiven. The correlation (Pearson's) ignores how strong edges are and which side is
    brighter: an edit that recolours keeps its structure. 0: edges in the same places; about 1: unrelated. An image
    without any edge has distance 1 to one with edges, 0 to another without.
    """
    _check(images_NHWC, source_NHWC)
    a_ND, b_ND = (_edges(images) for images in (images_NHWC, source_NHWC))
    norms_N = a_ND.norm(dim=1) * b_ND.norm(dim=1)
    correlation_N = (a_ND * b_ND).sum(dim=1) / norms_N.clamp_min(1e-12)
    both_flat_N = (a_ND.norm(dim=1) < 1e-6) & (b_ND.norm(dim=1) < 1e-6)
    return torch.where(both_flat_N, torch.zeros(()).double(), 1 - correlation_N).numpy()


@torch.no_grad()
def choice_recall(
    heads: tuple[nn.Linear, nn.Linear], images_NHWC: np.ndarray, texts_NKD: Tensor
) -> float:
    """Share of images that are nearest to the first of their K captions.

    ``heads`` are those of ``benchmarks.quality.retrieval.train_heads``, ``texts_NKD`` its ``sentence_vectors``' of the
    captions: for an edit, what was asked for, then the same thing in the other styles.
    """
    image_NW, text_NKW = (
        image_vectors(heads[0], lite0_features(images_NHWC)),
        text_vectors(heads[1], texts_NKD),
    )
    nearest_N = torch.einsum("nw,nkw->nk", image_NW, text_NKW).argmax(dim=1)
    return float((nearest_N == 0).float().mean())


def _weighted_difference(x_BCHW: Tensor, y_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """LPIPS' squared difference of one map, averaged with the mask's share of each place as weight: [B]."""
    weight_BHW = F.adaptive_avg_pool2d(mask_B1HW, x_BCHW.shape[-2:])[:, 0]
    x, y = (
        map_BCHW / (map_BCHW.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()
        for map_BCHW in (x_BCHW, y_BCHW)
    )
    return ((x - y).square().sum(dim=1) * weight_BHW).sum(dim=(1, 2)) / weight_BHW.sum(dim=(1, 2))


def _edges(images_NHWC: np.ndarray) -> Tensor:
    """Edge maps as rows with mean 0, float64 [N, H' W']."""
    luma_N1HW = (_float(images_NHWC).double() * torch.tensor(LUMA).double().view(1, 3, 1, 1)).sum(
        dim=1, keepdim=True
    )
    magnitude_N1HW = sobel(luma_N1HW).norm(dim=1, keepdim=True)
    reach = 1 + 2 * (min(images_NHWC.shape[1:3]) // TOLERANCE)
    blurred_ND = F.avg_pool2d(magnitude_N1HW, reach, stride=1).flatten(1)
    return blurred_ND - blurred_ND.mean(dim=1, keepdim=True)


def _float(images_NHWC: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(np.array(images_NHWC)))


@cache
def _lite0() -> Backbone:
    return load_backbone("lite0")


def _check(
    images_NHWC: np.ndarray, truth_NHWC: np.ndarray, masks_NHW: np.ndarray | None = None
) -> None:
    """Sizes agree, and every mask holds something."""
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
