"""What an image file takes, in time and bytes: ours beside the library's own settings.

    python benchmarks/image_files.py photo.png drawing.png

Every setting encodes the same pixels in turn, ``ROUNDS`` times in one run. It prints a Markdown
table. The files have no parameters and no provenance: those take the same with every setting.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from typing import Any

from PIL import Image

from hipa_deploy.marks.image_file import JPEG_QUALITY, PNG_LEVEL, WEBP_LOSSLESS

ROUNDS = 15
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG, Pillow's level 6": ("PNG", {}),
    "PNG": ("PNG", {"compress_level": PNG_LEVEL}),
    "WebP lossless, Pillow's method 4": ("WEBP", {"lossless": True, "exact": True}),
    "WebP lossless": ("WEBP", WEBP_LOSSLESS),
    "WebP, quality 80": ("WEBP", {"quality": 80}),
    "JPEG": ("JPEG", {"quality": JPEG_QUALITY, "subsampling": 0}),
}


def encoded(image: Image.Image, format: str, options: dict[str, Any]) -> tuple[float, int]:
    """Milliseconds of one encoding, and its bytes."""
    buffer = io.BytesIO()
    started = time.perf_counter()
    image.save(buffer, format, **options)
    return (time.perf_counter() - started) * 1000, len(buffer.getvalue())


def main(paths: list[str]) -> None:
    print("| image | file | ms, median (min to max) | KB |")
    print("|---|---|---|---|")
    for path in paths:
        image = Image.open(path).convert("RGB")
        times: dict[str, list[float]] = {name: [] for name in SETTINGS}
        sizes: dict[str, int] = {}
        for _ in range(ROUNDS):
            for name, (format, options) in SETTINGS.items():
                took, sizes[name] = encoded(image, format, options)
                times[name].append(took)
        for name, taken in times.items():
            spread = f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})"
            side = f"{image.width}x{image.height}"
            print(f"| {path}, {side} | {name} | {spread} | {sizes[name] / 1000:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Give the images to encode: python benchmarks/image_files.py IMAGE...")
    main(sys.argv[1:])
