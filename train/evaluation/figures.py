"""Pictures of a quality report: spectra, the paper's premise, samples."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hipa_deploy.files import write_file
from hipa_deploy.images.png import grid
from hipa_deploy.train.evaluation.spectrum import mixed, radial_power

SHOWN = 8  # rows of a picture


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure without pyplot's global state, and its axes: one, or an array of ``columns``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save_figure(path: Path, figure: Any) -> None:
    """As PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getvalue())


def save_picture(path: Path, pixels_HWC: np.ndarray) -> None:
    """Uint8 [H, W, 3] as PNG, twice as large, whole or not at all."""
    image = Image.fromarray(pixels_HWC)
    buffer = io.BytesIO()
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def spectra_figure(path: Path, rows: Mapping[str, np.ndarray], truth: str) -> None:
    """Radial power of each uint8 set [N, H, W, 3], and its ratio to the set named ``truth``."""
    power = {name: radial_power(images) for name, images in rows.items()}
    figure, (left, right) = new_figure(11, 4, columns=2)
    for name, values in power.items():
        left.semilogy(values, label=name)
        right.plot(values / power[truth], label=name)
    left.set(xlabel="cycles an image side", ylabel="mean power", title="Radial power spectrum")
    right.set(
        xlabel="cycles an image side", ylabel=f"ratio to: {truth}", title="Ratio", ylim=(0, 2)
    )
    left.legend(fontsize="small")
    save_figure(path, figure)


def premise_picture(one_NHWC: np.ndarray, many_NHWC: np.ndarray, shown: int = SHOWN) -> np.ndarray:
    """Columns: one step; many; low frequencies of one with the high ones of many; the converse. uint8 [H, W, 3]."""
    one, many = one_NHWC[:shown], many_NHWC[:shown]
    return grid([one, many, mixed(one, many), mixed(many, one)])


def samples_picture(rows: Mapping[str, np.ndarray], shown: int = SHOWN) -> np.ndarray:
    """A column of the first images of each uint8 set [N, H, W, 3], in the sets' order: uint8 [H, W, 3]."""
    return grid([images[:shown] for images in rows.values()])
