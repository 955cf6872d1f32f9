"""Content credentials (C2PA): a signed manifest in an image, and its check.

Made and read with c2pa-python, of the Content Authenticity Initiative (extra 'c2pa'). The key and
its certificates come from a file of the user's; no bundle holds them. Nothing is fetched: no time
stamp, no manifest and no list of revoked certificates.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipa_deploy.disk.reading import MIB, read_bytes
from hipa_deploy.errors import HipaError, MissingDependencyError, as_line, first_line
from hipa_deploy.marks.image_file import ImageFormat
from hipa_deploy.marks.xmp import source_type

C2PA_VARIABLE = "HIPA_C2PA"
"""Names the file of key and certificates where no option does."""
MIME: dict[str, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
_REMEDY = (
    "Expected one PEM file with an unencrypted private key, then its certificate, then those of "
    "its issuers."
)
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
# No thumbnail: it would show what was withheld later, and it takes longer than the signature.
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True)
class ContentSigner:
    """Signs images. Any thread may use it.

    Attributes:
        algorithm: 'es256', 'es384', 'es512', 'ps256' or 'ed25519', as the key asks for.
        certificates: PEM, the signer's first.

    """

    algorithm: str
    certificates: str
    _key: str = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> ContentSigner:
        """Read a key and its certificates, and sign once to see that c2pa takes them.

        Args:
            path: a PEM file with the private key and its chain of certificates.

        Raises:
            MissingDependencyError: c2pa-python is not installed.
            HipaError: the file is not such a file, the key is not the certificate's, or C2PA does
                not allow such a certificate: it must be for signing, and not self-signed.

        Example:
            >>> signer = ContentSigner.read("c2pa.pem")
            >>> content = signer.sign(content, "png", result.parameters[0])

        """
        _c2pa()
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        path = Path(path)
        content = read_bytes(path, MIB, _REMEDY)
        with as_line(f"{path} cannot be used to sign images", _REMEDY):
            key = serialization.load_pem_private_key(_private_part(content), None)
            chain = x509.load_pem_x509_certificates(content)
            if key.public_key() != chain[0].public_key():
                raise ValueError("the first certificate is not the key's")
            pem = serialization.Encoding.PEM
            certificates = "".join(one.public_bytes(pem).decode() for one in chain)
            private = key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            signer = cls(_algorithm(key), certificates, private.decode())
        signer._try(path)
        return signer

    @property
    def certificates_sha256(self) -> str:
        """SHA-256 of the chain of certificates: who signs, without the key."""
        return hashlib.sha256(self.certificates.encode()).hexdigest()

    def sign(self, content: bytes, format: ImageFormat, parameters: Mapping[str, Any]) -> bytes:
        """The image file with a signed manifest in it.

        Args:
            content: of the file.
            format: of the file.
            parameters: of the image: its program and whether it was made from a picture.

        Raises:
            HipaError: c2pa refuses the image or the certificate.

        """
        c2pa = _c2pa()
        target = io.BytesIO()
        with as_line("the image cannot be signed", "Check the certificate that --c2pa names."):
            # In bytes, as its C structure holds them.
            certificates = self.certificates.encode()
            info = c2pa.C2paSignerInfo(self.algorithm, certificates, self._key.encode(), None)
            with (
                c2pa.Context.from_dict(_SETTINGS) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(_manifest(parameters, format), context) as builder,
            ):
                builder.sign(signer, MIME[format], io.BytesIO(content), target)
        return target.getvalue()

    def _try(self, path: Path) -> None:
        """Sign a small image: a certificate that C2PA refuses is found before any work."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        try:
            self.sign(buffer.getvalue(), "png", {})
        except HipaError as error:
            raise HipaError(
                f"{path} cannot be used to sign images: {error} C2PA wants a certificate for "
                "digital signatures (emailProtection, documentSigning or C2PA's own purpose) that "
                "another one has issued."
            ) from None


