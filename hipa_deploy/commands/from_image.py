"""The commands that make an image from an image: ``hipa-edit``, ``-inpaint``, ``-upscale``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    BundleArgument,
    CacheOption,
    CountOption,
    ForceOption,
    HeightOption,
    OutOption,
    PromptsArgument,
    PromptWeightsOption,
    SeedOption,
    TruncateOption,
    VerifyOption,
    WidthOption,
    console,
    image_outputs,
    make_images,
    note_faster_backend,
    note_name,
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
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
    verify: VerifyOption = False,
    cache: CacheOption = True,
    force: ForceOption = False,
) -> None:
    """Edit an image as a prompt says, in one step.

    Needs a bundle for editing, such as hipa-export --adaptor emoji-edit writes. The image is
    cropped at its centre and scaled to the bundle's size.
    """
    from hipa_deploy.images.source import edit_source

    paths = _outputs(bundle, out, prompts, count, seed, [image], force, backend, adaptor)
    source = edit_source(_open(bundle), image, strength=strength, height=height, width=width)
    note_name(out, paths)
    _generate_from(
        bundle,
        source,
        prompts,
        paths,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
        force=force,
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
    out: OutOption = None,
    seed: SeedOption = 0,
    count: CountOption = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
    verify: VerifyOption = False,
    cache: CacheOption = True,
    force: ForceOption = False,
) -> None:
    """Repaint a part of an image as a prompt says, in one step.

    Needs a bundle for inpainting, such as hipa-export --adaptor emoji-inpaint writes. The image is
    cropped at its centre and scaled to the bundle's size; then every pixel away from the mask is
    kept exactly.
    """
    from hipa_deploy.images.source import inpaint_source

    paths = _outputs(bundle, out, prompts, count, seed, [image, mask], force, backend, adaptor)
    source = inpaint_source(_open(bundle), image, mask, feather=feather, height=height, width=width)
    note_name(out, paths)
    _generate_from(
        bundle,
        source,
        prompts,
        paths,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
        force=force,
    )


def upscale(
    bundle: BundleArgument,
    image: ImageArgument,
    prompt: Annotated[str, typer.Argument(help="What the image shows; may be left out.")] = "",
    overlap: Annotated[
        int | None,
        typer.Option(
            help="Large images are enlarged in tiles: how many pixels of the result neighbouring "
            "tiles share, at most half a tile; by default an eighth."
        ),
    ] = None,
    out: OutOption = None,
    adaptor: AdaptorOption = None,
    backend: BackendOption = "auto",
    truncate: TruncateOption = False,
    prompt_weights: PromptWeightsOption = None,
    verify: VerifyOption = False,
    cache: CacheOption = True,
    force: ForceOption = False,
) -> None:
    """Enlarge an image by the factor that the bundle is for, in one step a tile.

    Needs a bundle for upscaling, such as hipa-export --adaptor emoji-upscale writes.
    """
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.pipeline import OneStepPipeline
    from hipa_deploy.generate.request import check_request
    from hipa_deploy.images.source import upscaling

    # Before engines are loaded: a mistake in the image or the overlap is reported at once.
    inputs = [image, resolve_bundle(bundle)]
    paths = image_outputs(out, 1, 1, 0, inputs=inputs, force=force)
    opened = _open(bundle)
    check_request(opened, backend, [prompt], seed=0, count=1, adaptor=adaptor)
    upscaling(opened, image, overlap=overlap)
    note_name(out, paths)

    with console.status("loading"):
        pipe = OneStepPipeline.load(bundle, backend, verify=verify, cache=cache)
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
        write_images([result], paths, force=force)
        note_faster_backend(pipe, backend)


def _open(bundle: str) -> Bundle:
    """The bundle of a name or path, its manifest read, nothing loaded."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle

    return Bundle.open(resolve_bundle(bundle))


def _outputs(
    bundle: str,
    out: Path | None,
    prompts: list[str],
    count: int,
    seed: int,
    images: list[Path],
    force: bool,
    backend: str,
    adaptor: str | None,
) -> list[Path]:
    """Paths of the images to write; checked before the images and the bundle are read."""
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.request import check_count, check_request

    check_count(len(prompts), count)
    inputs = [*images, resolve_bundle(bundle)]
    paths = image_outputs(out, len(prompts), count, seed, inputs=inputs, force=force)
    check_request(_open(bundle), backend, prompts, seed=seed, count=count, adaptor=adaptor)
    return paths


def _generate_from(
    bundle: str,
    source: Source,
    prompts: list[str],
    paths: list[Path],
    *,
    seed: int,
    count: int,
    adaptor: str | None,
    backend: str,
    truncate: bool,
    prompt_weights: bool | None,
    verify: bool,
    cache: bool,
    force: bool,
) -> None:
    """Make every image from ``source`` and write it."""
    make_images(
        bundle,
        prompts,
        paths,
        adaptor=adaptor,
        backend=backend,
        force=force,
        source=source,
        seed=seed,
        count=count,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
    )
