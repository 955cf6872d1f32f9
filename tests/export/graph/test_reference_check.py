"""What PyTorch's reference may be, at the limits."""

from __future__ import annotations

import numpy as np
import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.reference_check import MAKERS, check_reference


def noise(size: float) -> np.ndarray:
    """Of a root mean square of ``size`` exactly."""
    values = np.random.default_rng(0).standard_normal((2, 4, 8, 8))
    return np.float32(size * values / np.sqrt(np.mean(values**2)))


@pytest.mark.parametrize("key", [*MAKERS, "output_1", "latents_2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_with_its_part(key: str, bad: float) -> None:
    value = noise(1)
    value[1, 2, 3, 4] = bad
    with pytest.raises(HipaError, match=rf"gives NaN or infinity .*\({key}\). Check that part"):
        check_reference({"tokens": np.arange(3), key: value})


def test_a_prediction_has_the_size_of_noise() -> None:
    assert check_reference({"output": noise(99)}) == []
    with pytest.raises(HipaError, match=r"prediction has a root mean square of 101 \(output_1\)"):
        check_reference({"output_1": noise(101)})


def test_latents_that_no_decoder_decodes() -> None:
    assert check_reference({"latents": noise(4.9), "latents_1": noise(0)}) == []
    (doubt,) = check_reference({"latents": noise(15)})
    assert "root mean square of 15 (latents), and those of a trained model about 1" in doubt
    # Untrained weights at the least signal: they are doubtful, and no error.
    assert len(check_reference({"latents": noise(1414), "latents_1": noise(6)})) == 2
    with pytest.raises(HipaError, match=r"mean square of 1.1e\+04 \(latents\). Expected about 1"):
        check_reference({"latents": noise(11_000)})


def test_images_of_one_value_and_images_that_are_black_or_white() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(HipaError, match=r"every pixel of its images is 0 \(images\)"):
        check_reference({"images": images})
    images[0, 0, 0, 0] = 255
    (doubt,) = check_reference({"images_1": images})
    assert doubt.startswith("100.0% of the reference images' values are black or white (images_1)")
    images[:, :4] = 128
    assert check_reference({"images": images}) == []
