"""How a command writes its images: quality, marks and signature, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# numpy and Pillow are imported where they are used: --help needs neither.
if TYPE_CHECKING:
    import numpy as np

    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.images.source import Source, Upscaling
    from hipa_deploy.marks.content_credentials import ContentSigner
    from hipa_deploy.marks.records import Marks

# As ``hipa_deploy.marks.image_file.FORMATS``; a test compares the two.
IMAGE_SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


@dataclass(frozen=True)
class FileSettings:
    """How image files are written.

    Attributes:
        quality: 1 to 100; None is lossless WebP, or JPEG of quality 95.
        watermark: None is as the bundle's owner chose.
        marks: of the bundle; None marks as a bundle without wishes.
        signer: signs content credentials into each file.

    """

    quality: int | None = None
    watermark: bool | int | None = None
    marks: Marks | None = None
    signer: ContentSigner | None = None

    def encode(self, path: Path, image_HWC: np.ndarray, parameters: Mapping[str, Any]) -> bytes:
        """The bytes of one image's file, in the format of its suffix."""
        from hipa_deploy.marks.image_file import image_format
        from hipa_deploy.marks.marker import encode_marked
        from hipa_deploy.marks.records import Marks

        return encode_marked(
            image_HWC,
            parameters,
            # A device, such as /dev/stdout, has no suffix.
            image_format(path) if path.suffix else "png",
            quality=self.quality,
            marks=self.marks or Marks(),
            signer=self.signer,
        )


def file_settings(
    bundle: Bundle,
    paths: Sequence[Path],
    *,
    quality: int | None,
    watermark: bool | None,
    c2pa: Path | None,
) -> FileSettings:
    """Check how images shall be written, before anything is loaded.

    Args:
        bundle: its owner's wishes count.
        paths: of the files.
        quality: 1 to 100, or None.
        watermark: None is as the bundle's owner chose.
        c2pa: a file with key and certificates; None signs nothing.

    Raises:
        HipaError: a quality that is out of range or for a PNG; a key that cannot sign; or no key
            where the owner wants signatures.

    """
    from hipa_deploy.marks.content_credentials import ContentSigner
    from hipa_deploy.marks.image_file import check_quality, image_format
    from hipa_deploy.marks.marker import require_signer

    marks = bundle.manifest.marks
    for path in paths[:1]:
        if path.suffix:
            check_quality(image_format(path), quality)
    signer = None if c2pa is None else ContentSigner.read(c2pa)
    require_signer(marks, signer)
    return FileSettings(quality, watermark, marks, signer)


def check_image_size(
    files: FileSettings,
    bundle: Bundle,
    source: Source | Upscaling | tuple[int, int],
    paths: Sequence[Path],
) -> None:
    """Check that images are small enough for their files, and large enough for a watermark.

    Args:
        files: how the files are written.
        bundle: its owner's wishes count.
        source: what the images are made from, or their (height, width).
        paths: of the files.

    Raises:
        HipaError: they are too large for the files' format; or they get a watermark, and are too
            small for it.

    """
    from hipa_deploy.images.source import Upscaling
    from hipa_deploy.marks.image_file import check_side_of_format, image_format
    from hipa_deploy.marks.watermark import check_side

    if isinstance(source, tuple):
        height, width = source
    elif isinstance(source, Upscaling):
        height, width = source.height, source.width
    else:
        height, width = source.image_HWC.shape[:2]
    for path in paths[:1]:
        if path.suffix:
            check_side_of_format(image_format(path), height, width)

    wanted = files.watermark
    if wanted is None:
        wanted = bundle.manifest.marks.watermark
    if wanted is not False:
        check_side(height, width)
