"""The watermark survives what the documentation promises, and is not seen where there is none.

The figures of the documentation are from benchmarks/watermark.py, on photographs.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.errors import HipaError, HipaWarning
from hipa_deploy.marks import watermark
from hipa_deploy.marks.payload_code import CODED_BITS, decode_payload, encode_payload
from hipa_deploy.marks.watermark import add_watermark, check_payload, waves
from hipa_deploy.marks.watermark_reader import LEAST_SCORE, mark_readably, read_watermark
from tests.traced_memory import traced_peak

PAYLOAD = 0xC0FFEE42
FIRST_CYCLES = [[-16, 1], [-11, 11], [15, 3]]
FIRST_QUARTERS = [3, 3, 3, 2, 2, 3]


def picture(side: int = 512, seed: int = 0) -> np.ndarray:
    """Noise with the spectrum of a photograph, 1 / f."""
    numbers = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) + 1 / side
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(numbers.normal(size=(side, side))) / frequency
        plane = np.fft.ifft2(spectrum).real
        planes.append(128 + 40 * plane / plane.std())
    shared = planes[0]
    mixed = [0.7 * shared + 0.3 * plane for plane in planes]
    return np.clip(np.stack(mixed, axis=-1), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def marked() -> np.ndarray:
    return add_watermark(picture(), PAYLOAD)


def jpeg(image_HWC: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def rescale(image_HWC: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HWC).resize((width, height)))


def test_every_payload_comes_back() -> None:
    numbers = np.random.default_rng(0)
    for payload in (0, 1, 2**32 - 1, *numbers.integers(2**32, size=20)):
        coded = encode_payload(int(payload))
        assert decode_payload(coded) == payload
        assert decode_payload(coded + numbers.normal(scale=0.8, size=CODED_BITS)) == payload


def test_noise_is_no_payload() -> None:
    numbers = np.random.default_rng(0)
    read = [decode_payload(numbers.normal(size=CODED_BITS)) for _ in range(300)]
    assert read.count(None) == 300


def test_the_mark_is_faint_and_the_same_each_time(marked: np.ndarray) -> None:
    error = np.mean((marked.astype(float) - picture()) ** 2)
    assert 10 * np.log10(255**2 / error) > 37  # of a picture that is all texture
    assert (add_watermark(picture(), PAYLOAD) == marked).all()


def test_the_pattern_never_changes() -> None:
    """Images that were marked with an earlier version must stay readable."""
    cycles_K2, phases_K = waves()
    assert len(cycles_K2) == 710
    assert cycles_K2[:3].tolist() == FIRST_CYCLES
    quarters = np.round(np.angle(phases_K[:6]) / (np.pi / 2)) % 4
    assert quarters.tolist() == FIRST_QUARTERS


@pytest.mark.parametrize(
    "attack",
    [
        lambda image: image,
        lambda image: jpeg(image, 75),
        lambda image: rescale(image, 256, 256),
        lambda image: rescale(image, 384, 385),
        lambda image: rescale(image, 1024, 1024),
        lambda image: image[31:, 20:-23],
        lambda image: jpeg(rescale(image[20:-6, 9:-17], 243, 243), 75),
    ],
)
def test_it_survives(marked: np.ndarray, attack: object) -> None:
    found = read_watermark(attack(marked))  # type: ignore[operator]
    assert found.payload == PAYLOAD
    assert found.score > LEAST_SCORE + 2


def test_other_sizes_and_a_flat_image() -> None:
    for image_HWC in (picture(700)[:300], np.full((256, 400, 3), 250, np.uint8)):
        assert read_watermark(add_watermark(image_HWC, 7)).payload == 7


def test_an_unmarked_image_has_none() -> None:
    for seed in range(5):
        found = read_watermark(picture(320, seed))
        assert found.payload is None
        assert found.score < LEAST_SCORE


def test_an_image_of_hard_detail_gets_a_stronger_mark() -> None:
    numbers = np.random.default_rng(0)
    cells = numbers.integers(0, 256, (86, 86, 3), np.uint8)
    image_HWC = cells.repeat(3, axis=0).repeat(3, axis=1)[:256, :256]
    usual = add_watermark(image_HWC, PAYLOAD)
    marked = mark_readably(image_HWC, PAYLOAD)
    assert (
        np.abs(marked.astype(int) - image_HWC).sum() > np.abs(usual.astype(int) - image_HWC).sum()
    )
    assert (mark_readably(picture(), PAYLOAD) == add_watermark(picture(), PAYLOAD)).all()


def test_a_mark_that_cannot_be_read_is_warned_of() -> None:
    checks = (np.indices((256, 256)).sum(axis=0) // 4 % 2 * 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 2, (256, 256), np.uint8) * np.uint8(255)
    hard_HW = checks ^ noise.repeat(4, 0)[:256].repeat(4, 1)[:, :256]
    with pytest.warns(HipaWarning, match="cannot be read"):
        mark_readably(np.stack([hard_HW] * 3, axis=-1), 1)


def test_what_is_too_small_or_too_large() -> None:
    with pytest.raises(HipaError, match="64x64 pixels is too small for the watermark"):
        add_watermark(np.zeros((64, 64, 3), np.uint8), 1)
    with pytest.raises(HipaError, match="8 hexadecimal digits"):
        check_payload(2**32)
    assert read_watermark(np.zeros((64, 64, 3), np.uint8)).payload is None


def test_a_large_image_is_marked_in_little_more_than_its_own_memory() -> None:
    image_HWC = np.zeros((32768, 256, 3), np.uint8)
    with traced_peak() as peak:
        add_watermark(image_HWC, PAYLOAD)
        most = peak()
    assert most < 2 * image_HWC.nbytes


def test_bands_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tall_HWC = picture(1024)[:, :300]
    banded_HWC = add_watermark(tall_HWC, PAYLOAD)
    monkeypatch.setattr(watermark, "_BAND", len(tall_HWC))
    np.testing.assert_array_equal(banded_HWC, add_watermark(tall_HWC, PAYLOAD))
