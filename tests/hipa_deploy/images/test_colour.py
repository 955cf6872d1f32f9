"""What a file says about its colours, checked against the matrices of CSS Color 4."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from hipa_deploy.errors import HipaWarning
from hipa_deploy.images.read import read_image, read_mask
from tests.hipa_deploy.images.profiles import (
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    rgb_profile,
)

RGB = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)

# Linear to linear, https://www.w3.org/TR/css-color-4/#color-conversion-code
P3_TO_SRGB = np.array(
    [
        [1.2249401762805598, -0.2249401762805598, 0],
        [-0.0420569547096881, 1.0420569547096881, 0],
        [-0.0196375545903344, -0.0786360455506319, 1.0982736001409663],
    ]
)
ADOBE_TO_SRGB = np.array(
    [
        [1.3983557439607783, -0.3983557439607783, 0],
        [0, 1, 0],
        [0, -0.0429289289005316, 1.0429289289005316],
    ]
)
P3 = rgb_profile(DISPLAY_P3)
ADOBE_CHROMATICITIES = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def srgb_light(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_value(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def p3_as_srgb(rgb_HWC: np.ndarray) -> np.ndarray:
    return srgb_value(srgb_light(rgb_HWC / 255) @ P3_TO_SRGB.T)


def adobe_as_srgb(rgb_HWC: np.ndarray) -> np.ndarray:
    return srgb_value((rgb_HWC / 255) ** (563 / 256) @ ADOBE_TO_SRGB.T)


def saved(folder: Path, image: Image.Image, name: str = "x.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).max())


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """A warning that a test does not expect is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", HipaWarning)
        yield


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_display_p3_becomes_srgb(name: str, tmp_path: Path) -> None:
    options = {"lossless": True, "exact": True} if name == "x.webp" else {}
    path = saved(tmp_path, Image.fromarray(RGB), name, icc_profile=P3, **options)
    assert difference(read_image(path), p3_as_srgb(RGB)) <= 1.5
    assert difference(read_image(path), RGB) > 20
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(image), read_image(str(path)))


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(SRGB),
    ],
)
def test_srgb_stays_bit_for_bit(profile: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(RGB), icc_profile=profile)
    np.testing.assert_array_equal(read_image(path), RGB)
    path = saved(tmp_path, Image.fromarray(GREY), icc_profile=profile)
    np.testing.assert_array_equal(read_image(path)[..., 0], GREY)


def test_alpha_is_kept_and_laid_over_white_afterwards(tmp_path: Path) -> None:
    alpha = np.full((*RGB.shape[:2], 1), 255, np.uint8)
    alpha[::2] = 0
    path = saved(tmp_path, Image.fromarray(np.concatenate([RGB, alpha], -1)), icc_profile=P3)
    got = read_image(path)
    assert difference(got[1::2], p3_as_srgb(RGB[1::2])) <= 1.5
    assert (got[::2] == 255).all()


def test_a_palette_with_a_profile_and_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).quantize(16)
    colours = np.asarray(image.convert("RGB"))
    path = saved(tmp_path, image, icc_profile=P3, transparency=3)
    got = read_image(path)
    is_transparent = np.asarray(image) == 3
    assert is_transparent.any()
    assert (got[is_transparent] == 255).all()
    expected = p3_as_srgb(colours)
    assert difference(got[~is_transparent], expected[~is_transparent]) <= 1.5


def test_grey_with_a_grey_profile(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(GREY), icc_profile=grey_profile(1.0))
    expected = srgb_value(GREY / 255)
    assert difference(read_image(path)[..., 1], expected) <= 1.5

    alpha = np.full_like(GREY, 255)
    alpha[0] = 0
    image = Image.fromarray(np.stack([GREY, alpha], -1))
    got = read_image(saved(tmp_path, image, icc_profile=grey_profile(1.0)))
    assert (got[0] == 255).all()
    assert difference(got[1:, :, 1], expected[1:]) <= 1.5


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bit_grey_is_converted_before_it_is_rounded(name: str, tmp_path: Path) -> None:
    """In linear light the 8-bit level 1 is sRGB's 13: all levels between must be there."""
    levels = np.arange(0, 65536, 8, dtype=np.uint16).reshape(64, 128)
    path = saved(tmp_path, Image.fromarray(levels), name, icc_profile=grey_profile(1.0))
    got = read_image(path)[..., 0]
    assert difference(got, srgb_value(levels / 65535)) <= 1.5
    assert set(range(1, 256)) <= set(got.ravel().tolist())

    path = saved(tmp_path, Image.fromarray(levels), name, icc_profile=rgb_profile(SRGB))
    np.testing.assert_array_equal(read_image(path)[..., 0], np.rint(levels / 257))


def test_cmyk_is_converted_with_its_profile(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0], [0, 255, 255, 0]]], np.uint8)
    image = Image.fromarray(inks, "CMYK")
    got = read_image(saved(tmp_path, image, "x.tif", icc_profile=cmyk_profile()))
    # L* of two thirds and one third as sRGB, by CIE 15: Y = ((L* + 16) / 116) ** 3.
    light = ((np.array([100, 0, 200 / 3, 100 / 3]) + 16) / 116) ** 3
    expected = srgb_value(np.where(light < 0.0089, 0, light))
    assert difference(got[0, :, 1], expected) <= 2
    # Without a profile cyan is cyan.
    assert read_image(saved(tmp_path, image, "plain.tif"))[0, 2].tolist() == [0, 255, 255]


