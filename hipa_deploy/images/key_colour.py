"""The transparent colour of a PNG (tRNS), as levels of the decoded pixels."""

from __future__ import annotations

from typing import Any

from PIL import Image

# The highest level of grey in the file, by Pillow's name of how its pixels are stored.
_MOST = {"L;2": 3, "L;4": 15, "L": 255}
_EIGHT_BITS = 255


def decode(image: Image.Image) -> None:
    """Decode an image; a PNG's transparent colour then has 8 bits as its pixels do.

    Pillow scales grey of 2 and 4 bits to 8 and cuts colours of 16 bits, but leaves the transparent
    colour in ``info`` as the file has it. There it is replaced.

    - Of colours of 16 bits Pillow keeps the upper 8. So all colours that share these with the
      transparent one become transparent: the ground surely is, and a neighbour so near to it is
      rare.
    - An image that is decoded already, or a copy of one, keeps a grey as it is, because Pillow no
      longer tells of how many bits that was. Of a colour it keeps one whose levels 8 bits can hold.
    """
    # Pillow forgets how the pixels are stored once it has decoded them.
    tiles = getattr(image, "tile", None)
    stored = tiles[0][3] if tiles else None
    image.load()
    key = image.info.get("transparency")
    if key is None:
        return
    # A copy has no format any more, and other formats have no such depths.
    known = stored if image.format == "PNG" else None
    image.info["transparency"] = _key_of_eight_bits(key, image.mode, known)


def _key_of_eight_bits(key: Any, mode: str, stored: Any) -> Any:
    """The transparent colour in 8 bits; that of a palette, 1 bit or 16-bit grey as it is.

    Args:
        key: as the file has it.
        mode: Pillow's mode of the pixels.
        stored: Pillow's name of how they are stored in the file; None if it is not known.

    """
    if mode == "L" and stored in _MOST:
        most = _MOST[stored]
        # The PNG specification has the lowest bits count: https://www.w3.org/TR/png-3/#11tRNS
        return (key & most) * (_EIGHT_BITS // most)
    if mode != "RGB" or not isinstance(key, tuple):
        return key
    if stored == "RGB":
        return tuple(value & _EIGHT_BITS for value in key)
    if stored == "RGB;16B" or max(key) > _EIGHT_BITS:
        return tuple(value >> 8 for value in key)
    return key
