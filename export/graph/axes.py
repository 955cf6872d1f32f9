"""Dynamic shapes: the sizes that a user requests, and the axes that the graphs have for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError

from hipa_deploy.bundle.manifest import MAX_BATCH, Axis, OneStep
from hipa_deploy.errors import HipaError, brief

NAMES = ("batch", "height", "width")
EXAMPLE = "batch=1:1:4,height=384:512:768"


def parse_axes(text: str) -> dict[str, Axis]:
    """The axes in the text of ``--dynamic``, by name; each is min:opt:max, in images or pixels.

    Raises:
        HipaError: the text is not of that form, a name is unknown or repeated, or numbers are out
            of order.

    Example:
        >>> parse_axes("batch=1:1:4,height=384:512:768")["height"]
        Axis(min=384, opt=512, max=768, multiple=1)

    """
    axes: dict[str, Axis] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d{1,9}):(\d{1,9}):(\d{1,9})\s*", part)
        if match is None or match[1] not in NAMES or match[1] in axes:
            raise HipaError(
                f"--dynamic {brief(part)}: expected {', '.join(NAMES)}, each once, as in {EXAMPLE}."
            )
        name = match[1]
        smallest = int(match[2])
        usual = int(match[3])
        largest = int(match[4])
        # A dynamic axis of one size would be slower than a static one, and no more general.
        if smallest == largest:
            raise HipaError(f"--dynamic {part.strip()}: that is one size. Use --{name} {usual}.")
        axes[name] = _axis(name, (smallest, usual, largest), 1)
    if "batch" in axes and axes["batch"].max > MAX_BATCH:
        raise HipaError(
            f"--dynamic batch: {axes['batch'].max} is too many. Expected at most {MAX_BATCH}."
        )
    return axes


def stage_axes(requested: Mapping[str, Axis], step: OneStep, multiple: int) -> dict[str, Axis]:
    """The axes of the graphs: the requested ones, and the latents' beside the pixels'.

    Args:
        requested: axes by name, as ``parse_axes`` gives them.
        step: tells how many pixels a latent has.
        multiple: pixels; heights and widths go in steps of it.

    Raises:
        HipaError: a size is not a multiple.

    """
    factor = step.height // step.latent_shape[1]
    axes = dict(requested)
    for name in ("height", "width"):
        if name not in requested:
            continue
        axis = requested[name]
        axes[name] = _axis(name, (axis.min, axis.opt, axis.max), multiple)
        latent_sizes = (axis.min // factor, axis.opt // factor, axis.max // factor)
        axes[f"latent_{name}"] = _axis(name, latent_sizes, multiple // factor)
    return axes


def _axis(name: str, sizes: tuple[int, int, int], multiple: int) -> Axis:
    """The axis min:opt:max, with an error that names the option."""
    smallest, usual, largest = sizes
    try:
        return Axis(min=smallest, opt=usual, max=largest, multiple=multiple)
    except ValidationError:
        steps = f" in multiples of {multiple}" if multiple > 1 else ""
        raise HipaError(
            f"--dynamic {name}={smallest}:{usual}:{largest}: "
            f"expected min <= opt <= max{steps}, from 1 on."
        ) from None


def example_sizes(axes: Mapping[str, Axis]) -> dict[str, int]:
    """A size of every axis to trace a module with: no two alike, and none the constant 1.

    torch's exporter takes two dimensions of one size for the same dimension, and a size of 1 for a
    constant. Where an axis has no other size left, it gets its usual one.
    """
    sizes: dict[str, int] = {}
    for name, axis in axes.items():
        upwards = range(axis.opt, axis.max + 1, axis.multiple)
        downwards = range(axis.opt, axis.min - 1, -axis.multiple)
        taken = set(sizes.values())
        sizes[name] = axis.opt
        for size in (*upwards, *downwards):
            if size > 1 and size not in taken:
                sizes[name] = size
                break
    return sizes
