"""Changes of image files, chunk by chunk with lengths and checksums corrected; of tables; of bytes.

Tables in binary formats have no grammar here: their bytes are changed, numbers among them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Edit = tuple[Any, ...]
Chunks = list[tuple[bytes, bytes]]
NUMBERS = [0, 1, 2, 63, 255, 10_000, 30_000, 65_535, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]
PNG = b"\x89PNG\r\n\x1a\n"
ZEROS = zlib.compress(bytes(64 << 20), 1)
# Chunks that a stranger may add to a PNG.
ADDED = [
    (b"iCCP", b"x\0\0" + ZEROS),
    (b"iCCP", b"x\0\0" + zlib.compress(b"\x7f\xff\xff\xff" + bytes(200))),
    (b"iCCP", b"x\0\0not deflated"),
    (b"zTXt", b"key\0\0" + ZEROS),
    (b"iTXt", b"key\0\1\0\0\0" + ZEROS),
    (b"gAMA", bytes(4)),
    (b"gAMA", b"\xff" * 4),
    (b"gAMA", b"\0"),
    (b"cHRM", bytes(32)),
    (b"cHRM", b"\xff" * 32),
    (b"cHRM", b"\0"),
    (b"sRGB", b""),
    (b"tRNS", b"\xff" * 600),
    (b"PLTE", bytes(7)),
    (b"acTL", b"\xff" * 8),
    (b"IDAT", b""),
    (b"IDAT", ZEROS),
    (b"IEND", b""),
]
TEXTS = [
    "", "\0", "\ud800", '"', '"' * 5000, "," * 5000, "x" * 200_000,
    "\u2028", "\x1b[2J", "a\rb", "\ufeff", "text", "text,text", "(" * 5000,
]  # fmt: skip


def exif(order: str, tag: int, kind: int, count: int, value: int) -> bytes:
    """EXIF data of one entry, in the byte order ``order``."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHII", tag, kind, count, value)
    directory = struct.pack(f"{order}IH", 8, 1) + entry
    return mark + directory + struct.pack(f"{order}I", value)


_EXIF = st.builds(
    exif,
    st.sampled_from("<>"),
    st.sampled_from([0x0112, 0x8769, 0xA005, 0x010E, 0xA001]),
    st.integers(0, 13),
    st.sampled_from(NUMBERS),
    st.sampled_from([1, 6, 8, 9, *NUMBERS]),
)
_PLACE = st.integers(0, 100)
_BYTES = st.binary(min_size=1, max_size=8)


def image_edits(_: Path) -> st.SearchStrategy[Edit]:
    return st.one_of(
        st.tuples(st.just("drop"), _PLACE),
        st.tuples(st.just("twice"), _PLACE),
        st.tuples(st.just("move"), _PLACE, _PLACE),
        st.tuples(st.just("bytes"), _PLACE, st.integers(0, 10**4), _BYTES),
        st.tuples(st.just("size"), st.integers(0, 1), st.sampled_from(NUMBERS)),
        st.tuples(st.just("name"), _PLACE, st.binary(min_size=4, max_size=4)),
        st.tuples(st.just("end"), _PLACE, st.integers(0, 200)),
        st.tuples(st.just("exif"), _EXIF),
        st.tuples(st.just("add"), st.integers(0, len(ADDED) - 1)),
    )


def table_edits(_: Path) -> st.SearchStrategy[Edit]:
    return st.one_of(
        st.tuples(st.just("line"), _PLACE, st.sampled_from(TEXTS)),
        st.tuples(st.just("append"), _PLACE, st.sampled_from(TEXTS)),
        st.tuples(st.just("repeat"), _PLACE, st.sampled_from([3, 40_000])),
        st.tuples(st.just("encode"), st.sampled_from(["utf-16", "utf-32", "cp1252", "utf-8-sig"])),
        st.tuples(st.just("breaks"), st.sampled_from(["\r", "\r\n", "\x0b", "\x85", ""])),
    )


def byte_edits(path: Path) -> st.SearchStrategy[Edit]:
    """Bytes changed, put in or left out, more often near the beginning and the end."""
    size = path.stat().st_size
    places = st.integers(0, 200) | st.integers(0, size) | st.integers(max(0, size - 200), size)
    number = st.sampled_from(NUMBERS).map(lambda value: struct.pack("<Q", value))
    return st.tuples(st.sampled_from(["change", "put in", "leave out"]), places, _BYTES | number)


