"""Files carry their parameters, A1111's text and their provenance, for our readers and others'."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hipa_deploy.commands.files.file_settings import IMAGE_SUFFIXES
from hipa_deploy.errors import HipaError
from hipa_deploy.images.png import png_bytes, save_image
from hipa_deploy.marks.image_file import (
    FORMATS,
    encode_image,
    image_format,
    pixels_sha256,
)
from hipa_deploy.marks.read_marks import is_image_file, read_marks, read_parameters
from hipa_deploy.marks.xmp import CHANGED, MADE, read_packet

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
PARAMETERS: dict[str, Any] = {
    "prompt": 'a cat, "red": <b> & 東京 😀\nby the sea',
    "seed": 7,
    "width": 40,
    "height": 24,
    "producer": "hipa-deploy 0.1.0",
    "unet": "0123456789abcdef" * 4,
    "bundle_name": "my, bundle",
}
NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
SUFFIXES = (".png", ".webp", ".jpg")


def test_the_command_knows_the_same_suffixes() -> None:
    assert IMAGE_SUFFIXES == FORMATS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_everything_is_read_again(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    save_image(path, IMAGE, PARAMETERS)
    found = read_marks(path)
    assert (found.width, found.height, found.problems) == (40, 24, ())
    assert found.parameters == read_parameters(path) == PARAMETERS
    assert found.xmp.source_type == MADE
    assert found.xmp.pixels == pixels_sha256(IMAGE)
    assert found.fields == {
        "Prompt": PARAMETERS["prompt"],
        "Negative prompt": "",
        "Steps": "1",
        "Sampler": "HiPA one step",
        "CFG scale": "1",
        "Seed": "7",
        "Size": "40x24",
        "Model hash": "0123456789",
        "Model": "my, bundle",
        "Version": "hipa-deploy 0.1.0",
    }
    assert is_image_file(path)
    assert not is_image_file(Path(__file__))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_image_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    path.chmod(0)
    with pytest.raises(HipaError, match=r"x\.png is not readable"):
        is_image_file(path)


def test_an_image_that_is_enormous(tmp_path: Path) -> None:
    """Pillow would speak of an attack, and of a limit that is not ours."""
    path = tmp_path / "x.png"
    Image.new("1", (20_000, 10_000)).save(path)
    words = (
        r"x\.png cannot be read: the image has 200000000 pixels\. Expected 1 to 134217728 pixels"
    )
    with pytest.raises(HipaError, match=words):
        read_marks(path)


@settings(max_examples=30, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_prompt_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, prompt: str
) -> None:
    path = tmp_path_factory.mktemp("prompt") / f"a{suffix}"
    save_image(path, IMAGE, {"prompt": prompt, "seed": 0})
    assert read_parameters(path) == {"prompt": prompt, "seed": 0}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pillow_and_an_xml_parser_see_the_provenance(tmp_path: Path, suffix: str) -> None:
    """Read by hand: Pillow finds the packet, the standard library parses it."""
    path = tmp_path / f"a{suffix}"
    save_image(path, IMAGE, {**PARAMETERS, "task": "edit", "source": "0" * 64})
    with Image.open(path) as image:
        if suffix == ".png":
            packet = image.info["XML:com.adobe.xmp"]
        elif suffix == ".webp":
            packet = image.info["xmp"]
        else:
            (packet,) = [
                content.partition(b"\0")[2]
                for name, content in image.applist
                if name == "APP1" and content.startswith(b"http://ns.adobe.com/xap/1.0/\0")
            ]
    text = packet if isinstance(packet, str) else packet.decode()
    root = ElementTree.fromstring(text.lstrip("\ufeff"))
    found = root.findtext(".//rdf:Description/iptc:DigitalSourceType", namespaces=NAMESPACES)
    assert found == CHANGED


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_the_user_comment_is_as_piexif_writes_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    save_image(path, IMAGE, {"prompt": "äpfel", "seed": 7})
    exif = Image.open(path).info["exif"]
    at = exif.index(struct.pack(">HH", 0x9286, 7))  # type 7: UNDEFINED, else piexif fails
    count, offset = struct.unpack(">LL", exif[at + 4 : at + 12])
    start = exif.index(b"MM\0*")
    comment = exif[start + offset : start + offset + count]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be").startswith("äpfel\nNegative prompt: \nSteps: 1, ")
    assert Image.open(path).getexif().get_ifd(0x8769)[0x9286] == comment


def test_a_png_has_the_text_that_a1111_looks_for() -> None:
    with Image.open(io.BytesIO(png_bytes(IMAGE, {"prompt": "a cat", "seed": 7}))) as image:
        text = image.info["parameters"]
    assert text.startswith("a cat\nNegative prompt: \nSteps: 1, Sampler: HiPA one step, ")


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_equal_input_gives_equal_bytes(format: Any) -> None:
    first = encode_image(IMAGE, PARAMETERS, format)
    assert encode_image(IMAGE.copy(), dict(reversed(PARAMETERS.items())), format) == first


def test_png_and_webp_are_exact_and_quality_is_not() -> None:
    def pixels(content: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content)))

    assert (pixels(encode_image(IMAGE, {}, "png")) == IMAGE).all()
    assert (pixels(encode_image(IMAGE, {}, "webp")) == IMAGE).all()
    small = encode_image(IMAGE, {}, "webp", quality=10)
    assert not (pixels(small) == IMAGE).all()
    assert len(small) < len(encode_image(IMAGE, {}, "webp", quality=95))
    assert len(encode_image(IMAGE, {}, "jpeg", quality=20)) < len(encode_image(IMAGE, {}, "jpeg"))


def test_without_provenance_no_source_type_is_written(tmp_path: Path) -> None:
    for format in ("png", "webp", "jpeg"):
        path = tmp_path / f"a.{format}"
        path.write_bytes(encode_image(IMAGE, PARAMETERS, format, provenance=False))
        found = read_marks(path)
        assert found.xmp.source_type is None
        assert found.parameters == PARAMETERS


@pytest.mark.parametrize(
    ("format", "quality", "message"),
    [("png", 90, "no quality"), ("jpeg", 0, "Expected 1"), ("webp", 101, "Expected 1")],
)
def test_a_quality_that_does_not_fit(format: Any, quality: int, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        encode_image(IMAGE, {}, format, quality=quality)


def test_what_cannot_be_written() -> None:
    with pytest.raises(HipaError, match=r"\.webp"):
        image_format(Path("a.gif"))
    with pytest.raises(HipaError, match="a JPEG holds 65533"):
        encode_image(IMAGE, {"prompt": "x" * 40_000}, "jpeg")
    with pytest.raises(HipaError, match="a WEBP at most 16383"):
        encode_image(np.zeros((1, 16384, 3), np.uint8), {}, "webp")


def test_no_file_is_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    save_image(path, IMAGE, {})
    with pytest.raises(HipaError, match="force=True"):
        save_image(path, IMAGE, {})
    save_image(path, IMAGE, {"seed": 1}, force=True)
    assert read_parameters(path) == {"seed": 1}


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.98])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_file_is_an_error_or_is_read(tmp_path: Path, suffix: str, cut: float) -> None:
    path = tmp_path / f"a{suffix}"
    save_image(path, IMAGE, PARAMETERS)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    said = ""
    try:
        read_marks(path)
    except HipaError as error:
        said = str(error)
    assert not said or str(path) in said


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"<x", "is no XML"),
        (b"\xff\xfe", "is no XML"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "defines entities"),
        (b"<a>" + b"x" * (1 << 20) + b"</a>", "1048583 bytes"),
    ],
)
def test_a_hostile_packet(packet: bytes, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        read_packet(packet)


def test_a_packet_with_attributes_as_other_programs_write_it() -> None:
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'Iptc4xmpExt:DigitalSourceType="{MADE}"/></rdf:RDF></x:xmpmeta>'
    )
    assert read_packet(packet.encode()).source_type == MADE


def test_parameters_that_are_damaged_are_said_to_be(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    for text, problem in (("{", "no JSON object"), ("[1]", "no JSON object")):
        info = PngInfo()
        info.add_itxt("hipa", text)
        Image.fromarray(IMAGE).save(tmp_path / "a.png", pnginfo=info)
        assert problem in read_marks(tmp_path / "a.png").problems[0]
        with pytest.raises(HipaError, match="no generation parameters"):
            read_parameters(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_HWC": Image.fromarray(IMAGE)}, "the image is a Image. Expected uint8"),
        ({"image_HWC": IMAGE[None]}, r"uint8 \[1, 24, 40, 3\]. Expected uint8 \[H, W, 3\]"),
        ({"image_HWC": IMAGE / 255}, "float64"),
        ({"image_HWC": IMAGE[..., 0]}, r"uint8 \[24, 40\]"),
        ({"parameters": ({"seed": 1},)}, "the parameters are"),
        ({"parameters": {"score": np.float32(1)}}, "hold what JSON cannot"),
        ({"format": "jpg"}, "the format is 'jpg'. Expected one of: 'png', 'webp', 'jpeg'"),
        ({"format": "jpeg", "quality": "90"}, "quality is '90'"),
        ({"format": "jpeg", "quality": 90.5}, "quality is 90.5"),
    ],
)
def test_what_is_no_image_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(HipaError, match=message):
        encode_image(**{"image_HWC": IMAGE, "parameters": {}, **given})


def test_a_quality_of_numpy() -> None:
    expected = encode_image(IMAGE, {}, "jpeg", quality=90)
    assert encode_image(IMAGE, {}, "jpeg", quality=np.int64(90)) == expected  # type: ignore[arg-type]
