"""What several commands share: arguments, options, the console, and writing images."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hipa_deploy.errors import HipaError

if TYPE_CHECKING:
    from hipa_deploy.generate.pipeline import GenerateResult

console = Console(stderr=True)


class Precision(str, Enum):
    """Weights and arithmetic inside the graphs."""

    fp16 = "fp16"
    fp32 = "fp32"


class Layout(str, Enum):
    """onestep: specialised graphs. generic: optimum's inputs and outputs."""

    onestep = "onestep"
    generic = "generic"


class Task(str, Enum):
    """What a bundle makes an image from."""

    generate = "generate"
    edit = "edit"
    inpaint = "inpaint"
    upscale = "upscale"


class EngineBackend(str, Enum):
    """What compiles and runs an engine."""

    rtx = "rtx"
    tensorrt = "tensorrt"


ModelOption = Annotated[
    str,
    typer.Option(
        help="Base model: a diffusers folder, a .safetensors file, a hub id, or 'emoji' (embedded)."
    ),
]


ConfigOption = Annotated[
    str | None,
    typer.Option(
        help="What a .safetensors checkpoint is: sd15 | sd21-base | sd21-v | a diffusers folder like it."
    ),
]

BundleArgument = Annotated[
    str, typer.Argument(help="A bundle folder, or 'emoji' for the embedded one.")
]
PromptsArgument = Annotated[
    list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")
]
BackendOption = Annotated[
    str,
    typer.Option(
        help="auto | onnxruntime | openvino | openvino-bf16 | onnxruntime-cuda | onnxruntime-tensorrt | tensorrt | rtx"
    ),
]
OutOption = Annotated[Path, typer.Option(help="A .png file, or a folder.")]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the first image; the next images take the next seeds.")
]
CountOption = Annotated[int, typer.Option(help="Images a prompt.")]
HeightOption = Annotated[
    int | None, typer.Option(help="Pixels, if the bundle has --dynamic sizes.")
]
WidthOption = Annotated[int | None, typer.Option(help="Pixels, if the bundle has --dynamic sizes.")]
AdaptorOption = Annotated[
    str | None, typer.Option(help="Swap in this one: its name in the bundle, or a folder.")
]
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut a prompt that is too long.")]


def write_images(batches: Iterable[GenerateResult], paths: list[Path]) -> None:
    """Write every image with its recipe as soon as it is made, and print where."""
    from hipa_deploy.images.png import save_png

    left = iter(paths)
    for batch in batches:
        for image_HWC, recipe in zip(batch.images_BHWC, batch.parameters, strict=True):
            path = next(left)
            save_png(path, image_HWC, recipe)
            typer.echo(path)


def image_paths(out: Path, prompts: int, count: int, seed: int) -> list[Path]:
    """One file for one image; otherwise numbered files in a folder."""
    if out.suffix.lower() == ".png" and not out.is_dir():
        if prompts * count > 1:
            raise HipaError(
                f"{out} is one file, {prompts * count} images were asked for. Give --out a folder."
            )
        return [out]
    if out.is_file() or (out.suffix and not out.is_dir()):
        raise HipaError(
            f"{out}: images are written as PNG. Give --out a name that ends in .png, or a folder."
        )
    return [out / f"{p:03d}-seed{seed + i}.png" for p in range(prompts) for i in range(count)]