def apply_image(path: Path, edit: Edit) -> None:
    """Change an image whose format its first bytes tell."""
    content = path.read_bytes()
    split, joined = _FORMATS[content[:4]]
    chunks = split(content)
    _change(chunks, edit, is_png=content.startswith(PNG))
    path.write_bytes(joined(chunks))


def _change(chunks: Chunks, edit: Edit, *, is_png: bool) -> None:
    action, *values = edit
    place = values[0] % len(chunks) if isinstance(values[0], int) else 0
    name, data = chunks[place]
    if action == "drop":
        del chunks[place]
    elif action == "twice":
        chunks.insert(place, chunks[place])
    elif action == "move":
        chunks.insert(values[1] % len(chunks), chunks.pop(place))
    elif action == "bytes":
        start = values[1] % (len(data) + 1)
        chunks[place] = (name, data[:start] + values[2] + data[start + len(values[2]) :])
    elif action == "end":
        chunks[place] = (name, data[: values[1]])
    elif action == "name":
        chunks[place] = (values[1] if is_png else values[1][: len(name)], data)
    elif action == "exif":
        kind, start = (b"eXIf", b"") if is_png else (b"EXIF", b"")
        if chunks[0][0] == b"\xe0":  # JPEG
            kind, start = b"\xe1", b"Exif\0\0"
        chunks.insert(1, (kind, start + values[0]))
    elif action == "size" and is_png:
        at = 4 * values[0]
        name, data = chunks[0]
        chunks[0] = (name, data[:at] + struct.pack(">I", values[1]) + data[at + 4 :])
    elif action == "add" and is_png:
        chunks.insert(1, ADDED[values[0]])


def _split_png(content: bytes) -> Chunks:
    chunks = []
    at = len(PNG)
    while at < len(content):
        length, name = struct.unpack(">I4s", content[at : at + 8])
        chunks.append((name, content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def _joined_png(chunks: Chunks) -> bytes:
    content = PNG
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    return content


def _split_jpeg(content: bytes) -> Chunks:
    """The segments up to the compressed data, which is the last one's rest."""
    chunks = []
    at = 2
    while content[at + 1] != 0xDA:
        (length,) = struct.unpack(">H", content[at + 2 : at + 4])
        chunks.append((content[at + 1 : at + 2], content[at + 4 : at + 2 + length]))
        at += 2 + length
    return [*chunks, (b"\xda", content[at + 2 :])]


def _joined_jpeg(chunks: Chunks) -> bytes:
    content = b"\xff\xd8"
    for name, data in chunks:
        # The compressed data, after its marker, has its own length at its beginning.
        length = b"" if name == b"\xda" else struct.pack(">H", min(len(data) + 2, 65_535))
        content += b"\xff" + name + length + data
    return content


def _split_webp(content: bytes) -> Chunks:
    chunks = []
    at = 12
    while at < len(content):
        name, length = struct.unpack("<4sI", content[at : at + 8])
        chunks.append((name, content[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


def _joined_webp(chunks: Chunks) -> bytes:
    content = b"WEBP"
    for name, data in chunks:
        content += name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(content)) + content


_FORMATS: dict[bytes, tuple[Callable[[bytes], Chunks], Callable[[Chunks], bytes]]] = {
    PNG[:4]: (_split_png, _joined_png),
    b"\xff\xd8\xff\xe0": (_split_jpeg, _joined_jpeg),
    b"RIFF": (_split_webp, _joined_webp),
}


def apply_table(path: Path, edit: Edit) -> None:
    """Change a text, a CSV or a TSV file."""
    action, *values = edit
    content = path.read_bytes()
    text = content.decode("utf-8")
    lines = text.split("\n")
    place = values[0] % len(lines) if isinstance(values[0], int) else 0
    if action == "encode":
        path.write_bytes(f"{text}é".encode(values[0]))
        return
    if action == "breaks":
        lines = [values[0].join(lines)]
    elif action == "line":
        lines[place] = values[1]
    elif action == "append":
        lines[place] += values[1]
    elif action == "repeat":
        lines[place:place] = [lines[place]] * values[1]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def apply_bytes(path: Path, edit: Edit) -> None:
    action, place, value = edit
    content = path.read_bytes()
    kept = content[place:] if action == "put in" else content[place + len(value) :]
    path.write_bytes(content[:place] + (b"" if action == "leave out" else value) + kept)


EDITS: dict[str, Callable[[Path], st.SearchStrategy[Edit]]] = {
    "image": image_edits,
    "table": table_edits,
    "bytes": byte_edits,
}
APPLY: dict[str, Callable[[Path, Edit], None]] = {
    "image": apply_image,
    "table": apply_table,
    "bytes": apply_bytes,
}
