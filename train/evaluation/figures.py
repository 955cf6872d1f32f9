"""Pictures of a quality report: spectra, the paper's premise, samples.

Shapes: N images of a set, H, W image size in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hipa_deploy.disk.files import write_file
from hipa_deploy.images.png import grid
from hipa_deploy.train.evaluation.spectrum import mixed, radial_power

SHOWN = 8  # rows of a picture
# Inches of the spectra's figure.
WIDE = (11, 4)
TALL = (2.7, 6.0)


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure without pyplot's global state.

    Args:
        width: In inches.
        height: In inches.
        columns: How many axes lie side by side.
        rows: How many axes lie one under another.

    Returns:
        The figure, and its axes: one object, or an array of them.

    """
    # Imported here: only reports need matplotlib, and it is slow to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG; a write that fails leaves no partial file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getvalue())


def save_picture(path: Path, pixels_HWC: np.ndarray) -> None:
    """Write pixels uint8 [H, W, 3] as PNG, twice as large each way; as safe as ``save_figure``.

    Nearest-neighbour enlarging keeps every pixel as it is: interpolation would add or remove the
    high frequencies that the pictures are about.
    """
    image = Image.fromarray(pixels_HWC)
    size = (2 * image.width, 2 * image.height)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def spectra_figure(
    path: Path, rows: Mapping[str, np.ndarray], truth: str, *, tall: bool = False
) -> None:
    """Draw the radial power of several image sets, and its ratio to one of them.

    Args:
        path: The PNG to write.
        rows: Image sets by name, uint8 [N, H, W, 3].
        truth: Name of the set that the ratios refer to.
        tall: Whether the ratio lies under the power in a narrow picture, rather than beside it.

    """
    power = {name: radial_power(images) for name, images in rows.items()}
    if tall:
        figure, (first, second) = new_figure(*TALL, rows=2)
    else:
        figure, (first, second) = new_figure(*WIDE, columns=2)

    # Power falls over several decades, so the spectra need a logarithmic axis; differences between
    # sets show in the ratio alone.
    for name, values in power.items():
        first.semilogy(values, label=name)
        second.plot(values / power[truth], label=name)

    frequency = "cycles an image side"
    first.set(xlabel=frequency, ylabel="mean power", title="Radial power spectrum")
    second.set(xlabel=frequency, ylabel=f"ratio to: {truth}", title="Ratio", ylim=(0, 2))
    first.legend(fontsize="small")
    save_figure(path, figure)


def premise_picture(one_NHWC: np.ndarray, many_NHWC: np.ndarray, shown: int = SHOWN) -> np.ndarray:
    """The paper's premise in four columns, for the first ``shown`` images of two sets.

    The columns are: one step; many steps; low frequencies of one step with the high ones of many;
    low frequencies of many steps with the high ones of one.

    Args:
        one_NHWC: One-step images, uint8.
        many_NHWC: Many-step images from the same prompts and noise, uint8.
        shown: How many rows the picture has.

    Returns:
        uint8 [H, W, 3] of the whole picture.

    """
    one = one_NHWC[:shown]
    many = many_NHWC[:shown]
    return grid([one, many, mixed(one, many), mixed(many, one)])


def samples_picture(rows: Mapping[str, np.ndarray], shown: int = SHOWN) -> np.ndarray:
    """A column of the first images of each set, in the sets' order.

    Args:
        rows: Image sets by name, uint8 [N, H, W, 3].
        shown: How many images of each.

    Returns:
        uint8 [H, W, 3] of the whole picture.

    """
    return grid([images[:shown] for images in rows.values()])
