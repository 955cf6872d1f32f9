from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.errors import HipaError
from hipa_deploy.train.coco.prepare_images import clean_resize, read_square, read_squares, square

CLEAN_FID = [0.0, 117.154, 183.793, 38.339, 0.0]
CLEAN_FID_MOMENTS = (127.3387, 73.0817)


def stripes() -> np.ndarray:
    """Diagonal stripes of other widths in each channel, uint8 [256, 256, 3]."""
    diagonal = np.indices((256, 256)).sum(0)[..., None]
    return (diagonal * np.array([1, 2, 5]) % 256).astype(np.uint8)


def test_the_values_of_clean_fid() -> None:
    """What clean-fid 0.1.35's build_resizer('clean') gives for the same image."""
    got = clean_resize(stripes())
    values = [got[0, 0, 0], got[0, 100, 37], got[1, 7, 250], got[2, 298, 1], got[2, 150, 150]]
    assert got.dtype == np.float32
    assert values == pytest.approx(CLEAN_FID, abs=2e-3)
    assert (got.mean(), got.std()) == pytest.approx(CLEAN_FID_MOMENTS, abs=1e-3)


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (50, 50)])
def test_a_square_is_cut_about_the_centre(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    short = min(shape)
    top = round((shape[0] - short) / 2)
    left = round((shape[1] - short) / 2)
    cut = Image.fromarray(image).crop((left, top, left + short, top + short))
    expected = np.asarray(cut.resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(square(image, 32), expected)


def test_grey_and_transparent_files_are_read_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (30, 20), 90).save(tmp_path / "grey.jpg")
    Image.new("RGBA", (20, 30), (200, 10, 20, 128)).save(tmp_path / "clear.png")
    (batch,) = read_squares([tmp_path / "grey.jpg", tmp_path / "clear.png"], 16, batch=8)
    assert batch.shape == (2, 16, 16, 3)
    assert np.abs(batch[0].astype(int) - 90).max() <= 1
    assert (batch[1] == (200, 10, 20)).all()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(HipaError, match=r"half\.jpg cannot be read"):
        read_square(tmp_path / "half.jpg", 16)
