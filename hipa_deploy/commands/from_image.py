"""The commands that make an image from an image: ``hipa-edit``, ``hipa-inpaint``, ``hipa-upscale``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    BundleArgument,
    CountOption,
    HeightOption,
    OutOption,
    PromptsArgument,
    SeedOption,
    TruncateOption,
    WidthOption,
    console,
    image_paths,
    write_images,
)

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.images.source import Source

ImageArgument = Annotated[
    Path, typer.Argument(help="The image: any size and kind that Pillow reads.")
]


def edit(
    bundle: BundleArgument,
    image: ImageArgument,
    prompts: PromptsArgument,
    strength: Annotated[
        float | None,
        typer.Option(help="How much may change, one of the bundle's; its largest by default."),
    ] = None,
    out: OutOption = Path("image.png"),
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
) -> None:
    """Edit an image as a prompt says, in one step; it is cropped and scaled to the bundle's size."""
    from hipa_deploy.images.source import edit_source

    source = edit_source(_open(bundle), image, strength=strength, height=height, width=width)
    _make(
        bundle,
        source,
        prompts,
        out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
    )


def inpaint(
    bundle: BundleArgument,
    image: ImageArgument,
    mask: Annotated[
        Path, typer.Argument(help="An image of the same size: white is repainted, black is kept.")
    ],
    prompts: PromptsArgument,
    feather: Annotated[
        int, typer.Option(help="Pixels outside the mask over which old fades into new.")
    ] = 8,
    out: OutOption = Path("image.png"),
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
) -> None:
    """Repaint a part of an image in one step; the rest of it stays bit for bit, once it has the bundle's size."""
    from hipa_deploy.images.source import inpaint_source

    source = inpaint_source(_open(bundle), image, mask, feather=feather, height=height, width=width)
    _make(
        bundle,
        source,
        prompts,
        out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
    )


def upscale(
    bundle: BundleArgument,
    image: ImageArgument,
    prompt: Annotated[str, typer.Argument(help="What the image shows.")] = "",
    overlap: Annotated[
        int | None, typer.Option(help="Pixels of the result that tiles share; 1/8 of one.")
    ] = None,
    out: OutOption = Path("image.png"),
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
) -> None:
    """Enlarge an image by the bundle's factor, in one step a tile."""
    from hipa_deploy.generate.pipeline import OneStepPipeline
    from hipa_deploy.images.source import upscaling

    paths = image_paths(out, 1, 1, 0)
    upscaling(_open(bundle), image, overlap=overlap)  # before engines are loaded, not after
    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend)
    with pipe:
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
        with console.status("enlarging"):
            made = pipe.upscale(image, prompt, overlap=overlap, truncate=truncate)
        write_images([made], paths)


def _open(bundle: str) -> Bundle:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle

    return Bundle.open(resolve_bundle(bundle))


def _make(
    bundle: str,
    source: Source,
    prompts: list[str],
    out: Path,
    *,
    seed: int,
    count: int,
    adaptor: str | None,
    backend: str,
    truncate: bool,
) -> None:
    """Load, make every image from ``source``, write."""
    from hipa_deploy.generate.pipeline import OneStepPipeline, check_count

    check_count(len(prompts), count)
    paths = image_paths(out, len(prompts), count, seed)
    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend)
    with pipe:
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
        write_images(
            pipe.stream(prompts, source=source, seed=seed, count=count, truncate=truncate), paths
        )
