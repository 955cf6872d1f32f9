"""The Fourier term of the high-frequency promoted loss.

    L_F = mean w | H . (FFT(image) - FFT(target)) |,    H = 1 - exp(-r^2 / (2 radius^2))

HiPA (arXiv 2311.18158) names Fourier components; their exact form is not public
(docs/explanation/hipa.md). What is here is this project's choice: a smooth radial high-pass, as a
hard mask rings, and complex differences, so that phase counts. The weight w is 1, or focal as in
``fourier_loss``.

Shape suffixes: B batch, C channels, H W image or spectrum size, K frequency bands. Images are
float, in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hipa_deploy.train.recipes.loss_settings import RADIUS

# c of the similarities: mean power below which a band counts as empty and a window as flat. It is
# the power of a hundredth of white.
POWER_FLOOR = 1e-4


def high_pass(height: int, width: int, radius: float = RADIUS) -> Tensor:
    """H = 1 - exp(-r^2 / (2 radius^2)) on the FFT grid: float32 [H, W], zero at the mean.

    Args:
        height: H.
        width: W.
        radius: In units of the Nyquist frequency, as r.

    """
    return 1 - torch.exp(-_squared_frequency(height, width) / (2 * radius**2))


def high_frequencies(image_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """H . FFT2(image), orthonormal: complex [B, C, H, W]."""
    mask_HW = high_pass(image_BCHW.shape[-2], image_BCHW.shape[-1], radius).to(image_BCHW)
    return mask_HW * torch.fft.fft2(image_BCHW, norm="ortho")


def fourier_loss(
    image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS, focal: float = 0.0
) -> Tensor:
    """L_F, a scalar.

    With ``focal`` > 0 the worst frequencies weigh most: w = (|D| / max |D|)^focal, where D is the
    masked difference and the maximum is that of each channel's spectrum. w has no gradient (Jiang
    et al. 2021, 'Focal Frequency Loss for Image Reconstruction and Synthesis', equation 8; there w
    multiplies |D|^2).

    Args:
        image_BCHW: Float [B, C, H, W].
        target_BCHW: The same.
        radius: Of the high-pass, in units of the Nyquist frequency.
        focal: Exponent of the weight; 0 weighs all frequencies alike.

    Example:
        >>> image = torch.rand(2, 3, 64, 64)
        >>> fourier_loss(image, image)
        tensor(0.)

    """
    # The transform is linear: one of the difference is the difference of two.
    error = high_frequencies(image_BCHW - target_BCHW, radius).abs()
    if focal:
        worst = error.detach().amax(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
        error = (error.detach() / worst) ** focal * error
    return error.mean()


def amplitude_loss(image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """L_A = mean | |H . FFT(image)| - |H . FFT(target)| |, a scalar.

    Ours. It compares how strong a detail is, wherever it lies: where the noise does not tell the
    student the phase, ``fourier_loss`` is least at too small an amplitude, which is a blur.
    """
    image = high_frequencies(image_BCHW, radius)
    target = high_frequencies(target_BCHW, radius)
    return (modulus(image) - modulus(target)).abs().mean()


def fourier_similarity_loss(
    image_BCHW: Tensor, target_BCHW: Tensor, radius: float = RADIUS
) -> Tensor:
    """L_F as a similarity, a scalar.

        mean over octave bands of 1 - (2 Re <X, Y> + c) / (|X|^2 + |Y|^2 + c)

    X and Y are the spectra of a channel in the bands from ``radius`` to 2 ``radius``, to 4
    ``radius`` and so on, in units of the Nyquist frequency.

    Ours: SSIM's structure and contrast of each band (Wang et al. 2004, equation 13 without means).
    Where the student cannot know the place of a detail, a difference is least at zero, a blur. This
    is least where both are as strong, even if they do not lie in the same place. All bands weigh
    the same, however little energy they have.
    """
    image = torch.fft.fft2(image_BCHW, norm="ortho")
    target = torch.fft.fft2(target_BCHW, norm="ortho")
    bands_KHW = octave_bands(image_BCHW.shape[-2], image_BCHW.shape[-1], radius).to(image_BCHW)

    cross = (image * target.conj()).real
    power = image.abs().square()
    target_power = target.abs().square()
    return dissimilarity(
        _band_means(cross, bands_KHW),
        _band_means(power, bands_KHW),
        _band_means(target_power, bands_KHW),
    )


def dissimilarity(cross: Tensor, power: Tensor, target_power: Tensor) -> Tensor:
    """mean 1 - (2 <X, Y> + c) / (|X|^2 + |Y|^2 + c), a scalar.

    Args:
        cross: Mean product <X, Y> of each band or window, any shape.
        power: Mean power |X|^2 of the same.
        target_power: Mean power |Y|^2 of the same.

    """
    return (1 - (2 * cross + POWER_FLOOR) / (power + target_power + POWER_FLOOR)).mean()


def octave_bands(height: int, width: int, radius: float = RADIUS) -> Tensor:
    """The share of every frequency in the mean of each octave band, float32 [K, H, W].

    Band k holds the frequencies from 2^k ``radius`` up to 2^(k + 1) ``radius``, in units of the
    Nyquist frequency. The shares of a band add up to 1, or are all 0 if it has no frequency.
    """
    octave_HW = torch.log2(_squared_frequency(height, width).sqrt() / radius).floor()
    # At least one band, even where the image is too small to have frequencies above the radius.
    # Counted from the sizes and not from the tensor: a prediction runs on tensors without values.
    count = max(1, _highest_octave(height, width, radius) + 1)
    bands_KHW = torch.stack([octave_HW == octave for octave in range(count)]).float()
    return bands_KHW / bands_KHW.sum(dim=(1, 2), keepdim=True).clamp_min(1)


def _highest_octave(height: int, width: int, radius: float) -> int:
    """The octave of the highest frequency of the FFT grid, which lies in its corner."""
    # In units of the Nyquist frequency: 1 of an even size, (n - 1) / n of an odd one.
    highest_row = 2 * (height // 2) / height
    highest_column = 2 * (width // 2) / width
    highest = math.hypot(highest_row, highest_column)
    if highest == 0:  # a single pixel has no frequency but the mean
        return -1
    return math.floor(math.log2(highest / radius))


def _band_means(values_BCHW: Tensor, bands_KHW: Tensor) -> Tensor:
    """Mean of each band: [B, C, K]."""
    return torch.einsum("bchw,khw->bck", values_BCHW, bands_KHW)


def _squared_frequency(height: int, width: int) -> Tensor:
    """r^2 on the FFT grid, r in units of the Nyquist frequency: float32 [H, W]."""
    vertical_H = torch.fft.fftfreq(height) * 2
    horizontal_W = torch.fft.fftfreq(width) * 2
    return vertical_H[:, None] ** 2 + horizontal_W[None, :] ** 2


def modulus(spectrum: Tensor) -> Tensor:
    """|z| of a complex tensor, with a finite gradient at zero."""
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def high_frequency_energy(image_BCHW: Tensor, radius: float = RADIUS) -> Tensor:
    """Mean |H . FFT(image)|^2 of each image, [B].

    With H = 1 it would be the mean square of the image's pixels (Parseval).
    """
    return high_frequencies(image_BCHW, radius).abs().square().mean(dim=(1, 2, 3))
