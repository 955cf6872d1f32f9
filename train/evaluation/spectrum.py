"""Where in the spectrum images differ: radial power, and images mixed from two sets.

Shapes: N images of a set, C = 3 channels, H, W image size in pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.frequency import high_pass
from hipa_deploy.train.model.diffusion_model import to_float, to_uint8
from hipa_deploy.train.recipes.loss_settings import RADIUS


def radial_power(images_NHWC: np.ndarray) -> np.ndarray:
    """Mean power |FFT|^2 of an image set by radius in the frequency plane.

    Entry k is the mean over N, the channels, and the places of the transform whose frequency rounds
    to k cycles per image side (the shorter side). The transform is orthonormal and pixels lie in
    [0, 1], so by Parseval's theorem the mean of the power over all places is the mean square of the
    pixels.

    Args:
        images_NHWC: uint8 [N, H, W, 3].

    Returns:
        float64 [min(H, W) // 2 + 1], each at least 0; entry 0 is the power of the mean colour.

    """
    height, width = images_NHWC.shape[1:3]
    size = min(height, width)
    power_HW = torch.fft.fft2(_float64(images_NHWC), norm="ortho").abs().square().mean(dim=(0, 1))

    # The ring of each place: its frequency in cycles per shorter side, rounded.
    down_H = torch.fft.fftfreq(height) * size
    across_W = torch.fft.fftfreq(width) * size
    ring_HW = (down_H[:, None] ** 2 + across_W[None, :] ** 2).sqrt().round().long()

    # The corners beyond the Nyquist frequency belong to no whole ring and are left out.
    rings = size // 2 + 1
    inside = ring_HW < rings
    total = torch.bincount(ring_HW[inside], weights=power_HW[inside], minlength=rings)
    return (total / torch.bincount(ring_HW[inside], minlength=rings)).numpy()


def mixed(low_NHWC: np.ndarray, high_NHWC: np.ndarray, radius: float = RADIUS) -> np.ndarray:
    """Join the low frequencies of one image set with the high frequencies of another.

    The result is IFFT((1 - H) FFT(low) + H FFT(high)), with the Gaussian high-pass H of the
    training loss. HiPA's premise (arXiv 2311.18158) is that a one-step image with the high
    frequencies of many steps looks like many steps.

    Args:
        low_NHWC: uint8 [N, H, W, 3].
        high_NHWC: uint8, of the same shape.
        radius: Radius of the high-pass, in units of the Nyquist frequency.

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        HipaError: The two sets differ in shape.

    """
    if low_NHWC.shape != high_NHWC.shape:
        raise HipaError(
            f"images of shapes {low_NHWC.shape} and {high_NHWC.shape}. "
            "Expected equal ones, [N, H, W, 3]."
        )

    # The FFT is linear, so the two parts add up to an image where both sets are the same one.
    _, height, width, _ = low_NHWC.shape
    mask_HW = high_pass(height, width, radius).double()
    low = torch.fft.fft2(_float64(low_NHWC))
    high = torch.fft.fft2(_float64(high_NHWC))
    return to_uint8(torch.fft.ifft2((1 - mask_HW) * low + mask_HW * high).real).numpy()


def _float64(images_NHWC: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float64 [N, 3, H, W] in [0, 1]: a float32 FFT loses small powers."""
    return to_float(torch.from_numpy(np.array(images_NHWC))).double()