@dataclass(frozen=True)
class ContentCredentials:
    """What the manifest of an image says, and whether it holds.

    Attributes:
        state: 'Invalid' (the image or the manifest was changed), 'Valid' (unchanged since it was
            signed), or 'Trusted' (and the signer is on a list that c2pa was given).
        signer: whom the certificate names; None where it cannot be told.
        generator: the program that wrote the manifest.
        source_type: the address of the digital source type.
        problems: what does not hold, a code of the C2PA specification each.

    """

    state: str
    signer: str | None
    generator: str | None
    source_type: str | None
    problems: tuple[str, ...] = ()


def has_reader() -> bool:
    """Whether c2pa-python is installed."""
    try:
        _c2pa()
    except MissingDependencyError:
        return False
    return True


def read_credentials(content: bytes, format: str) -> ContentCredentials | None:
    """Read and check the C2PA manifest of an image.

    Args:
        content: of the image file.
        format: 'png', 'webp' or 'jpeg'.

    Returns:
        None where the image has no manifest in it.

    Raises:
        MissingDependencyError: c2pa-python is not installed.
        HipaError: the manifest cannot be read.

    """
    c2pa = _c2pa()
    with (
        as_line("the C2PA manifest cannot be read", "It is damaged, or of a newer version."),
        c2pa.Context.from_dict(_SETTINGS) as context,
    ):
        reader = c2pa.Reader.try_create(MIME[format], io.BytesIO(content), context=context)
        if reader is None:
            return None
        with reader:
            state = reader.get_validation_state() or "Invalid"
            report = json.loads(reader.json())
    active = report.get("manifests", {}).get(report.get("active_manifest"), {})
    return ContentCredentials(
        state=state,
        signer=_signer_of(active),
        generator=_generator_of(active),
        source_type=_source_of(active),
        problems=_failures(report),
    )


def _c2pa() -> Any:
    try:
        import c2pa
        import cryptography  # noqa: F401  # of the same extra
    except ImportError:
        raise MissingDependencyError("c2pa-python", "c2pa") from None
    except Exception as error:  # its native library does not load here
        raise HipaError(
            f"c2pa-python does not work here ({first_line(error)}). "
            "Run: pip install --force-reinstall c2pa-python"
        ) from None
    return c2pa


def _private_part(content: bytes) -> bytes:
    """The PEM block of the private key; cryptography reads the first block alone."""
    start = content.find(b"-----BEGIN ")
    while start >= 0:
        line = content[start : content.find(b"\n", start)]
        if b"PRIVATE KEY" in line:
            return content[start:]
        start = content.find(b"-----BEGIN ", start + 1)
    raise ValueError("it holds no private key")


def _algorithm(key: Any) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    raise ValueError("C2PA has no such kind of key: use P-256, P-384, P-521, Ed25519 or RSA")


def _manifest(parameters: Mapping[str, Any], format: str) -> dict[str, Any]:
    program = str(parameters.get("producer", "hipa-deploy"))
    name, _, version = program.partition(" ")
    agent = {"name": name, "version": version} if version else {"name": name}
    action = {
        "action": "c2pa.created",
        "digitalSourceType": source_type(parameters),
        "softwareAgent": agent,
    }
    return {
        "claim_generator_info": [agent],
        "format": MIME[format],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _signer_of(manifest: Mapping[str, Any]) -> str | None:
    info = manifest.get("signature_info") or {}
    names = [info.get("common_name"), info.get("issuer")]
    return ", ".join(str(name) for name in names if name) or None


def _generator_of(manifest: Mapping[str, Any]) -> str | None:
    for info in manifest.get("claim_generator_info") or []:
        return " ".join(str(info[key]) for key in ("name", "version") if info.get(key))
    return None


def _source_of(manifest: Mapping[str, Any]) -> str | None:
    for assertion in manifest.get("assertions") or []:
        if str(assertion.get("label", "")).startswith("c2pa.actions"):
            for action in assertion.get("data", {}).get("actions", []):
                if action.get("digitalSourceType"):
                    return str(action["digitalSourceType"])
    return None


def _failures(report: Mapping[str, Any]) -> tuple[str, ...]:
    """The codes of what failed, of the active manifest, each once."""
    active = (report.get("validation_results") or {}).get("activeManifest") or {}
    codes = [str(failure.get("code")) for failure in active.get("failure") or []]
    return tuple(dict.fromkeys(codes))
