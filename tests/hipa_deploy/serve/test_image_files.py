"""What users upload, and the mask in its alpha channel."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.errors import HipaError
from hipa_deploy.images.read import read_image
from hipa_deploy.serve.image_files import mask_of_alpha, open_upload

# How pixels are stored that a viewer turns upright, by the EXIF orientation.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    6: np.rot90,
    8: lambda upright: np.rot90(upright, -1),
}


def upload(pixels_HWC: np.ndarray, format: str, **options: object) -> Image.Image:
    """An image as a request brings it."""
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    image.save(file, format, **({"lossless": True, "exact": True} | options))
    return open_upload(file, "image", 10_000)


def half_hidden() -> np.ndarray:
    """A grey image whose hidden pixels are a corner: uint8 [H, W, 4]."""
    pixels_HWC = np.full((6, 9, 4), 200, np.uint8)
    pixels_HWC[..., 3] = 255
    pixels_HWC[:2, :4, 3] = 0
    return pixels_HWC


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_mask_is_turned_as_its_image(orientation: int, format: str) -> None:
    upright_HWC = half_hidden()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upload(STORED[orientation](upright_HWC), format, exif=exif)
    mask_HW = mask_of_alpha(image, "image")
    np.testing.assert_array_equal(mask_HW, upright_HWC[..., 3] == 0)
    # Hidden pixels are shown white.
    np.testing.assert_array_equal(mask_HW, read_image(image)[..., 0] == 255)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_broken_exif_turns_nothing(format: str) -> None:
    image = upload(half_hidden(), format, exif=b"Exif\x00\x00nonsense")
    np.testing.assert_array_equal(mask_of_alpha(image, "image"), half_hidden()[..., 3] == 0)


def test_an_image_without_alpha_is_no_mask() -> None:
    image = upload(half_hidden()[..., :3], "PNG")
    with pytest.raises(HipaError, match="the image has no alpha channel"):
        mask_of_alpha(image, "image")


@pytest.mark.parametrize(
    ("alpha", "words"), [(255, "nowhere fully transparent"), (0, "transparent everywhere")]
)
def test_a_mask_without_a_hole_or_without_a_rest(alpha: int, words: str) -> None:
    pixels_HWC = half_hidden()
    pixels_HWC[..., 3] = alpha
    with pytest.raises(HipaError, match=words):
        mask_of_alpha(upload(pixels_HWC, "PNG"), "mask")


def segment(mark: int, content: bytes) -> bytes:
    return bytes([0xFF, mark]) + (len(content) + 2).to_bytes(2, "big") + content


def jpeg_of_scans(scans: int, between: bytes = b"", inside: bytes = b"") -> io.BytesIO:
    """A valid progressive JPEG of 8x8 grey pixels: its first scan, and then empty ones.

    Args:
        scans: how many.
        between: stands before the tables.
        inside: stands at the end of what is compressed, in the first scan.

    """
    tables = segment(0xDB, b"\0" + b"\1" * 64)
    tables += segment(0xC2, bytes([8, 0, 8, 0, 8, 1, 1, 0x11, 0]))
    tables += segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    tables += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0")
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + b"\x7f" + inside
    more = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + b"\x7f"
    return io.BytesIO(b"\xff\xd8" + between + tables + first + more * (scans - 1) + b"\xff\xd9")


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    """Each goes over all pixels: a megabyte of them keeps a core busy for minutes."""
    image = open_upload(jpeg_of_scans(100), "image", 10_000)
    assert np.asarray(image).shape == (8, 8)
    with pytest.raises(HipaError, match=r"a JPEG of 101 scans\. Expected at most 100"):
        open_upload(jpeg_of_scans(101), "image", 10_000)
    progressive = upload(np.zeros((64, 64, 3), np.uint8), "JPEG", progressive=True)
    assert read_image(progressive).shape == (64, 64, 3)


SCANS = b"\xff\xda" * 200


@pytest.mark.parametrize(
    "parts",
    [
        {"between": segment(0xE1, b"Exif\0\0" + SCANS)},  # a thumbnail
        {"between": b"\xff" * 300 + segment(0xFE, SCANS)},  # bytes that fill up
        {"inside": b"\xff\x00\xff\xd0\xff\xd7"},  # data, and marks between its parts
    ],
    ids=["thumbnail", "fill", "data"],
)
def test_marks_inside_a_segment_are_no_scans(parts: dict[str, bytes]) -> None:
    image = open_upload(jpeg_of_scans(100, **parts), "image", 10_000)
    assert np.asarray(image).shape == (8, 8)
    with pytest.raises(HipaError, match="a JPEG of 101 scans"):
        open_upload(jpeg_of_scans(101, **parts), "image", 10_000)


def test_what_follows_the_image_is_not_read() -> None:
    """A phone's moving photo is a JPEG and then a film; its bytes are any."""
    film = np.random.default_rng(0).integers(0, 256, 1 << 23, np.uint8).tobytes()
    assert film.count(b"\xff\xda") > 100
    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "JPEG")
    image = open_upload(io.BytesIO(photo.getvalue() + film), "image", 10_000)
    assert np.asarray(image).shape == (8, 8, 3)


def test_of_two_images_in_a_file_the_first_counts() -> None:
    two = io.BytesIO()
    Image.new("RGB", (8, 8)).save(
        two, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    many = two.getvalue() + jpeg_of_scans(101).getvalue()
    image = open_upload(io.BytesIO(many), "image", 10_000)
    assert image.format == "MPO"
    assert np.asarray(image).shape == (8, 8, 3)


@pytest.mark.parametrize("mark", [0x02, 0xBF, 0xD8])
def test_scans_are_not_hidden_behind_a_mark_that_has_no_length(mark: int) -> None:
    """libjpeg passes over such a mark alone where it looks for the next part of a scan."""
    hiding = bytes([0xFF, mark]) + b"\xff\xfe" + b"\0" * 10
    with pytest.raises(HipaError, match="a JPEG of 101 scans"):
        open_upload(jpeg_of_scans(101, inside=hiding), "image", 10_000)


@pytest.mark.parametrize("length", [b"", b"\xff", b"\0\0", b"\0\1", b"\xff\xff"])
def test_a_length_that_is_none_or_beyond_the_end(length: bytes) -> None:
    whole = jpeg_of_scans(1).getvalue()[:-2] + b"\xff\xfe" + length
    assert open_upload(io.BytesIO(whole), "image", 10_000).size == (8, 8)


@pytest.mark.parametrize(
    "filler", [b"\xff", b"\xff\x00", b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"\0"]
)
def test_a_large_file_is_gone_through_at_once(filler: bytes) -> None:
    """As long as a body may be; seconds each would keep a core from the images of others."""
    large = jpeg_of_scans(100, inside=filler * ((32 << 20) // len(filler)))
    started = time.process_time()
    open_upload(large, "image", 10_000)
    assert time.process_time() - started < 2


def test_a_jpeg_of_many_segments_is_refused() -> None:
    large = jpeg_of_scans(1, inside=segment(0xFE, b"") * (1 << 20))
    started = time.process_time()
    with pytest.raises(HipaError, match="a JPEG of more than 10000 segments"):
        open_upload(large, "image", 10_000)
    assert time.process_time() - started < 2


def test_an_image_beyond_pillows_own_limit_has_too_many_pixels() -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    with pytest.raises(HipaError, match=r"too many pixels\. Expected at most 10000 in all"):
        open_upload(file, "image", 10_000)
