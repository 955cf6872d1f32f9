"""An order and its outcome as they travel between processes: plain values, no open files.

A refusal travels as a value and not as an exception: Ray wraps exceptions, and counts them as
failures of the replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import IO, Any

from hipa_deploy.errors import RequestError
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.serve.batcher import BackendFailedError, QueueFullError, StoppingError
from hipa_deploy.serve.service import Order, TimeLimitError

_FILES = ("image", "mask")


@dataclass(frozen=True)
class CarriedOrder:
    """An ``Order`` whose model is a name, and whose files are bytes.

    Attributes:
        model: 'BUNDLE' or 'BUNDLE:ADAPTOR'.
        values: the order's other fields.
        files: the uploaded files by the name of their field.

    """

    model: str
    values: dict[str, Any] = field(repr=False)
    files: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Refusal:
    """Why there are no images.

    Attributes:
        kind: 'order' (something is wrong with it), 'not finite' (a network gave NaN), 'failed'
            (a backend or an adaptor), 'full', 'stopping' or 'late'.
        message: for people; of the kinds 'order', 'not finite' and 'failed'.
        retry_after: seconds; of the kind 'full'.
        about: keywords of ``RequestError``; of the kind 'order'.

    """

    kind: str
    message: str = ""
    retry_after: int = 1
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_order(cls, error: RequestError) -> Refusal:
        """The refusal of an order that something is wrong with."""
        about = {name: getattr(error, name) for name in ("argument", "code", "told", "owner")}
        return cls("order", str(error), about=about)

    def error(self) -> Exception:
        """The exception that ``ImageService.deliver`` raises in this case."""
        if self.kind == "order":
            return RequestError(self.message, **self.about)
        if self.kind == "not finite":
            return NotFiniteError(self.message)
        if self.kind == "failed":
            return BackendFailedError(self.message)
        if self.kind == "full":
            return QueueFullError(self.retry_after)
        if self.kind == "stopping":
            return StoppingError()
        return TimeLimitError()


def carried(order: Order) -> CarriedOrder:
    """An order, ready to travel."""
    values = {}
    files = {}
    for one in fields(order):
        value = getattr(order, one.name)
        if one.name in _FILES:
            if value is not None:
                files[one.name] = _content(value)
        elif one.name != "model":
            values[one.name] = value
    return CarriedOrder(order.model.name, values, files)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
