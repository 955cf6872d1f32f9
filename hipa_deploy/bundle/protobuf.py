"""Just enough of protobuf to walk an ONNX file without the onnx package.

A message is tagged fields, and a field that nobody asks for is skipped. How fields are stored:
protobuf.dev/programming-guides/encoding. The file may come from a stranger, so every length is
checked against the message that it lies in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Wire types: how a field is stored.
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_LARGEST_VARINT = 10  # bytes, of 64 bits
_TAG_BITS = 0xFFFFFFFF  # protobuf reads tags as 32 bits, and so do the libraries that load the file

Span = tuple[int, int]  # start and end in the file


def spans(data: Any, span: Span, wanted: int) -> list[Span]:
    """Where the messages lie that field ``wanted`` of the message at ``span`` holds."""
    found = []
    for field, value in fields(data, span):
        if field == wanted:
            found.append(as_span(value))
    return found


def fields(data: Any, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Fields of a message as (number, value): an integer, or the span of a length-delimited one.

    Raises:
        ValueError: the message is cut short, or is no protobuf.

    """
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        number = (tag & _TAG_BITS) >> 3
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value
        elif kind == _BYTES:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise ValueError("truncated")
            yield number, (at, at + size)
            at += size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
    if at != end:
        raise ValueError("truncated")


def _varint(data: Any, at: int, end: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where the next field begins."""
    value = 0
    for index in range(_LARGEST_VARINT):
        if at + index >= end:
            raise ValueError("truncated")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("an integer of more than 64 bits")


def integers(data: Any, value: int | Span) -> list[int]:
    """Repeated integers, one a field or packed into one field."""
    if isinstance(value, int):
        return [value]
    at, end = value
    numbers = []
    while at < end:
        number, at = _varint(data, at, end)
        numbers.append(number)
    return numbers


def as_span(value: int | Span) -> Span:
    """The span of a message's or a text's field.

    Raises:
        ValueError: the field holds a number.

    """
    if isinstance(value, int):
        raise ValueError("a number in place of a message")
    return value


def text(data: Any, value: int | Span) -> str:
    """The text of a field.

    Raises:
        ValueError: it is not UTF-8.

    """
    start, end = as_span(value)
    return bytes(data[start:end]).decode()


def delimited(number: int, content: bytes) -> bytes:
    """Field ``number`` with a message or a text in it, as it is stored."""
    return varint(number << 3 | _BYTES) + varint(len(content)) + content


def integer(number: int, value: int) -> bytes:
    """Field ``number`` with an integer of 0 or more in it, as it is stored."""
    return varint(number << 3 | _VARINT) + varint(value)


def varint(value: int) -> bytes:
    """An integer of 0 or more, seven bits a byte, the lowest first."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
