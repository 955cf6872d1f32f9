"""The Fourier term of the high-frequency promoted loss (HiPA, arXiv 2311.18158).

    L_F = mean w | H . (FFT(image) - FFT(target)) |,    H = 1 - exp(-r^2 / (2 radius^2))

The paper names Fourier components; their exact form is not public. What is here is this project's choice: a smooth
radial high-pass (a hard mask rings) and complex differences (phase counts). w = 1, or focal: see ``fourier_loss``.
Images are float [B, C, H, W] with values in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipa_deploy.train.recipes.recipe import RADIUS

FLOOR = (
    1e-4  # mean power below which a band counts as empty, a window as flat: a hundredth of white
)


def high_pass(height: int, width: int, radius: float = RADIUS) -> Tensor:
    """H = 1 - exp(-r^2 / (2 radius^2)) on the FFT grid, r in units of Nyquist: float32 [H, W], zero at the mean."""
    return 1 - torch.exp(-_squared_frequency(height, width) / (2 * radius**2))


def high_frequencies(image_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """H . FFT2(image), orthonormal: complex [B, C, H, W]."""
    mask_HW = high_pass(image_BCHW.shape[-2], image_BCHW.shape[-1], radius).to(image_BCHW)
    return mask_HW * torch.fft.fft2(image_BCHW, norm="ortho")


def fourier_loss(
    image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS, focal: float = 0.0
) -> Tensor:
    """L_F, a scalar. With ``focal`` > 0 the worst frequencies weigh most, w = (|D| / max |D|)^focal.

    D is the masked difference, its maximum that of each channel's spectrum, and w has no gradient (Jiang et al. 2021,
    'Focal Frequency Loss for Image Reconstruction and Synthesis', equation 8; there w multiplies |D|^2).
    """
    error = high_frequencies(image_BCHW - target_BCHW, radius).abs()
    if focal:
        worst = error.detach().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
        error = (error.detach() / worst) ** focal * error
    return error.mean()


def amplitude_loss(image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """L_A = mean | |H . FFT(image)| - |H . FFT(target)| |, a scalar: how strong a detail is, wherever it lies.

    Ours. Where noise does not tell the phase, the least ``fourier_loss`` is at too small an amplitude: it blurs.
    """
    image, target = (high_frequencies(part, radius) for part in (image_BCHW, target_BCHW))
    return (modulus(image) - modulus(target)).abs().mean()


def fourier_similarity_loss(
    image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS
) -> Tensor:
    """L_F as a similarity: mean over octave bands of 1 - (2 Re <X, Y> + c) / (|X|^2 + |Y|^2 + c), a scalar.

    X and Y are the spectra of a channel in the bands radius to 2 radius, to 4 radius, … of the Nyquist frequency. Ours,
    SSIM's structure and contrast of each band (Wang et al. 2004, equation 13 without means). Where the student cannot
    know a detail's place a difference is least at zero, a blur; this is least where both are as strong, whatever they
    share. A band weighs the same however little energy it has.
    """
    image, target = (torch.fft.fft2(part, norm="ortho") for part in (image_BCHW, target_BCHW))
    bands_KHW = octaves(image_BCHW.shape[-2], image_BCHW.shape[-1], radius).to(image_BCHW)
    cross, own, other = (
        torch.einsum("bchw,khw->bck", power, bands_KHW)
        for power in ((image * target.conj()).real, image.abs().square(), target.abs().square())
    )
    return dissimilarity(cross, own, other)


def dissimilarity(cross: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """mean 1 - (2 <X, Y> + c) / (|X|^2 + |Y|^2 + c), a scalar, of bands' or windows' mean products and powers."""
    return (1 - (2 * cross + FLOOR) / (own + other + FLOOR)).mean()


def octaves(height: int, width: int, radius: float = RADIUS) -> Tensor:
    """Which frequencies belong to which band, float32 [K, H, W]: each band's sum to 1, or are 0 if it has none."""
    octave_HW = torch.log2(_squared_frequency(height, width).sqrt() / radius).floor()
    bands = torch.stack(
        [octave_HW == octave for octave in range(max(1, int(octave_HW.max()) + 1))]
    ).float()
    return bands / bands.sum(dim=(1, 2), keepdim=True).clamp_min(1)


def _squared_frequency(height: int, width: int) -> Tensor:
    """r^2 on the FFT grid, r in units of Nyquist: float32 [H, W]."""
    vertical, horizontal = torch.fft.fftfreq(height) * 2, torch.fft.fftfreq(width) * 2
    return vertical[:, None] ** 2 + horizontal[None, :] ** 2


def modulus(spectrum: Tensor) -> Tensor:
    """|z| with a gradient at zero."""
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def high_frequency_energy(image_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """Mean |H . FFT(image)|^2 of each image, [B]: with H = 1 the mean square of its pixels (Parseval)."""
    return high_frequencies(image_BCHW, radius).abs().square().mean(dim=(1, 2, 3))
