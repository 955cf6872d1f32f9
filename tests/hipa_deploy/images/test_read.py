import io
import math
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter
from PIL.PngImagePlugin import PngInfo

from hipa_deploy.errors import HipaError, HipaWarning
from hipa_deploy.images.png import save_png
from hipa_deploy.images.read import (
    check_size,
    fit_image,
    fit_mask,
    read_control,
    read_image,
    read_mask,
)
from hipa_deploy.marks.read_marks import read_marks
from tests.hipa_deploy.images.raw_png import png
from tests.threads import in_threads

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "x.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_a_path_a_pillow_image_and_an_array_are_one(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(RGB))
    for source in (path, str(path), Image.open(path), Image.fromarray(RGB), RGB, RGB / 255):
        read = read_image(source)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, RGB)


@pytest.mark.parametrize(
    ("orientation", "back"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
def test_exif_orientation_is_applied_to_image_and_mask(
    tmp_path: Path, orientation: int, back: Any
) -> None:
    """The file holds the upright image turned the other way."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(back(RGB))), exif=exif)
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_mask(path), read_mask(RGB))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_that_is_turned(tmp_path: Path, mode: str, compression: str) -> None:
    """Pillow scrambles some of them when it is given their names."""
    grey_HW = np.where(RGB[..., 0] > 127, np.uint8(255), np.uint8(0))
    if mode == "I;16":
        stored = Image.fromarray(np.rot90(grey_HW).astype(np.uint16) * 257)
    else:
        stored = Image.fromarray(np.ascontiguousarray(np.rot90(grey_HW))).convert(mode)
    path = saved(tmp_path, stored, "x.tiff", compression=compression, tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(read_image(path)[..., 0], grey_HW)
    np.testing.assert_array_equal(read_mask(path), grey_HW > 0)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read_image(opened)[..., 0], grey_HW)
        assert opened.filename == str(path)


def test_a_photo_turned_by_its_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright, stored lying
    stored = np.full((16, 32, 3), 255, np.uint8)
    stored[:, :16] = 0
    read = read_image(saved(tmp_path, Image.fromarray(stored), "x.jpg", exif=exif))
    assert read.shape == (32, 16, 3)
    assert read[:8].max() < 10
    assert read[-8:].min() > 245


def test_an_image_with_broken_exif_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(RGB), exif=b"Exif\x00\x00nonsense")
    np.testing.assert_array_equal(read_image(path), RGB)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    alpha = np.array([[0, 255, 128, 255]] * 6, np.uint8)
    read = read_image(saved(tmp_path, Image.fromarray(np.dstack([RGB, alpha]))))
    assert (read[:, 0] == 255).all()
    np.testing.assert_array_equal(read[:, [1, 3]], RGB[:, [1, 3]])
    half = RGB[:, 2] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(read[:, 2] - half).max() <= 1
    np.testing.assert_array_equal(read_image(np.dstack([RGB, alpha])), read)
    premultiplied = Image.fromarray(np.dstack([RGB, alpha])).convert("RGBa")
    assert np.abs(read_image(premultiplied).astype(int) - read).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "La", "PA"])
def test_grey_and_palette_with_alpha(mode: str) -> None:
    alpha = Image.fromarray(np.array([[0, 255, 0]] * 2, np.uint8))
    image = Image.new("L", (3, 2), 40)
    if mode == "PA":
        image = image.convert("P")
    image.putalpha(alpha)
    read = read_image(image.convert("La") if mode == "La" else image)
    assert image.mode in ("LA", "PA")
    assert read[0].tolist() == [[255] * 3, [40] * 3, [255] * 3]


def test_a_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    for name in ("x.png", "x.gif"):
        read = read_image(saved(tmp_path, image, name, transparency=1))
        assert read[0].tolist() == [[10, 20, 30], [255, 255, 255], [0, 200, 0]]


def test_a_palette_with_alpha() -> None:
    pixels = np.array([[[10, 20, 30, 255], [90, 0, 0, 0]]], np.uint8)
    image = Image.fromarray(pixels).quantize(2)
    assert (image.mode, image.palette.mode) == ("P", "RGBA")
    assert read_image(image)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_one_bit_and_grey(tmp_path: Path) -> None:
    bits = np.array([[True, False]])
    for source in (bits, saved(tmp_path, Image.fromarray(bits))):
        assert read_image(source).tolist() == [[[255] * 3, [0] * 3]]
    grey = np.array([[7, 250]], np.uint8)
    for source in (grey, grey[..., None], saved(tmp_path, Image.fromarray(grey))):
        assert read_image(source).tolist() == [[[7] * 3, [250] * 3]]
    keyed = saved(tmp_path, Image.fromarray(grey), "keyed.png", transparency=7)
    assert read_image(keyed).tolist() == [[[255] * 3, [250] * 3]]


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    """A plain conversion by Pillow cuts everything above 255 to white."""
    levels = np.array([[0, 257 * 40 + 100, 257 * 128, 65535]], np.uint16)
    expected = [[[0] * 3, [40] * 3, [128] * 3, [255] * 3]]
    for source in (levels, Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        assert read_image(source).tolist() == expected
    for name in ("x.png", "x.tif"):
        assert read_image(saved(tmp_path, Image.fromarray(levels), name)).tolist() == expected


def test_sixteen_bit_colour_and_transparency(tmp_path: Path) -> None:
    colours = np.array([[[65535, 0, 257 * 40]]], ">u2")
    (tmp_path / "rgb.png").write_bytes(png(2, 16, (1, 1), b"\0" + colours.tobytes()))
    assert read_image(tmp_path / "rgb.png").tolist() == [[[255, 0, 40]]]
    grey = np.array([300, 257 * 40], ">u2")
    (tmp_path / "grey.png").write_bytes(
        png(0, 16, (2, 1), b"\0" + grey.tobytes(), key=struct.pack(">H", 300))
    )
    assert read_image(tmp_path / "grey.png").tolist() == [[[255] * 3, [40] * 3]]


def test_a_cmyk_jpeg(tmp_path: Path) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    read = read_image(saved(tmp_path, image, "x.jpg", quality=95))
    assert np.abs(read.astype(int) - [255, 0, 0]).max() < 8


def test_levels_of_8_bits_in_deeper_integers_are_not_taken_for_black(tmp_path: Path) -> None:
    levels = RGB[..., 0].astype(np.int32)
    shorts = levels.astype(np.uint16)
    grey_file = saved(tmp_path, Image.fromarray(shorts), "grey.png")
    for read in (read_image, read_control, read_mask):
        for source in (Image.fromarray(levels), Image.fromarray(shorts), grey_file):
            with pytest.raises(HipaError, match=r"\d-bit integers from \d+ to \d+\. .* mode L"):
                read(source)
        with pytest.raises(HipaError, match=r"uint16 with values from .* to uint8"):
            read(shorts)
    np.testing.assert_array_equal(read_image(Image.fromarray(levels * 257))[..., 0], levels)
    np.testing.assert_array_equal(read_image(shorts * 257)[..., 0], levels)
    assert not read_image(Image.fromarray(levels * 0)).any()
    assert not read_image(shorts * 0).any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "float32"])
@pytest.mark.parametrize("white", [1, 255])
def test_a_mask_of_black_and_white_may_be_of_any_numbers(dtype: str, white: int) -> None:
    """``np.where(labels == 1, 255, 0)`` is of int64."""
    mask = np.array([[0, white], [white, 0]]).astype(dtype)
    assert read_mask(mask).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_sixteen_bits_in_either_order_of_bytes(mode: str, dtype: str) -> None:
    """A TIFF may be big-endian: Pillow's mode is "I;16B" then."""
    levels = np.array([[0, 40], [128, 255]])
    deep = Image.frombytes(mode, (2, 2), (levels * 257).astype(dtype).tobytes())
    assert read_image(deep)[..., 0].tolist() == levels.tolist()
    flat = Image.frombytes(mode, (2, 2), levels.astype(dtype).tobytes())
    with pytest.raises(HipaError, match="16-bit integers from 0 to 255"):
        read_image(flat)


def test_a_mask_of_other_numbers_is_refused() -> None:
    for numbers in ([0, 128], [0, -1], [1, 255]):
        with pytest.raises(HipaError, match="mask is an array of int64"):
            read_mask(np.array([numbers], np.int64))


def test_floats_of_pillow() -> None:
    floats = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert read_image(floats)[0, :, 0].tolist() == [0, 128, 255]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), "red")
    blue = Image.new("RGB", (4, 4), "blue")
    path = saved(tmp_path, red, "x.gif", save_all=True, append_images=[blue])
    assert Image.open(path).n_frames == 2
    assert (read_image(path) == [255, 0, 0]).all()


