"""PNGs written by hand, with what Pillow does not write: 2, 4 and 16 bits, and transparent keys."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

GREY = 0
COLOUR = 2


def png(colour_type: int, bits: int, size: tuple[int, int], rows: bytes, key: bytes = b"") -> bytes:
    """A PNG of given rows, each with the number of its filter before it.

    Args:
        colour_type: as the header has it.
        bits: of a channel.
        size: width and height.
        rows: not compressed.
        key: content of the chunk tRNS; empty leaves it out.

    """
    body = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0))
    if key:
        body += _chunk(b"tRNS", key)
    body += _chunk(b"IDAT", zlib.compress(rows))
    body += _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def keyed_png(values: np.ndarray, bits: int, key: int | Sequence[int]) -> bytes:
    """A PNG of grey [H, W] or colour [H, W, 3] with a transparent colour.

    Args:
        values: levels of ``bits`` bits.
        bits: 1, 2, 4, 8 or 16.
        key: the transparent level or colour, as the file has it.

    """
    height, width = values.shape[:2]
    channels = values.reshape(height, -1)
    if bits == 16:
        packed = channels.astype(">u2").view(np.uint8)
    else:
        # The bits of each level, the highest first, are packed without regard to bytes.
        shifts = np.arange(bits - 1, -1, -1)
        packed = np.packbits((channels[..., None] >> shifts & 1).reshape(height, -1), axis=-1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), packed], axis=1)
    levels = np.atleast_1d(key).astype(">u2").tobytes()
    colour_type = COLOUR if values.ndim == 3 else GREY
    return png(colour_type, bits, (width, height), rows.tobytes(), levels)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
