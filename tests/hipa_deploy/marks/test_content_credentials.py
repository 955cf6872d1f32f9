"""Signed manifests: written into every format, read back, and broken by any change."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("c2pa")

from cryptography.x509.oid import ExtendedKeyUsageOID

from hipa_deploy.doctor.image_report import examine_image
from hipa_deploy.errors import HipaError
from hipa_deploy.marks.content_credentials import ContentSigner, read_credentials
from hipa_deploy.marks.image_file import encode_image
from hipa_deploy.marks.marker import encode_marked
from hipa_deploy.marks.read_marks import read_marks
from hipa_deploy.marks.records import Marks
from hipa_deploy.marks.xmp import CHANGED, MADE
from tests.certificates import write_chain

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
PARAMETERS: dict[str, Any] = {"prompt": "a", "seed": 1, "producer": "hipa-deploy 0.1.0"}
FORMATS = ("png", "webp", "jpeg")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> ContentSigner:
    return ContentSigner.read(write_chain(tmp_path_factory.mktemp("key") / "c2pa.pem"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_signed_image_is_read_back(tmp_path: Path, signer: ContentSigner, format: Any) -> None:
    content = encode_marked(IMAGE, PARAMETERS, format, signer=signer)
    found = read_credentials(content, format)
    assert found is not None
    assert found.state == "Valid"
    assert found.signer == "Test signer, Test studio"
    assert found.generator == "hipa-deploy 0.1.0"
    assert found.source_type == MADE
    path = tmp_path / f"a.{format}"
    path.write_bytes(content)
    assert read_marks(path).parameters == PARAMETERS
    assert examine_image(path)["content_credentials"].startswith("valid; whether the signer")


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_pixel_breaks_it(tmp_path: Path, signer: ContentSigner, format: Any) -> None:
    content = bytearray(encode_marked(IMAGE, PARAMETERS, format, signer=signer))
    start = {"png": b"IDAT", "webp": b"VP8L", "jpeg": b"\xff\xda"}[format]
    # The last one: a signature, which comes before, can have any two bytes.
    content[content.rindex(start) + 40] ^= 1
    found = read_credentials(bytes(content), format)
    assert found is not None
    assert found.state == "Invalid"
    assert "assertion.dataHash.mismatch" in found.problems


def test_the_doctor_says_that_an_image_was_changed(tmp_path: Path, signer: ContentSigner) -> None:
    content = encode_marked(IMAGE, PARAMETERS, "png", signer=signer)
    path = tmp_path / "a.png"
    assert (np.asarray(Image.open(io.BytesIO(content))) == IMAGE).all()
    # A digit in the XMP packet, with the chunk's checksum mended: no pixel changes.
    text = bytearray(content)
    text[content.rindex(b"</hipa:pixels>") - 1] ^= 1
    start = content.rindex(b"iTXtXML:com.adobe.xmp")
    length = int.from_bytes(content[start - 4 : start], "big")
    end = start + 4 + length
    text[end : end + 4] = zlib.crc32(text[start:end]).to_bytes(4, "big")
    path.write_bytes(text)
    report = examine_image(path)
    assert report["content_credentials"].startswith("INVALID")
    assert "do not hold" in report["problems"][0]


def test_a_phones_photograph_with_a_gain_map(tmp_path: Path, signer: ContentSigner) -> None:
    """Such a JPEG has a second one behind it, and Pillow calls it MPO."""
    buffer = io.BytesIO()
    gain_map = Image.new("L", (32, 32))
    Image.new("RGB", (64, 64)).save(buffer, "MPO", save_all=True, append_images=[gain_map])
    path = tmp_path / "photo.jpg"
    path.write_bytes(buffer.getvalue())
    report = examine_image(path)
    assert (report["format"], report["content_credentials"]) == ("JPEG", "none")
    assert report["problems"] == []
    path.write_bytes(signer.sign(buffer.getvalue(), "jpeg", {}))
    assert examine_image(path)["content_credentials"].startswith("valid")


def test_an_image_without_a_manifest_has_none() -> None:
    assert read_credentials(encode_image(IMAGE, {}, "png"), "png") is None


def test_an_edited_picture_is_said_to_be_one(signer: ContentSigner) -> None:
    content = signer.sign(encode_image(IMAGE, {}, "png"), "png", {"source": "0" * 64})
    found = read_credentials(content, "png")
    assert found is not None
    assert found.source_type == CHANGED


def test_the_owner_can_ask_for_a_signature(signer: ContentSigner) -> None:
    with pytest.raises(HipaError, match="Give --c2pa FILE, or set HIPA_C2PA"):
        encode_marked(IMAGE, PARAMETERS, marks=Marks(c2pa=True))
    assert encode_marked(IMAGE, PARAMETERS, marks=Marks(c2pa=True), signer=signer)


def test_the_key_is_shown_nowhere(signer: ContentSigner) -> None:
    assert "PRIVATE" not in repr(signer)


def test_a_certificate_for_something_else_is_refused(tmp_path: Path) -> None:
    path = write_chain(tmp_path / "tls.pem", purpose=ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(HipaError, match="the certificate is invalid"):
        ContentSigner.read(path)


def test_a_file_that_holds_no_key(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "a.pem").read_text()
    other = write_chain(tmp_path / "b.pem").read_text()
    key, _, certificates = chain.partition("-----BEGIN CERTIFICATE-----")
    cases = {
        "no private key": "-----BEGIN CERTIFICATE-----" + certificates,
        "not the key's": key + other[other.index("-----BEGIN CERT") :],
        "cannot be used to sign": key,
    }
    for message, text in cases.items():
        path = tmp_path / "wrong.pem"
        path.write_text(text)
        with pytest.raises(HipaError, match=message):
            ContentSigner.read(path)
