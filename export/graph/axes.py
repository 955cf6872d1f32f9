"""Dynamic shapes: what the user asks for, and the axes that each stage has for it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError

from hipa_deploy.bundle.manifest import MAX_BATCH, Axis, OneStep
from hipa_deploy.errors import HipaError

NAMES = ("batch", "height", "width")
EXAMPLE = "batch=1:1:4,height=384:512:768"


def parse_axes(text: str) -> dict[str, Axis]:
    """'batch=1:1:4,height=384:512:768' -> axes by name, min:opt:max.

    Raises:
        HipaError: not of that form, an unknown or repeated name, or numbers out of order.

    """
    axes: dict[str, Axis] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d+):(\d+):(\d+)\s*", part)
        if match is None or match[1] not in NAMES or match[1] in axes:
            raise HipaError(
                f"--dynamic {part!r}: expected {', '.join(NAMES)}, each once, as in {EXAMPLE}."
            )
        smallest, usual, largest = (int(number) for number in match.groups()[1:])
        if smallest == largest:
            raise HipaError(
                f"--dynamic {part.strip()}: that is one size. Use --{match[1]} {usual}."
            )
        axes[match[1]] = _axis(match[1], (smallest, usual, largest), 1)
    if "batch" in axes and axes["batch"].max > MAX_BATCH:
        raise HipaError(
            f"--dynamic batch: {axes['batch'].max} is too many. Expected at most {MAX_BATCH}."
        )
    return axes


def stage_axes(asked: Mapping[str, Axis], step: OneStep, multiple: int) -> dict[str, Axis]:
    """The axes of the graphs: those asked for, in steps of ``multiple`` pixels, and the latents' beside the pixels'.

    Raises:
        HipaError: a size that is not a multiple.

    """
    factor = step.height // step.latent_shape[1]
    axes = dict(asked)
    for name in ("height", "width"):
        if name in asked:
            sizes = asked[name].min, asked[name].opt, asked[name].max
            axes[name] = _axis(name, sizes, multiple)
            low, usual, high = (size // factor for size in sizes)
            axes[f"latent_{name}"] = _axis(name, (low, usual, high), multiple // factor)
    return axes


def _axis(name: str, sizes: tuple[int, int, int], multiple: int) -> Axis:
    smallest, usual, largest = sizes
    try:
        return Axis(min=smallest, opt=usual, max=largest, multiple=multiple)
    except ValidationError:
        steps = f" in multiples of {multiple}" if multiple > 1 else ""
        raise HipaError(
            f"--dynamic {name}={smallest}:{usual}:{largest}: expected min <= opt <= max{steps}, from 1 on."
        ) from None


def example_sizes(axes: Mapping[str, Axis]) -> dict[str, int]:
    """Sizes to trace with, under which no two axes look alike and none looks like the constant 1."""
    sizes: dict[str, int] = {}
    for name, axis in axes.items():
        candidates = (
            range(axis.opt, axis.max + 1, axis.multiple),
            range(axis.opt, axis.min - 1, -axis.multiple),
        )
        free = (size for r in candidates for size in r if size > 1 and size not in sizes.values())
        sizes[name] = next(free, axis.opt)
    return sizes
