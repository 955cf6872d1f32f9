"""How well an image follows the lines of a control image.

Shapes: N images, H, W image size in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from hipa_deploy.errors import HipaError


@dataclass(frozen=True)
class Agreement:
    """Of each image, float64 [N] in [0, 1].

    Attributes:
        precision: share of the image's edge pixels that lie near one of the control image.
        recall: share of the control image's edge pixels that lie near one of the image.
        f1: the harmonic mean of both; 0 where either has no edge.

    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def agreement(edges_NHW: np.ndarray, wanted_NHW: np.ndarray, tolerance: int) -> Agreement:
    """Compare edges with those of the control image.

    Args:
        edges_NHW: bool, edges of the images.
        wanted_NHW: bool, edges of the control images.
        tolerance: pixels that two edges may lie apart, along either axis.

    Raises:
        HipaError: the sets differ in shape.

    Example:
        >>> lines = np.zeros((1, 8, 8), bool)
        >>> lines[0, 4] = True
        >>> float(agreement(lines, np.roll(lines, 1, axis=1), tolerance=1).f1[0])
        1.0

    """
    if edges_NHW.shape != wanted_NHW.shape:
        raise HipaError(
            f"edges of shape {edges_NHW.shape} and {wanted_NHW.shape}. Expected equal shapes."
        )
    precision = []
    recall = []
    for edges_HW, wanted_HW in zip(edges_NHW, wanted_NHW, strict=True):
        precision.append(_share_near(edges_HW, wanted_HW, tolerance))
        recall.append(_share_near(wanted_HW, edges_HW, tolerance))
    precision_N = np.array(precision)
    recall_N = np.array(recall)
    total_N = precision_N + recall_N
    f1_N = 2 * precision_N * recall_N / np.where(total_N > 0, total_N, 1)
    return Agreement(precision_N, recall_N, f1_N)


def _share_near(edges_HW: np.ndarray, others_HW: np.ndarray, tolerance: int) -> float:
    """Share of edge pixels with another one at most ``tolerance`` away; 0 without an edge."""
    if not edges_HW.any():
        return 0.0
    others = Image.fromarray(others_HW.astype(np.uint8) * 255)
    near_HW = np.asarray(others.filter(ImageFilter.MaxFilter(2 * tolerance + 1))) > 0
    return float(near_HW[edges_HW].mean())
