"""Key files in PEM."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization


def write_private(path: Path, key: object, password: bytes | None = None) -> Path:
    protection: object = serialization.NoEncryption()
    if password is not None:
        protection = serialization.BestAvailableEncryption(password)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    )
    return path


def write_public(path: Path, key: object) -> Path:
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path
