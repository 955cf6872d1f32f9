"""Signatures of bundles and of adaptors to swap in, so that a fleet runs only what its owner made.

The manifest has the hash of every file, so one signature of the manifest speaks for the whole
folder. It is an Ed25519 signature of the manifest's bytes (RFC 8032), in base64, in a file beside
it: ``hipa.json.sig``. OpenSSL makes the keys and can check the signatures too.

Whoever sets ``HIPA_PUBLIC_KEY`` to a public key takes only what is signed with its private key.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError, MissingDependencyError, first_line

TRUSTED = "HIPA_PUBLIC_KEY"
LARGEST_SIGNATURE = 1024  # bytes; an Ed25519 signature is 64, in base64 88
LARGEST_KEY = 64 * 1024


def signature_path(manifest: Path) -> Path:
    """The signature's file, beside the manifest."""
    return manifest.with_name(manifest.name + ".sig")


def sign(manifest: Path, private_key: Path) -> Path:
    """Write the signature of a manifest beside it.

    Args:
        manifest: hipa.json or swap.json.
        private_key: an Ed25519 private key in PEM without a password, as
            ``openssl genpkey -algorithm ed25519`` writes it.

    Returns:
        The signature's file.

    Raises:
        HipaError: the key cannot be read, or is of another kind.
        MissingDependencyError: the package cryptography is not installed.

    Example:
        >>> sign(Path("bundle/hipa.json"), Path("private.pem"))
        PosixPath('bundle/hipa.json.sig')

    """
    key = read_private_key(private_key)
    path = signature_path(manifest)
    path.write_bytes(base64.b64encode(key.sign(manifest.read_bytes())) + b"\n")
    return path


def check_signature(manifest: Path, content: bytes) -> None:
    """Refuse a manifest that the trusted key did not sign; without ``HIPA_PUBLIC_KEY`` do nothing.

    Args:
        manifest: the manifest's file, whose signature is beside it.
        content: what was read of it. It is not read again, so that nobody can change it between.

    Raises:
        HipaError: there is no signature, it is damaged, it is not of this content and key, or the
            key cannot be read.
        MissingDependencyError: the package cryptography is not installed.

    """
    trusted = os.environ.get(TRUSTED)
    if not trusted:
        return
    key = read_public_key(Path(trusted))
    signature = _read_signature(signature_path(manifest))
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, content)
    except InvalidSignature:
        raise HipaError(
            f"{manifest} is not signed with the key of {TRUSTED} ({trusted}), or was changed "
            "since. Expected what the owner of that key signed. Copy it again, or have it signed."
        ) from None


def _read_signature(path: Path) -> bytes:
    """The signature's bytes.

    Raises:
        HipaError: there is none, or it is no base64.

    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_SIGNATURE)
    except OSError as error:
        raise HipaError(
            f"{path} cannot be read: {error.strerror}. {TRUSTED} is set, so only what is signed is "
            "taken. Have it signed (hipa-export --sign), or copy the signature too."
        ) from None
    try:
        return base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise HipaError(f"{path} is no signature. Expected base64. Copy it again.") from None


def read_private_key(path: Path) -> Any:
    """The Ed25519 private key in a PEM file.

    Raises:
        HipaError: it cannot be read, is of another kind, or has a password.
        MissingDependencyError: the package cryptography is not installed.

    """
    return _read_key(path, "private")


def read_public_key(path: Path) -> Any:
    """The Ed25519 public key in a PEM file.

    Raises:
        HipaError: it cannot be read, or is of another kind.
        MissingDependencyError: the package cryptography is not installed.

    """
    return _read_key(path, "public")


def _read_key(path: Path, kind: str) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingDependencyError("cryptography", "sign") from None

    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_KEY)
    except OSError as error:
        raise HipaError(f"{kind} key {path} cannot be read: {error.strerror}.") from None
    expected = f"Expected an Ed25519 {kind} key in PEM without a password."
    key: Any
    try:
        if kind == "private":
            key = serialization.load_pem_private_key(text, password=None)
        else:
            key = serialization.load_pem_public_key(text)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise HipaError(f"{kind} key {path}: {first_line(error)[:80]} {expected}") from None
    wanted = ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey
    if not isinstance(key, wanted):
        raise HipaError(f"{kind} key {path} is a {type(key).__name__}. {expected}")
    return key
