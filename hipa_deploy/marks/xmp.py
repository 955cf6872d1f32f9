"""The XMP packet of an image: where it comes from, in IPTC's words, and its parameters.

``digitalSourceType`` is a property of the IPTC Photo Metadata Standard, its values are IPTC's
NewsCodes (https://cv.iptc.org/newscodes/digitalsourcetype). IPTC's user guide asks programs that
make images with trained models to write ``trainedAlgorithmicMedia``, and
``compositeWithTrainedAlgorithmicMedia`` where a real picture was changed by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from hipa_deploy.errors import HipaError

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE = SOURCE_TYPES + "trainedAlgorithmicMedia"
CHANGED = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
PNG_KEYWORD = "XML:com.adobe.xmp"
JPEG_HEADER = b"http://ns.adobe.com/xap/1.0/\0"

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
# A name, not an address: XMP asks for a namespace of one's own, and nothing is fetched.
_HIPA = "urn:hipa-deploy:1/"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="{rdf}">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{iptc}" xmlns:xmp="{xmp}" xmlns:hipa="{hipa}">
{properties}
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
_MAX_PACKET = 1 << 20


@dataclass(frozen=True)
class Xmp:
    """What an XMP packet says.

    Attributes:
        source_type: the address of an IPTC digital source type; None where it has none.
        software: the program that made the image.
        parameters: this package's generation parameters, where the packet has them.
        pixels: SHA-256 of the pixels before they were encoded (``pixels_sha256``).

    """

    source_type: str | None = None
    software: str | None = None
    parameters: dict[str, Any] | None = None
    pixels: str | None = None

    @property
    def made_by_a_model(self) -> bool:
        """Whether the source type is one of those that this package writes."""
        return self.source_type in (MADE, CHANGED)


def source_type(parameters: Mapping[str, Any]) -> str:
    """The digital source type of an image with these parameters.

    An image that was made from another one counts as a picture that was changed: what the source
    was is not known.
    """
    return CHANGED if "source" in parameters else MADE


def write_packet(
    parameters: Mapping[str, Any],
    *,
    provenance: bool = True,
    with_parameters: bool = False,
    pixels: str | None = None,
) -> bytes:
    """An XMP packet in UTF-8; equal arguments give equal bytes.

    Args:
        parameters: of the image.
        provenance: whether it says that a model made the image.
        with_parameters: whether it holds all parameters, as JSON. A PNG has them in a chunk.
        pixels: the hash of the pixels.

    """
    properties = {"xmp:CreatorTool": str(parameters.get("producer", "hipa-deploy"))}
    if provenance:
        properties["Iptc4xmpExt:DigitalSourceType"] = source_type(parameters)
    if with_parameters:
        # In ASCII: JSON's escapes hold characters that XML has no way to write.
        properties["hipa:parameters"] = json.dumps(parameters, sort_keys=True)
    if pixels:
        properties["hipa:pixels"] = pixels
    lines = [f"<{name}>{escape(value)}</{name}>" for name, value in properties.items()]
    packet = _PACKET.format(rdf=_RDF, iptc=_IPTC, xmp=_XMP, hipa=_HIPA, properties="\n".join(lines))
    return packet.encode()


def read_packet(packet: bytes) -> Xmp:
    """Read a packet that any program wrote, with its properties as elements or attributes.

    Raises:
        HipaError: it is no XML, is enormous, or defines entities, as only an attack does.

    """
    content = packet.rstrip(b"\0")
    problem = None
    if len(content) > _MAX_PACKET:
        problem = f"it has {len(content)} bytes"
    elif b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        problem = "it defines entities"
    else:
        try:
            root = ElementTree.fromstring(content.decode("utf-8-sig").strip())
        except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
            problem = f"it is no XML: {error}"
    if problem:
        raise HipaError(f"the XMP packet cannot be read: {problem}. Expected a packet of XMP.")

    values: dict[str, str] = {}
    for description in root.iter(f"{{{_RDF}}}Description"):
        values |= description.attrib
        for element in description:
            values[element.tag] = element.get(f"{{{_RDF}}}resource") or element.text or ""
    found = values.get(f"{{{_HIPA}}}parameters")
    return Xmp(
        source_type=_text(values.get(f"{{{_IPTC}}}DigitalSourceType")),
        software=_text(values.get(f"{{{_XMP}}}CreatorTool")),
        parameters=_parameters(found) if found else None,
        pixels=_text(values.get(f"{{{_HIPA}}}pixels")),
    )


def _text(value: str | None) -> str | None:
    return value.strip() if value else None


def _parameters(text: str) -> dict[str, Any]:
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise HipaError(
            "the XMP packet's parameters are no JSON object. Expected those of hipa-generate."
        )
    return parameters
