"""A bundle's signature: made and checked as RFC 8032 and OpenSSL do."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.signature import (
    TRUSTED,
    check_signature,
    read_private_key,
    sign,
    signature_path,
)
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from tests.keys import write_private, write_public

# RFC 8032, section 7.1, TEST 3: private key, message, signature.
RFC_KEY = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
RFC_MESSAGE = bytes.fromhex("af82")
RFC_SIGNATURE = bytes.fromhex(
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private key, whose public key is trusted."""
    made = ed25519.Ed25519PrivateKey.generate()
    monkeypatch.setenv(TRUSTED, str(write_public(tmp_path / "public.pem", made)))
    return write_private(tmp_path / "private.pem", made)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "hipa.json"
    path.write_text('{"schema_version": 1}\n')
    return path


def test_the_signature_is_the_one_of_rfc_8032(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.from_private_bytes(RFC_KEY)
    message = tmp_path / "hipa.json"
    message.write_bytes(RFC_MESSAGE)
    path = sign(message, write_private(tmp_path / "k.pem", key))
    assert base64.b64decode(path.read_bytes()) == RFC_SIGNATURE


@pytest.mark.skipif(shutil.which("openssl") is None, reason="OpenSSL is not installed")
def test_openssl_makes_the_keys_and_checks_the_signature(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def openssl(*arguments: str) -> str:
        return subprocess.run(
            ["openssl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "k.pem")
    openssl("pkey", "-in", "k.pem", "-pubout", "-out", "p.pem")
    signature = base64.b64decode(sign(manifest, tmp_path / "k.pem").read_bytes())
    (tmp_path / "raw").write_bytes(signature)
    verify = ("pkeyutl", "-verify", "-pubin", "-inkey", "p.pem", "-rawin", "-in", "hipa.json")
    assert "Verified Successfully" in openssl(*verify, "-sigfile", "raw")

    monkeypatch.setenv(TRUSTED, str(tmp_path / "p.pem"))
    check_signature(manifest, manifest.read_bytes())


def test_without_a_trusted_key_nothing_is_asked(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRUSTED, raising=False)
    check_signature(manifest, b"anything")


def test_what_was_changed_since_is_refused(manifest: Path, key: Path) -> None:
    sign(manifest, key)
    check_signature(manifest, manifest.read_bytes())
    with pytest.raises(HipaError, match=r"was changed since"):
        check_signature(manifest, manifest.read_bytes() + b" ")


def test_another_owners_signature_is_refused(manifest: Path, key: Path, tmp_path: Path) -> None:
    other = write_private(tmp_path / "other.pem", ed25519.Ed25519PrivateKey.generate())
    sign(manifest, other)
    with pytest.raises(HipaError, match="not signed with the key of HIPA_PUBLIC_KEY"):
        check_signature(manifest, manifest.read_bytes())


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file.*only what is signed is taken"),
        (b"not base64!", "is no signature"),
        (base64.b64encode(b"short"), "is not signed with"),
        (b"", "is not signed with"),
    ],
)
def test_no_signature_and_a_damaged_one(
    content: bytes | None, message: str, manifest: Path
) -> None:
    if content is not None:
        signature_path(manifest).write_bytes(content)
    with pytest.raises(HipaError, match=message):
        check_signature(manifest, manifest.read_bytes())


def test_a_key_of_another_kind(tmp_path: Path, manifest: Path, key: Path) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(HipaError, match=r"ECPrivateKey. Expected an Ed25519 private key"):
        sign(manifest, write_private(tmp_path / "ec.pem", curve))
    made = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(HipaError, match="without a password"):
        sign(manifest, write_private(tmp_path / "locked.pem", made, b"secret"))
    with pytest.raises(HipaError, match="Expected an Ed25519 private key"):
        sign(manifest, tmp_path / "public.pem")
    with pytest.raises(HipaError, match=r"none.pem cannot be read: No such file"):
        read_private_key(tmp_path / "none.pem")
    assert not signature_path(manifest).exists()


def test_a_trusted_key_that_cannot_be_read_lets_nothing_pass(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUSTED, str(tmp_path / "gone.pem"))
    with pytest.raises(HipaError, match=r"public key .*gone.pem cannot be read"):
        check_signature(manifest, manifest.read_bytes())


def test_a_fleet_takes_only_its_owners_bundles(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signed bundle opens; an unsigned one, and one whose manifest has another hash, do not."""
    root = tmp_path / "bundle"
    shutil.copytree(BUNDLE, root, ignore=shutil.ignore_patterns("engines"))
    with pytest.raises(HipaError, match=r"hipa.json.sig cannot be read"):
        Bundle.open(root)
    sign(root / "hipa.json", key)
    Bundle.open(root).verify()

    # Whoever changes weights has to change the hash in the manifest too, and has no key.
    decoder = root / "vae_decoder/model.onnx"
    old = file_sha256(decoder)
    content = bytearray(decoder.read_bytes())
    content[-1] ^= 1
    decoder.write_bytes(content)
    with pytest.raises(HipaError, match="corrupt"):
        Bundle.open(root).verify()
    text = (root / "hipa.json").read_text()
    (root / "hipa.json").write_text(text.replace(old, file_sha256(decoder)))
    with pytest.raises(HipaError, match="was changed since"):
        Bundle.open(root)
    monkeypatch.delenv(TRUSTED)
    Bundle.open(root).verify()