def test_lab(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    soft = (RGB // 2 + 64).astype(np.uint8)  # 8-bit Lab is coarse where colours are strong
    path = saved(tmp_path, to_lab.apply(Image.fromarray(soft)), "x.tif")
    assert difference(read_image(path), soft) <= 6


def test_exif_turns_and_the_profile_converts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(RGB), icc_profile=P3, exif=exif)
    assert difference(read_image(path), np.rot90(p3_as_srgb(RGB), -1)) <= 1.5


def adobe_exif(index: str, orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: index}
    return exif


def test_adobe_rgb_of_a_camera(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = saved(tmp_path, image, exif=adobe_exif("R03", orientation=3))
    assert difference(read_image(path), adobe_as_srgb(RGB[::-1, ::-1])) <= 1
    path = saved(tmp_path, image, exif=adobe_exif("R98"))
    np.testing.assert_array_equal(read_image(path), RGB)
    # A profile counts more.
    path = saved(tmp_path, image, exif=adobe_exif("R03"), icc_profile=rgb_profile(SRGB))
    np.testing.assert_array_equal(read_image(path), RGB)


def png_with(folder: Path, image: Image.Image, **chunks: Any) -> Path:
    """A PNG with colour chunks, in Pillow's terms of reading."""
    info = PngImagePlugin.PngInfo()
    if "gamma" in chunks:
        info.add(b"gAMA", round(chunks["gamma"] * 100000).to_bytes(4, "big"))
    if "chromaticity" in chunks:
        numbers = [round(value * 100000).to_bytes(4, "big") for value in chunks["chromaticity"]]
        info.add(b"cHRM", b"".join(numbers))
    if "srgb" in chunks:
        info.add(b"sRGB", bytes([chunks["srgb"]]))
    return saved(folder, image, pnginfo=info)


def test_the_colour_chunks_of_a_png(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = png_with(tmp_path, image, gamma=256 / 563, chromaticity=ADOBE_CHROMATICITIES)
    with Image.open(path) as opened:
        assert {"gamma", "chromaticity"} <= opened.info.keys()
    assert difference(read_image(path), adobe_as_srgb(RGB)) <= 1
    # Primaries alone: the curve is sRGB's.
    path = png_with(tmp_path, image, chromaticity=ADOBE_CHROMATICITIES)
    expected = srgb_value(srgb_light(RGB / 255) @ ADOBE_TO_SRGB.T)
    assert difference(read_image(path), expected) <= 1

    path = png_with(tmp_path, image, gamma=1.0)
    assert difference(read_image(path), srgb_value(RGB / 255)) <= 1
    path = png_with(tmp_path, Image.fromarray(GREY), gamma=1.0)
    assert difference(read_image(path)[..., 2], srgb_value(GREY / 255)) <= 1
    levels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    path = png_with(tmp_path, Image.fromarray(levels), gamma=1.0)
    assert difference(read_image(path)[..., 2], srgb_value(levels / 65535)) <= 1


@pytest.mark.parametrize(
    "chunks",
    [
        {"gamma": 0.45455},
        {"gamma": 0.45455, "chromaticity": (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)},
        {"srgb": 0, "gamma": 1.0, "chromaticity": ADOBE_CHROMATICITIES},
    ],
)
def test_chunks_that_say_srgb_change_nothing(chunks: dict[str, Any], tmp_path: Path) -> None:
    path = png_with(tmp_path, Image.fromarray(RGB), **chunks)
    np.testing.assert_array_equal(read_image(path), RGB)


def test_another_white_stays_white(tmp_path: Path) -> None:
    equal_energy = (1 / 3, 1 / 3, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
    greys = np.repeat(GREY[..., None], 3, -1)
    path = png_with(tmp_path, Image.fromarray(greys), chromaticity=equal_energy)
    assert difference(read_image(path), greys) <= 1


@pytest.mark.parametrize(
    ("image", "profile", "message"),
    [
        (Image.fromarray(RGB), P3[:200], "cannot be used"),
        (Image.fromarray(RGB), b"no profile", "cannot be used"),
        (Image.fromarray(RGB), grey_profile(2.2), "is for GRAY images, not for RGB"),
        (Image.fromarray(RGB), cmyk_profile(), "is for CMYK images, not for RGB"),
    ],
)
def test_a_profile_that_does_not_fit_is_told(
    image: Image.Image, profile: bytes, message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, image, icc_profile=profile)
    with pytest.warns(HipaWarning, match=rf"x\.png: its colour profile {message}.* taken as sRGB"):
        got = read_image(path)
    np.testing.assert_array_equal(got, RGB)


def test_damaged_chunks_are_told(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = saved(tmp_path, image, icc_profile=P3)
    content = bytearray(path.read_bytes())
    start = content.index(b"iCCP")
    length = int.from_bytes(content[start - 4 : start], "big")
    content[start + 40 : start + 44] = b"????"  # in the compressed profile
    checked = content[start : start + 4 + length]
    content[start + 4 + length : start + 8 + length] = zlib.crc32(checked).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.warns(HipaWarning, match="its colour profile is damaged"):
        np.testing.assert_array_equal(read_image(path), RGB)
    with pytest.warns(HipaWarning, match="gAMA chunk is 0"):
        np.testing.assert_array_equal(read_image(png_with(tmp_path, image, gamma=0)), RGB)
    path = png_with(tmp_path, image, chromaticity=(0.3, 0.3, *[0.3, 0.3] * 3))
    with pytest.warns(HipaWarning, match="cHRM chunk holds no colours"):
        np.testing.assert_array_equal(read_image(path), RGB)


def test_a_mask_is_data(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(GREY), icc_profile=grey_profile(1.0))
    np.testing.assert_array_equal(read_mask(path), GREY >= 128)
