from __future__ import annotations

import math

import numpy as np
import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.spectrum import mixed, radial_power


def wave(cycles: int, size: int = 32, amplitude: float = 100.0) -> np.ndarray:
    """A horizontal cosine around grey, uint8 [1, size, size, 3]."""
    values = 127 + amplitude * np.cos(2 * math.pi * cycles * np.arange(size) / size)
    return np.broadcast_to(
        values.round().astype(np.uint8)[None, None, :, None], (1, size, size, 3)
    ).copy()


@pytest.mark.parametrize("cycles", [3, 9])
def test_the_power_of_a_wave_lies_at_its_radius(cycles: int) -> None:
    power = radial_power(wave(cycles))
    assert power.shape == (17,)
    assert power[1:].argmax() + 1 == cycles
    others = np.delete(power, [0, cycles])
    assert others.max() < 1e-3 * power[cycles]  # of rounding to 8 bits


def test_power_follows_parseval_and_spans_oblong_images() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    assert radial_power(noise).shape == (9,)
    assert radial_power(noise)[2:].mean() == pytest.approx(
        (noise / 255).var(), rel=0.15
    )  # white: flat


def test_mixed_takes_each_side_from_its_set() -> None:
    low = wave(1)
    high = wave(12)
    both = mixed(low, high, radius=0.2)
    gain = 1 - math.exp(-((2 / 32) ** 2) / (2 * 0.2**2))
    expected = 127 + (1 - gain) * (low.astype(float) - 127) + (high.astype(float) - 127)
    inside = (expected > 2) & (expected < 253)
    assert np.abs(both - expected)[inside].max() <= 2
    assert np.abs(mixed(low, low).astype(int) - low).max() <= 1


def test_mixed_needs_equal_shapes() -> None:
    with pytest.raises(HipaError, match=r"Expected equal ones, \[N, H, W, 3\]"):
        mixed(wave(1), wave(1, size=16))
