"""What happens to every image between the decoder and the user: it is checked, then watermarked.

Shapes: B batch; H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hipa_deploy.errors import HipaError, whole_number
from hipa_deploy.marks.content_credentials import ContentSigner
from hipa_deploy.marks.image_file import ImageFormat, encode_image
from hipa_deploy.marks.records import Marks
from hipa_deploy.marks.safety import Checker, ask_checker
from hipa_deploy.marks.watermark import check_payload, check_side
from hipa_deploy.marks.watermark_reader import mark_readably


@dataclass(frozen=True)
class ImageMarker:
    """The checks and the watermark of a pipeline's images.

    Attributes:
        payload: the watermark's number; None for no watermark.
        checkers: every image is shown to each of them.

    """

    payload: int | None = None
    checkers: tuple[Checker, ...] = ()

    @property
    def facts(self) -> dict[str, str]:
        """Entries for the generation parameters."""
        return {} if self.payload is None else {"watermark": f"{self.payload:08x}"}

    @property
    def does_nothing(self) -> bool:
        """Whether images are left as they are."""
        return self.payload is None and not self.checkers

    def check_size(self, height: int, width: int, argument: str | None = None) -> None:
        """Raise RequestError for a size that is too small for the watermark.

        Args:
            height: in pixels.
            width: in pixels.
            argument: that the size comes from; None: the size itself is asked for.

        """
        if self.payload is not None:
            check_side(height, width, argument)

    def reasons(self, images_BHWC: np.ndarray) -> list[str | None]:
        """For each image why it is withheld; None for those that are not.

        Raises:
            HipaError: a checker fails.

        """
        reasons: list[str | None] = [None] * len(images_BHWC)
        for checker in self.checkers:
            for i, reason in enumerate(ask_checker(checker, images_BHWC)):
                reasons[i] = reasons[i] or reason
        return reasons

    def mark(self, images_BHWC: np.ndarray) -> np.ndarray:
        """The images with the watermark, uint8 [B, H, W, 3]."""
        if self.payload is None or not len(images_BHWC):
            return images_BHWC
        return np.stack([mark_readably(image_HWC, self.payload) for image_HWC in images_BHWC])


def watermark_payload(marks: Marks, unet_sha256: str, asked: bool | int | None) -> int | None:
    """The number of the watermark; None for no watermark.

    Args:
        marks: of the bundle's manifest.
        unet_sha256: of the graph that holds the UNet: it names the model.
        asked: True or False overrules the bundle, a number is used as it is; None is as the
            manifest says.

    Raises:
        HipaError: it is no whole number, or has more than 32 bits.

    """
    if asked is None:
        asked = marks.watermark
    if not isinstance(asked, bool | np.bool_):
        number = whole_number(asked, "watermark")
        check_payload(number)
        return number
    if not asked:
        return None
    if marks.watermark_id:
        return int(marks.watermark_id, 16)
    return int(unet_sha256[:8], 16)


def encode_marked(
    image_HWC: np.ndarray,
    parameters: Mapping[str, Any],
    format: ImageFormat = "png",
    *,
    quality: int | None = None,
    marks: Marks = Marks(),
    signer: ContentSigner | None = None,
) -> bytes:
    """Encode an image as its bundle's owner wants it: parameters, provenance, signature.

    This is the one function that writes a generated image; a service may call it.

    Args:
        image_HWC: uint8 [H, W, 3], from ``GenerateResult.images_BHWC``.
        parameters: of the image, from ``GenerateResult.parameters``.
        format: 'png', 'webp' or 'jpeg'.
        quality: as for ``encode_image``.
        marks: ``pipe.bundle.manifest.marks``.
        signer: signs a C2PA manifest into the file; None leaves it unsigned.

    Raises:
        HipaError: as ``encode_image``; the signature fails; or the owner wants one and there is no
            signer.

    Example:
        >>> content = encode_marked(
        ...     result.images_BHWC[0],
        ...     result.parameters[0],
        ...     "webp",
        ...     marks=pipe.bundle.manifest.marks,
        ... )

    """
    require_signer(marks, signer)
    content = encode_image(
        image_HWC, parameters, format, quality=quality, provenance=marks.provenance
    )
    if signer is None:
        return content
    return signer.sign(content, format, parameters)


def require_signer(marks: Marks, signer: ContentSigner | None) -> None:
    """Raise HipaError where the bundle's owner wants a signature and nobody can sign."""
    if marks.c2pa and signer is None:
        raise HipaError(
            "the bundle's owner wants images with signed content credentials (C2PA), and no key is "
            "given. Give --c2pa FILE, or set HIPA_C2PA."
        )
