"""Where in the spectrum images differ: radial power, and images that take low and high frequencies from two sets."""

from __future__ import annotations

import numpy as np
import torch

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.frequency import high_pass
from hipa_deploy.train.model.diffusion_model import to_float, to_uint8
from hipa_deploy.train.recipes.recipe import RADIUS


def radial_power(images_NHWC: np.ndarray) -> np.ndarray:
    """Mean |FFT|^2 of uint8 images [N, H, W, 3] by radius: float64 [min(H, W) // 2 + 1].

    Entry k is the mean over N, the channels and the places whose frequency rounds to k cycles an image side; the
    transform is orthonormal and pixels lie in [0, 1].
    """
    height, width = images_NHWC.shape[1:3]
    size = min(height, width)
    power_HW = torch.fft.fft2(_float64(images_NHWC), norm="ortho").abs().square().mean(dim=(0, 1))
    down, across = torch.fft.fftfreq(height) * size, torch.fft.fftfreq(width) * size
    ring_HW = (down[:, None] ** 2 + across[None, :] ** 2).sqrt().round().long()
    rings = size // 2 + 1
    inside = ring_HW < rings
    total = torch.bincount(ring_HW[inside], weights=power_HW[inside], minlength=rings)
    return (total / torch.bincount(ring_HW[inside], minlength=rings)).numpy()


def mixed(low_NHWC: np.ndarray, high_NHWC: np.ndarray, radius: float = RADIUS) -> np.ndarray:
    """Low frequencies of one set with the high ones of the other, uint8 [N, H, W, 3].

    IFFT((1 - H) FFT(low) + H FFT(high)) with the loss's high-pass H; HiPA's premise is that a one-step image with the
    high frequencies of many steps looks like many steps.
    """
    if low_NHWC.shape != high_NHWC.shape:
        raise HipaError(
            f"images of shapes {low_NHWC.shape} and {high_NHWC.shape}. Expected equal ones, [N, H, W, 3]."
        )
    _, height, width, _ = low_NHWC.shape
    mask_HW = high_pass(height, width, radius).double()
    low, high = (torch.fft.fft2(_float64(images)) for images in (low_NHWC, high_NHWC))
    return to_uint8(torch.fft.ifft2((1 - mask_HW) * low + mask_HW * high).real).numpy()


def _float64(images_NHWC: np.ndarray) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(images_NHWC))).double()
