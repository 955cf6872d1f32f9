"""The commands that make an image from an image: ``hipa-edit``, ``-inpaint``, ``-upscale``."""

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
    PromptWeightsOption,
    SeedOption,
    TruncateOption,
    WidthOption,
    console,
    image_paths,
    note_weights,
    write_images,
)

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.images.source import Source

ImageArgument = Annotated[
    Path, typer.Argument(help="The image file to start from: any size and format Pillow reads.")
]


def edit(
    bundle: BundleArgument,
    image: ImageArgument,
    prompts: PromptsArgument,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of the image may change, above 0 and up to 1. It must be one of the "
            "strengths the bundle was exported for; by default the largest."
        ),
    ] = None,
    out: OutOption = Path("image.png"),
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
) -> None:
    """Edit an image as a prompt says, in one step.

    Needs a bundle for editing, such as hipa-export --adaptor emoji-edit writes. The image is
    cropped at its centre and scaled to the bundle's size.
    """
    from hipa_deploy.images.source import edit_source

    source = edit_source(_open(bundle), image, strength=strength, height=height, width=width)
    _generate_from(
        bundle,
        source,
        prompts,
        out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )


def inpaint(
    bundle: BundleArgument,
    image: ImageArgument,
    mask: Annotated[
        Path,
        typer.Argument(help="An image file of the same size: white is repainted, black is kept."),
    ],
    prompts: PromptsArgument,
    feather: Annotated[
        int,
        typer.Option(
            help="Width in pixels, outside the mask, over which the old image fades into the new."
        ),
    ] = 8,
    out: OutOption = Path("image.png"),
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
) -> None:
    """Repaint a part of an image as a prompt says, in one step.

    Needs a bundle for inpainting, such as hipa-export --adaptor emoji-inpaint writes. The image is
    cropped at its centre and scaled to the bundle's size; then every pixel away from the mask is
    kept exactly.
    """
    from hipa_deploy.images.source import inpaint_source

    source = inpaint_source(_open(bundle), image, mask, feather=feather, height=height, width=width)
    _generate_from(
        bundle,
        source,
        prompts,
        out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )


def upscale(
    bundle: BundleArgument,
    image: ImageArgument,
    prompt: Annotated[str, typer.Argument(help="What the image shows; may be left out.")] = "",
    overlap: Annotated[
        int | None,
        typer.Option(
            help="Large images are enlarged in tiles: how many pixels of the result neighbouring "
            "tiles share; by default an eighth of a tile."
        ),
    ] = None,
    out: OutOption = Path("image.png"),
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
) -> None:
    """Enlarge an image by the factor that the bundle is for, in one step a tile.

    Needs a bundle for upscaling, such as hipa-export --adaptor emoji-upscale writes.
    """
    from hipa_deploy.generate.pipeline import OneStepPipeline
    from hipa_deploy.images.source import upscaling

    # Before engines are loaded: a mistake in the image or the overlap is reported at once.
    paths = image_paths(out, 1, 1, 0)
    upscaling(_open(bundle), image, overlap=overlap)

    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend)
    with pipe:
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
        note_weights(pipe.bundle, [prompt], prompt_weights)
        with console.status("enlarging"):
            result = pipe.upscale(
                image,
                prompt,
                overlap=overlap,
                truncate=truncate,
                prompt_weights=prompt_weights,
            )
        write_images([result], paths)


def _open(bundle: str) -> Bundle:
    """The bundle of a name or path, its manifest read, nothing loaded."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle

    return Bundle.open(resolve_bundle(bundle))


def _generate_from(
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
    prompt_weights: bool | None,
) -> None:
    """Load the bundle, make every image from ``source``, write each."""
    from hipa_deploy.generate.pipeline import OneStepPipeline, check_count

    # Before the bundle is loaded: a mistake is reported at once.
    check_count(len(prompts), count)
    paths = image_paths(out, len(prompts), count, seed)

    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend)
    with pipe:
        if adaptor is not None:
            pipe.swap_adaptor(adaptor)
        note_weights(pipe.bundle, prompts, prompt_weights)
        batches = pipe.stream(
            prompts,
            source=source,
            seed=seed,
            count=count,
            truncate=truncate,
            prompt_weights=prompt_weights,
        )
        write_images(batches, paths)
