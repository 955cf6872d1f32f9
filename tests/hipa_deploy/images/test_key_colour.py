"""The transparent colour of a PNG, of every depth that the format has."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.errors import HipaWarning
from hipa_deploy.images.read import read_image, read_mask
from hipa_deploy.serve.image_files import mask_of_alpha, open_upload
from tests.hipa_deploy.images.profiles import DISPLAY_P3, rgb_profile
from tests.hipa_deploy.images.raw_png import keyed_png

# Bits, a file's levels in one row, and the transparent one.
GREYS = [
    (1, [0, 1, 0], 0),
    (1, [0, 1, 1], 1),
    (2, [0, 1, 2, 3], 1),
    (2, [0, 1, 2, 3], 3),
    (4, [0, 1, 7, 15], 7),
    (4, [0, 1, 7, 15], 0),
    (8, [0, 1, 7, 255], 7),
    (16, [0, 300, 301, 65535], 300),
]
COLOURS = [
    (8, [[1, 2, 3], [3, 2, 1], [255, 0, 1]], [1, 2, 3]),
    (16, [[0x1234, 0x5678, 0x9ABC], [0x1334, 0x5678, 0x9ABC]], [0x1234, 0x5678, 0x9ABC]),
    (16, [[5, 5, 5], [0x0105, 5, 5]], [5, 5, 5]),
]


def expected(bits: int, levels: Sequence[int], key: int) -> list[int]:
    """The row as it is shown: scaled to 8 bits, the transparent level white."""
    most = 2**bits - 1
    return [255 if level == key else round(level * 255 / most) for level in levels]


@pytest.mark.parametrize(("bits", "levels", "key"), GREYS)
def test_a_transparent_grey(bits: int, levels: list[int], key: int, tmp_path: Path) -> None:
    content = keyed_png(np.array([levels]), bits, key)
    shown = expected(bits, levels, key)
    (tmp_path / "x.png").write_bytes(content)
    opened = Image.open(io.BytesIO(content))
    # The second and the third time the image is decoded already.
    for source in (tmp_path / "x.png", opened, opened):
        assert read_image(source)[0].tolist() == [[level] * 3 for level in shown]
    assert read_image(opened.copy())[0].tolist() == [[level] * 3 for level in shown]


@pytest.mark.parametrize(("bits", "colours", "key"), COLOURS)
def test_a_transparent_colour(
    bits: int, colours: list[list[int]], key: list[int], tmp_path: Path
) -> None:
    content = keyed_png(np.array([colours]), bits, key)
    # As Pillow shows 16 bits.
    shown = [[255] * 3 if one == key else [level >> bits - 8 for level in one] for one in colours]
    (tmp_path / "x.png").write_bytes(content)
    opened = Image.open(io.BytesIO(content))
    for source in (tmp_path / "x.png", opened, opened):
        assert read_image(source)[0].tolist() == shown
    assert read_image(opened.copy())[0].tolist() == shown


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_decoded_image_of_16_bit_colour(is_copy: bool) -> None:
    """Pillow no longer tells the depth, nor of a copy the format; no level of 8 bits is so high."""
    key = [0x1234, 0x5678, 0x9ABC]
    image = Image.open(io.BytesIO(keyed_png(np.array([[key, [0, 0, 0]]]), 16, key)))
    image.load()
    if is_copy:
        image = image.copy()
        assert image.format is None
    assert read_image(image)[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize(("bits", "key"), [(2, 5), (4, 0x21), (8, 0x101)])
def test_the_lowest_bits_of_a_key_count(bits: int, key: int) -> None:
    """As the PNG specification has it: "decoders must mask the other bits to 0"."""
    image = Image.open(io.BytesIO(keyed_png(np.array([[1, 0]]), bits, key)))
    assert read_image(image)[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize(("bits", "key"), [(2, 1), (4, 7), (8, 7)])
def test_a_key_beside_a_colour_space(bits: int, key: int) -> None:
    image = Image.open(io.BytesIO(keyed_png(np.array([[key, 0]]), bits, key)))
    image.info["icc_profile"] = rgb_profile(DISPLAY_P3)
    image.info["gamma"] = 0.7
    assert read_image(image)[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize(("bits", "levels", "key"), GREYS)
def test_a_mask_with_a_key_is_told(bits: int, levels: list[int], key: int) -> None:
    """What is transparent counts for nothing, and its level as everywhere."""
    values = np.array([levels])
    image = Image.open(io.BytesIO(keyed_png(values, bits, key)))
    with pytest.warns(HipaWarning, match="has transparent pixels"):
        mask_HW = read_mask(image)
    np.testing.assert_array_equal(mask_HW, values >= 2 ** (bits - 1))


@pytest.mark.parametrize(("bits", "levels", "key"), GREYS)
def test_what_users_upload(bits: int, levels: list[int], key: int) -> None:
    """The mask in the upload first, as the service reads it, then the image itself."""
    image = open_upload(io.BytesIO(keyed_png(np.array([levels]), bits, key)), "image", 100)
    assert mask_of_alpha(image, "image")[0].tolist() == [level == key for level in levels]
    assert read_image(image)[0, :, 0].tolist() == expected(bits, levels, key)


@pytest.mark.parametrize(("bits", "colours", "key"), COLOURS)
def test_colours_that_users_upload(bits: int, colours: list[list[int]], key: list[int]) -> None:
    image = open_upload(io.BytesIO(keyed_png(np.array([colours]), bits, key)), "image", 100)
    assert mask_of_alpha(image, "image")[0].tolist() == [one == key for one in colours]


def test_a_palette_whose_entries_have_alpha_warns_of_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    image.save(tmp_path / "x.png", transparency=bytes([255, 0, 200]))
    opened = Image.open(tmp_path / "x.png")
    opened.info["icc_profile"] = rgb_profile(DISPLAY_P3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(opened)[0, 1].tolist() == [255] * 3
        warnings.simplefilter("ignore", HipaWarning)
        assert read_mask(opened).tolist() == [[0, 0, 0]]
