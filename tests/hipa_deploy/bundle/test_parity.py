import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.bundle.parity import compare
from hipa_deploy.errors import HipaError
from hipa_deploy.export.writer import check_parity as check

RAMP = np.linspace(0, 1, 100, dtype=np.float32)


def test_psnr_in_closed_form() -> None:
    """A constant error of one hundredth of the range is 40 dB."""
    result = compare(RAMP + np.float32(0.01), RAMP)
    assert result.psnr_db == pytest.approx(40, abs=1e-3)
    assert result.max_abs == pytest.approx(0.01, abs=1e-6)


def test_images_are_measured_against_255() -> None:
    image = np.full((2, 2), 100, np.uint8)
    assert compare(image + 1, image).psnr_db == pytest.approx(20 * np.log10(255))


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=20))
def test_equal_is_the_ceiling(values: list[float]) -> None:
    array = np.float32(values)
    result = compare(array, array)
    assert result.psnr_db == 200
    assert result.cosine == pytest.approx(1)


def test_gate_lets_good_through() -> None:
    assert check("unet", RAMP + np.float32(1e-5), RAMP, "fp32").psnr_db > 60


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (np.where(RAMP > 0.5, np.float32("nan"), RAMP), "NaN"),
        (np.where(RAMP > 0.5, np.float32("inf"), RAMP), "infinity"),
        (np.zeros_like(RAMP), "flat"),
        (RAMP[::-1], "dB"),
    ],
)
def test_gate_stops_bad(got: np.ndarray, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        check("unet", got, RAMP, "fp16")


def test_a_flat_output_in_float16_whose_sum_overflows() -> None:
    """As a context [1, 77, 2048] is: its standard deviation in float16 is infinite or NaN."""
    flat = np.full((1, 77, 2048), 3, np.float16)
    varied = flat.copy()
    varied[0, ::2] = -3
    with pytest.raises(HipaError, match="flat"):
        check("text_encoder", flat, varied, "fp16")
    check("text_encoder", varied, varied, "fp16")


def test_high_frequency_energy_in_closed_form() -> None:
    """Doubling the contrast of a pattern quadruples its energy; a flat image has no energy."""
    pattern = np.indices((8, 8)).sum(axis=0)[None, :, :, None] % 2
    weak, strong = (np.uint8(100 + step * pattern.repeat(3, axis=3)) for step in (20, 40))
    assert compare(strong, weak).high_frequency_ratio == pytest.approx(4)
    assert compare(weak, np.full_like(weak, 7)).high_frequency_ratio is None


def test_gate_stops_lost_detail() -> None:
    """A smooth ramp with a little texture: only the energy shows that the texture is lost."""
    ramp = np.linspace(0, 200, 64)[None, None, :, None].repeat(64, axis=1).repeat(3, axis=3)
    texture = 2 * (np.indices((64, 64)).sum(axis=0)[None, :, :, None] % 2)
    with pytest.raises(HipaError, match="high-frequency"):
        check("vae_decoder", np.uint8(ramp), np.uint8(ramp + texture), "fp16")