@pytest.mark.filterwarnings("ignore::hipa_deploy.errors.HipaWarning")  # of transparent masks
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F"])
def test_an_image_is_read_alike_in_strips(
    mode: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large image is converted in strips; here they are one row or two."""
    noise = np.random.default_rng(1).integers(0, 256, (23, 17, 4), dtype=np.uint8)
    options: dict[str, Any] = {}
    if mode in ("I;16", "F"):
        grey_HW = noise[..., 0].astype(np.uint16) * 257
        image = Image.fromarray(np.float32(grey_HW / 65535) if mode == "F" else grey_HW)
    else:
        image = Image.fromarray(noise if mode in ("RGBA", "LA") else noise[..., :3])
        image = image.quantize(7) if mode == "P" else _in_mode(image, mode)
    if mode == "P":
        options["transparency"] = 3
    if mode in ("L", "RGB", "RGBA", "I;16"):
        image.info["gamma"] = 0.7
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, "x.tiff" if mode in ("CMYK", "LAB", "F") else "x.png",
                 exif=exif, **options)  # fmt: skip
    source = Image.open(path)
    source.info |= image.info
    whole = read_image(source)
    mask = read_mask(path)
    assert len(np.unique(whole)) > 1
    for width in (17, 40):
        monkeypatch.setattr("hipa_deploy.images.read._STRIP_PIXELS", width)
        np.testing.assert_array_equal(read_image(source), whole)
        np.testing.assert_array_equal(read_mask(path), mask)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        return ImageCms.applyTransform(image, to_lab)
    return image.convert(mode)


MEMORY = """
import resource, sys
from hipa_deploy.images.read import read_control, read_image, read_mask
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB
before = peak()
{"image": read_image, "mask": read_mask}[sys.argv[1]](sys.argv[2])
print(peak() - before)
"""


@pytest.mark.parametrize("what", ["image", "mask"])
def test_a_small_file_of_many_pixels_takes_little_memory(what: str, tmp_path: Path) -> None:
    side = 5000
    path = tmp_path / "x.png"
    path.write_bytes(png(4, 16, (side, side), bytes((4 * side + 1) * side)))
    assert path.stat().st_size < 120_000
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, what, str(path)], capture_output=True, text=True, check=True
    )
    # The image as Pillow has it, 4 bytes a pixel, and the result of 3 or 4.
    assert int(done.stdout) < 8 * side * side / 2**20 + 120


@pytest.mark.parametrize("size", [(1 << 21, 1), (1, 1 << 21)])
def test_an_endless_row_or_column_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(0, 8, size, b""))
    with pytest.raises(HipaError, match="at most 1048576 pixels a side"):
        read_image(tmp_path / "x.png")


def test_libtiff_says_nothing_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, Image.effect_noise((64, 64), 50), "x.tiff", compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[1000:3000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(HipaError, match="cannot be read"):
        read_image(path)
    os.write(2, b"and then")
    assert capfd.readouterr().err == "and then"


def test_files_that_are_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    # A truncated file: noise, so that 4,000 bytes are less than half of the PNG.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    complete = io.BytesIO()
    Image.fromarray(noise).save(complete, "PNG")
    (tmp_path / "half.png").write_bytes(complete.getvalue()[:4000])
    for name, reason in [
        ("absent.png", "is missing"),
        ("", "is a folder"),
        ("text.png", "cannot be read: cannot identify"),
        ("half.png", "cannot be read"),
    ]:
        for read in (read_image, read_mask):
            with pytest.raises(HipaError, match=reason) as caught:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_an_enormous_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    # Pillow opens the second, and not the first.
    for side in (50_000, 13_000):
        (tmp_path / "bomb.png").write_bytes(png(0, 1, (side, side), b""))
        words = r"the image has (2500000000|13000x13000) pixels. Expected 1 to 134217728 pixels"
        with pytest.raises(HipaError, match=words):
            read_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("error")
def test_a_large_photo_warns_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert read_image(path).shape == RGB.shape


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((1, 8, 8, 3), np.uint8), "channels last"),
        (np.zeros((0, 8, 3), np.uint8), "channels last"),
        (np.zeros((8, 8, 3), np.int64), "array of int64"),
        (np.full((8, 8), 1.5), "from 1.5 to 1.5"),
        (np.full((8, 8), np.nan), "nan"),
        (np.full((8, 8), -0.5, np.float32), "from -0.5"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "70000"),
        (Image.fromarray(np.full((2, 2), 200, np.float32)), "from 200"),
        ([[1, 2]], "is a list"),
    ],
)
def test_arrays_that_are_not_an_image(source: Any, words: str) -> None:
    with pytest.raises(HipaError, match=words):
        read_image(source)


def test_a_mask_is_white_where_grey_is_half_or_more(tmp_path: Path) -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    for source in (
        grey,
        grey / 255,
        Image.fromarray(grey),
        saved(tmp_path, Image.fromarray(grey)),
        np.dstack([grey] * 3),
    ):
        mask = read_mask(source)
        assert mask.dtype == np.float32
        assert mask.tolist() == [[0, 0, 1, 1]]


def test_a_mask_ignores_alpha(tmp_path: Path) -> None:
    colour = Image.fromarray(np.array([[0, 255]], np.uint8))
    alpha = Image.fromarray(np.array([[255, 0]], np.uint8))
    for mode, colours in (("LA", 1), ("RGBA", 3)):
        image = Image.merge(mode, [colour] * colours + [alpha])
        for source in (image, saved(tmp_path, image)):
            with pytest.warns(HipaWarning, match="transparent pixels, which count for nothing"):
                assert read_mask(source).tolist() == [[0, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_mask(colour.convert("RGBA")).tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.uint16, np.float32])
def test_a_mask_of_zeros_and_ones(dtype: Any) -> None:
    assert read_mask(np.array([[0, 1]], dtype)).tolist() == [[0, 1]]


def test_fitting_crops_the_centre_and_keeps_what_fits() -> None:
    np.testing.assert_array_equal(fit_image(RGB, 6, 4), RGB)
    np.testing.assert_array_equal(fit_image(RGB, 4, 4), RGB[1:5])
    mask = read_mask(RGB)
    np.testing.assert_array_equal(fit_mask(mask, 4, 4), mask[1:5])
    assert fit_image(RGB, 16, 24).shape == (16, 24, 3)


def test_image_and_mask_are_fitted_alike() -> None:
    mask = np.zeros((60, 100), np.float32)
    mask[20:40, 30:60] = 1
    image = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    fitted = fit_mask(mask, 32, 32)
    assert set(np.unique(fitted)) == {0, 1}
    assert fitted.dtype == np.float32
    # The mask has what is white in the scaled image, and at most one pixel around it.
    white = read_mask(fit_image(image, 32, 32))
    assert (fitted >= white).all()
    grown = Image.fromarray(white.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    assert (fitted <= np.asarray(grown)).all()


@pytest.mark.parametrize("side", [64, 100, 512])
def test_a_thin_stroke_in_a_large_mask_is_kept_whole(side: int) -> None:
    """A wire in a photograph is a few pixels wide, and far less than one where it is scaled."""
    rows = np.arange(200, 1800)
    mask = np.zeros((2000, 3000), np.float32)
    mask[rows, 700 + rows // 2] = 1
    expected = np.zeros((side, side), np.float32)
    expected[rows * side // 2000, (200 + rows // 2) * side // 2000] = 1
    fitted = fit_mask(mask, side, side)
    assert (fitted >= expected).all()
    # Nothing but the stroke is repainted: at most a pixel on either side of it.
    assert fitted.sum() <= 3 * expected.sum()


@pytest.mark.parametrize("shape", [(245, 91), (91, 245), (20, 30), (100, 140)])
def test_no_pixel_of_a_fitted_mask_is_lost(shape: tuple[int, int]) -> None:
    for place in range(math.ceil(min(shape) / 18)):
        mask = np.zeros(shape, np.float32)
        mask[shape[0] // 2 + place, shape[1] // 2] = 1
        assert 1 <= fit_mask(mask, 28, 18).sum() <= 9


def test_an_image_smaller_than_a_latent_cell() -> None:
    check_size(np.zeros((8, 8, 3), np.uint8), 8)
    with pytest.raises(HipaError, match=r"6x4 pixels .* cell of 8x8"):
        check_size(RGB, 8)


def test_every_kind_of_path(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8), "red").save(path)
    for given in (str(path), path, PurePosixPath(path)):
        assert read_image(given)[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_of_another_order() -> None:
    values = np.full((8, 8), 30000, np.uint16)
    np.testing.assert_array_equal(read_image(values.astype(">u2")), read_image(values))


@pytest.mark.parametrize("format", ["jpeg", "png", "tiff"])
def test_threads_may_share_an_image_that_is_not_decoded_yet(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"image.{format}"
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels_HWC).save(path, exif=exif)
    expected_HWC = read_image(path)
    assert expected_HWC.shape == (300, 400, 3)
    for _ in range(5):
        with Image.open(path) as image:
            for got_HWC in in_threads(lambda _, image=image: read_image(image)):  # type: ignore[misc]
                np.testing.assert_array_equal(got_HWC, expected_HWC)


def test_readers_in_threads_leave_the_filters_of_warnings_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    save_png(path, np.zeros((8, 8, 3), np.uint8), {"seed": 1})
    before = list(warnings.filters)

    def read(_: int) -> None:
        for _again in range(30):
            read_image(path)
            read_marks(path)

    in_threads(read)
    assert list(warnings.filters) == before


def test_a_control_image_is_data(tmp_path: Path) -> None:
    """What the file says about colours changes no number; diffusers reads it so too."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (8, 1))
    plain = np.stack([ramp] * 3, axis=-1)
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100_000))
    path = tmp_path / "depth.png"
    Image.fromarray(ramp).save(path, pnginfo=info)
    np.testing.assert_array_equal(read_control(path), plain)
    np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), plain)
    assert np.abs(read_image(path).astype(int) - plain).max() > 20


def test_a_control_image_lies_over_black(tmp_path: Path) -> None:
    """White lines on a transparent ground are lines, and not a white picture."""
    lines = np.full((16, 16, 4), 255, np.uint8)
    lines[:, :, 3] = 0
    lines[8, :, 3] = 255
    path = tmp_path / "lines.png"
    Image.fromarray(lines).save(path)
    with pytest.warns(
        HipaWarning, match=r"lines\.png has transparent pixels, which count as black"
    ):
        control = read_control(path)
    assert (control[8] == 255).all()
    assert not np.delete(control, 8, axis=0).any()
