"""What the runtime refuses, in the words of the API that was asked.

The runtime speaks of arguments, and to its users of options. A client of the API has fields, and
cannot export anything. So an answer says what is wrong, what was expected and what the client can
do. What only the model's owner could do comes last, and is said to be the owner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hipa_deploy.errors import RequestError
from hipa_deploy.serve.service import Order
from hipa_deploy.serve.web.api_errors import ApiError

_SIDES = ("height", "width")


@dataclass(frozen=True)
class Terms:
    """The words of an API.

    Attributes:
        fields: names of its fields, by the argument of the runtime; the others have its name.
        truncates: whether a request can ask that a prompt that is too long is cut.

    """

    fields: Mapping[str, str]
    truncates: bool = False


_COMMON = {"adaptor": "model", "format": "output_format"}
OWN = Terms(_COMMON, truncates=True)
"""This service's own API."""
OPENAI = Terms({**_COMMON, "height": "size", "width": "size"})
"""OpenAI's API, which has one field for height and width."""


def told(error: RequestError, order: Order, terms: Terms) -> ApiError:
    """The answer to a request that the runtime refuses.

    Args:
        error: why.
        order: what the request asks for.
        terms: the words of its API.

    Example:
        >>> raise told(error, order, OPENAI) from None

    """
    param = _field(error, order, terms)
    sentences = [error.told]
    # Another code says that a size is a bundle's, and no good for another reason.
    if error.argument in _SIDES and error.code == "invalid_value":
        sentences = [_size_words(error.argument, order, param)]
    if error.code == "context_length_exceeded" and terms.truncates:
        # A person at the page reads it too, and has no such field.
        sentences.append(f"A request with {_truncate(order)} has its prompt cut.")
    if error.owner:
        sentences.append(f"The owner of the model can {error.owner}.")
    # Some messages of libraries name a file, which is nobody's business.
    words = " ".join(sentences).replace(str(order.model.served.bundle.root), order.model.name)
    return ApiError(400, words, error.code, param=param)


def _field(error: RequestError, order: Order, terms: Terms) -> str | None:
    """The field that an error is about."""
    argument = error.argument
    if argument is None:
        return None
    # Without a mask of its own, what is transparent in the image is the mask.
    if argument == "mask" and order.mask is None:
        return "image"
    return terms.fields.get(argument, argument)


def _truncate(order: Order) -> str:
    """The field that has a prompt cut, as JSON or a form writes it."""
    return '"truncate": true' if order.image is None else "truncate=true"


def _size_words(side: str, order: Order, param: str | None) -> str:
    """That a model does not make images of a size, and of which it does."""
    bundle = order.model.served.bundle
    step = bundle.manifest.one_step
    name = order.model.name
    height = str(bundle.axes.get("height", step.height))
    width = str(bundle.axes.get("width", step.width))
    if param != "size":
        asked = order.height if side == "height" else order.width
        return (
            f"{side}: {asked} is not a {side} of the model {name}. "
            f"Expected a height of {height} and a width of {width}."
        )
    expected = f"{step.width}x{step.height}"
    if any(side in bundle.axes for side in _SIDES):
        expected = f"WIDTHxHEIGHT with a width of {width} and a height of {height}"
    return (
        f"size: {order.width}x{order.height} is not a size of the model {name}. "
        f"Expected {expected}, or auto."
    )
