from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipa_deploy.train.losses.frequency import (
    amplitude_loss,
    fourier_loss,
    fourier_similarity_loss,
    high_frequencies,
    high_frequency_energy,
    high_pass,
    octave_bands,
)


def wave(cycles: int, size: int = 32) -> torch.Tensor:
    """A horizontal cosine of amplitude 1, [1, 1, size, size]."""
    row = torch.cos(2 * math.pi * cycles * torch.arange(size) / size)
    return row.expand(1, 1, size, size).double()


def test_high_pass_is_zero_at_the_mean_and_one_far_out() -> None:
    mask = high_pass(16, 16, radius=0.2)
    assert mask[0, 0] == 0
    assert mask[8, 8] == pytest.approx(1, abs=1e-6)
    assert mask[0, 2] == pytest.approx(1 - math.exp(-(0.25**2) / (2 * 0.2**2)))


@pytest.mark.parametrize("cycles", [1, 4, 11])
def test_fourier_loss_of_a_wave(cycles: int) -> None:
    # Under the orthonormal transform a cosine has two conjugate coefficients of 32 / 2 each. The
    # loss is a mean over 32 * 32 frequencies.
    gain = 1 - math.exp(-((2 * cycles / 32) ** 2) / (2 * 0.2**2))
    got = fourier_loss(wave(cycles), torch.zeros(1, 1, 32, 32))
    assert got == pytest.approx(gain * 2 * 16 / 1024, rel=1e-5)


def test_brightness_does_not_matter_and_phase_does() -> None:
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert fourier_loss(image, image + 0.3) == pytest.approx(0, abs=1e-12)
    assert fourier_loss(image, image.roll(1, dims=3)) > 0.01


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_amplitude_loss_sees_strength_and_not_place(shift: int) -> None:
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    assert amplitude_loss(image, image.roll(shift, dims=2)) == pytest.approx(0, abs=1e-9)
    difference = float(fourier_loss(2 * image, image))
    assert amplitude_loss(2 * image, image) == pytest.approx(difference, rel=1e-6)


def test_octave_bands_divide_the_frequencies_above_the_radius() -> None:
    bands = octave_bands(32, 48, radius=0.2)
    frequency = (torch.fft.fftfreq(48) * 2).abs()
    assert torch.allclose(bands.sum(dim=(1, 2)), torch.ones(3))
    for row, low in zip(bands[:, 0], (0.2, 0.4, 0.8), strict=True):
        assert frequency[row > 0].min() >= low
    assert ((bands > 0).sum(dim=0) <= 1).all()
    assert (octave_bands(8, 8, radius=2) == 0).all()


def test_similarity_is_least_at_the_targets_energy_and_the_difference_below_it() -> None:
    """The student knows one half of the target and cannot know the other."""
    torch.manual_seed(0)
    known, unknown, other = torch.randn(3, 8, 1, 32, 32, dtype=torch.float64)
    image = known + unknown
    target = known + other
    scales = (0.25, 0.5, 1.0, 2.0)
    similarity = [fourier_similarity_loss(scale * image, target).item() for scale in scales]
    difference = [fourier_loss(scale * image, target).item() for scale in scales]
    assert scales[similarity.index(min(similarity))] == 1
    assert scales[difference.index(min(difference))] == 0.5


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_similarity_of_a_scaled_image_has_the_closed_form(scale: float) -> None:
    image = 100 * torch.randn(1, 2, 32, 32, dtype=torch.float64)  # far above the floor
    expected = 1 - 2 * scale / (scale**2 + 1)
    assert fourier_similarity_loss(scale * image, image).item() == pytest.approx(expected, abs=1e-6)


def test_focal_weighting_favours_the_worst_frequency() -> None:
    # Two waves, the second half as strong: w is 1 and 2^-focal, as the mask is nearly 1 at both.
    error = wave(11) + wave(9) / 2
    zero = torch.zeros(1, 1, 32, 32)
    strong = fourier_loss(wave(11), zero)
    weak = fourier_loss(wave(9) / 2, zero)
    for focal in (0.5, 2):
        expected = strong + weak * (weak / strong) ** focal
        got = fourier_loss(error, zero, focal=focal)
        assert got == pytest.approx(float(expected), rel=1e-4)


def test_focal_weights_carry_no_gradient() -> None:
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fourier_loss(image, torch.zeros_like(image), focal=1), image)
    spectrum = high_frequencies(image.detach()).abs()
    weights = spectrum / spectrum.max()
    (expected,) = torch.autograd.grad((weights * high_frequencies(image).abs()).mean(), image)
    assert torch.allclose(gradient, expected)


def test_energy_follows_parseval() -> None:
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    centred = image - image.mean(dim=(2, 3), keepdim=True)
    # With a tiny radius H is 1 everywhere but at the mean.
    got = high_frequency_energy(image, radius=1e-3)
    assert torch.allclose(got, centred.square().mean(dim=(1, 2, 3)))


@settings(max_examples=20, deadline=None)
@given(height=st.integers(3, 20), width=st.integers(3, 20), radius=st.floats(0.05, 1))
def test_losses_are_symmetric_and_zero_only_at_equality(
    height: int, width: int, radius: float
) -> None:
    x, y = torch.rand(2, 1, 1, height, width, dtype=torch.float64)
    assert fourier_loss(x, x, radius) == 0
    assert fourier_loss(x, y, radius) > 0
    assert fourier_loss(x, y, radius) == pytest.approx(float(fourier_loss(y, x, radius)))


@pytest.mark.parametrize("loss", [fourier_loss, amplitude_loss, fourier_similarity_loss])
def test_gradients(loss) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), image)


def test_gradient_at_equality_is_finite() -> None:
    focal = partial(fourier_loss, focal=1.0)
    for loss in (fourier_loss, amplitude_loss, fourier_similarity_loss, focal):
        image = torch.rand(1, 3, 8, 8, requires_grad=True)
        loss(image, image.detach()).backward()
        assert torch.isfinite(image.grad).all()


@settings(max_examples=60)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    radius=st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0]),
)
def test_bands_reach_the_highest_frequency_and_no_further(
    height: int, width: int, radius: float
) -> None:
    """The number of bands comes from the sizes; here from the frequencies themselves."""
    vertical = torch.fft.fftfreq(height, dtype=torch.float64) * 2
    horizontal = torch.fft.fftfreq(width, dtype=torch.float64) * 2
    highest = float((vertical[:, None] ** 2 + horizontal[None, :] ** 2).sqrt().max())
    octaves = math.floor(math.log2(highest / radius)) + 1 if highest > 0 else 0
    assert len(octave_bands(height, width, radius)) == max(1, octaves)
