"""The high-frequency promoted loss: Fourier components and edges (HiPA, arXiv 2311.18158).

The paper names both parts; their exact form is not public. What is here is this project's choice: a smooth radial
high-pass (a hard mask rings), complex differences (phase counts), and Sobel responses rather than their magnitude
(whose gradient is singular where an image is flat). Images are float [B, C, H, W] with values in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 0.2  # of the Nyquist frequency: where the high-pass reaches 1 - exp(-1/2) = 0.39


def high_pass(height: int, width: int, radius: float = RADIUS) -> Tensor:
    """H = 1 - exp(-r^2 / (2 radius^2)) on the FFT grid, r in units of Nyquist: float32 [H, W], zero at the mean."""
    vertical, horizontal = torch.fft.fftfreq(height) * 2, torch.fft.fftfreq(width) * 2
    squared_HW = vertical[:, None] ** 2 + horizontal[None, :] ** 2
    return 1 - torch.exp(-squared_HW / (2 * radius**2))


def high_frequencies(image_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """H . FFT2(image), orthonormal: complex [B, C, H, W]."""
    mask_HW = high_pass(image_BCHW.shape[-2], image_BCHW.shape[-1], radius).to(image_BCHW)
    return mask_HW * torch.fft.fft2(image_BCHW, norm="ortho")


def fourier_loss(image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """L_F = mean | H . (FFT(image) - FFT(target)) |, a scalar."""
    return high_frequencies(image_BCHW - target_BCHW, radius).abs().mean()


def amplitude_loss(image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """L_A = mean | |H . FFT(image)| - |H . FFT(target)| |, a scalar: how strong a detail is, wherever it lies.

    Ours. Where noise does not tell the phase, the least ``fourier_loss`` is at too small an amplitude: it blurs.
    """
    image, target = (high_frequencies(part, radius) for part in (image_BCHW, target_BCHW))
    return (modulus(image) - modulus(target)).abs().mean()


def modulus(spectrum: Tensor) -> Tensor:
    """|z| with a gradient at zero."""
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def sobel(image_BCHW: Tensor) -> Tensor:
    """Sobel-x and Sobel-y of every channel, scaled so that a ramp gives its slope per pixel: [B, 2 C, H - 2, W - 2]."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(image_BCHW) / 8
    channels = image_BCHW.shape[1]
    kernels = torch.stack([across, across.T]).unsqueeze(1).repeat(channels, 1, 1, 1)
    return F.conv2d(image_BCHW, kernels, groups=channels)


def edge_loss(image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """L_E = mean |Sobel(image) - Sobel(target)| over both directions, a scalar."""
    return sobel(image_BCHW - target_BCHW).abs().mean()


def high_frequency_energy(image_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """Mean |H . FFT(image)|^2 of each image, [B]: with H = 1 the mean square of its pixels (Parseval)."""
    return high_frequencies(image_BCHW, radius).abs().square().mean(dim=(1, 2, 3))
