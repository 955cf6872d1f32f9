"""Small ICC profiles, written by hand from the specification (ICC.1:2022)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

D50 = (0.9642, 1.0, 0.8249)

# The colorants of red, green and blue (XYZ under D50) in the profiles that are in use.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = (
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
)

# g, a, b, c, d of the parametric curve that sRGB and Display P3 share.
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(*values)


def _gamma(exponent: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IHH", 1, round(exponent * 256), 0)


def _parametric() -> bytes:
    return b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _fixed(*SRGB_CURVE)


def _profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    name = b"test\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(79)
    tags = {b"desc": description, b"wtpt": _xyz(D50), **tags}
    start = 128 + 4 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    body = b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    connection = b"Lab " if b"A2B0" in tags else b"XYZ "
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"none", 0x02400000, kind, space, connection
    )
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(*D50)
    return header.ljust(128, b"\0") + table + body


def rgb_profile(colorants: Sequence[Sequence[float]], exponent: float | None = None) -> bytes:
    """A profile of a matrix; ``exponent`` None is sRGB's curve."""
    curve = _parametric() if exponent is None else _gamma(exponent)
    tags = {}
    for colour, xyz in zip((b"r", b"g", b"b"), colorants, strict=True):
        tags[colour + b"XYZ"] = _xyz(xyz)
        tags[colour + b"TRC"] = curve
    return _profile(b"RGB ", tags)


def grey_profile(exponent: float) -> bytes:
    return _profile(b"GRAY", {b"kTRC": _gamma(exponent)})


def cmyk_profile() -> bytes:
    """Ink makes grey: L* is 100 without ink, 100 / 3 less for each of C, M and Y, and 0 with K."""
    nodes = b""
    for node in range(16):  # C varies slowest
        cyan, magenta, yellow, black = ((node >> bit) & 1 for bit in (3, 2, 1, 0))
        lightness = (1 - black) * (1 - (cyan + magenta + yellow) / 3)
        nodes += bytes([round(255 * lightness), 128, 128])
    identity = bytes(range(256))
    matrix = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + nodes + 3 * identity
    return _profile(b"CMYK", {b"A2B0": table}, kind=b"prtr")
