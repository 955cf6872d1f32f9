"""The commands that make images from an image: ``hipa-edit``, ``hipa-inpaint`` and so on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hipa_deploy.checker_options import AllowCodeOption, CheckerOption
from hipa_deploy.commands.files.file_settings import (
    FileSettings,
    check_image_size,
    file_settings,
)
from hipa_deploy.commands.make_images import (
    image_outputs,
    load_pipeline,
    make_images,
    note_faster_backend,
    note_syntax,
    write_images,
)
from hipa_deploy.commands.options import (
    AdaptorOption,
    BackendOption,
    BundleArgument,
    C2paOption,
    CacheOption,
    CountOption,
    FileFormat,
    ForceOption,
    FormatOption,
    HeightOption,
    LowMemoryOption,
    OutOption,
    PromptsArgument,
    PromptWeightsOption,
    QualityOption,
    SeedOption,
    TruncateOption,
    VerifyOption,
    WatermarkOption,
    WidthOption,
    console,
)

if TYPE_CHECKING:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.images.source import Source
    from hipa_deploy.marks.safety import Checker

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
    low_memory: LowMemoryOption = False,
    format: FormatOption = None,
    quality: QualityOption = None,
    watermark: WatermarkOption = None,
    c2pa: C2paOption = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    force: ForceOption = False,
) -> None:
    """Edit an image as a prompt says, in one step.

    Needs a bundle for editing, such as hipa-export --adaptor emoji-edit writes. The image is
    cropped at its centre and scaled to the bundle's size.
    """
    from hipa_deploy.images.source import edit_source
    from hipa_deploy.marks.own_checker import chosen_checker

    paths = _outputs(
        bundle,
        out,
        prompts,
        [image],
        count=count,
        seed=seed,
        force=force,
        backend=backend,
        adaptor=adaptor,
        format=format,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )
    opened = _open(bundle)
    files = file_settings(opened, paths, quality=quality, watermark=watermark, c2pa=c2pa)
    source = edit_source(opened, image, strength=strength, height=height, width=width)
    check_image_size(files, opened, source, paths)
    own_checker = chosen_checker(checker, allow_code)
    _generate_from(
        bundle,
        source,
        prompts,
        paths,
        out=out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
        low_memory=low_memory,
        files=files,
        checker=own_checker,
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
    match: Annotated[
        bool,
        typer.Option(
            "--match/--no-match",
            help="Shift the colours of the new part, so that they meet those around it.",
        ),
    ] = True,
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
    low_memory: LowMemoryOption = False,
    format: FormatOption = None,
    quality: QualityOption = None,
    watermark: WatermarkOption = None,
    c2pa: C2paOption = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    force: ForceOption = False,
) -> None:
    """Repaint a part of an image as a prompt says, in one step.

    Needs a bundle for inpainting, such as hipa-export --adaptor emoji-inpaint writes. The image is
    cropped at its centre and scaled to the bundle's size; then every pixel away from the mask is
    kept exactly.
    """
    from hipa_deploy.images.source import inpaint_source
    from hipa_deploy.marks.own_checker import chosen_checker

    paths = _outputs(
        bundle,
        out,
        prompts,
        [image, mask],
        count=count,
        seed=seed,
        force=force,
        backend=backend,
        adaptor=adaptor,
        format=format,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )
    opened = _open(bundle)
    files = file_settings(opened, paths, quality=quality, watermark=watermark, c2pa=c2pa)
    source = inpaint_source(
        opened, image, mask, feather=feather, match=match, height=height, width=width
    )
    check_image_size(files, opened, source, paths)
    own_checker = chosen_checker(checker, allow_code)
    _generate_from(
        bundle,
        source,
        prompts,
        paths,
        out=out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
        low_memory=low_memory,
        files=files,
        checker=own_checker,
        force=force,
    )


def control(
    bundle: BundleArgument,
    image: Annotated[
        Path,
        typer.Argument(
            help="The control image, as the ControlNet was trained to see: edges, depth, a pose."
        ),
    ],
    prompts: PromptsArgument,
    scale: Annotated[
        float,
        typer.Option(help="How strongly the image is followed, 0 to 2; 1 is as trained."),
    ] = 1.0,
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
    low_memory: LowMemoryOption = False,
    format: FormatOption = None,
    quality: QualityOption = None,
    watermark: WatermarkOption = None,
    c2pa: C2paOption = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    force: ForceOption = False,
) -> None:
    """Make an image that follows a control image, in one step.

    Needs a bundle with a ControlNet, such as hipa-export --controlnet FOLDER writes. The control
    image is cropped at its centre and scaled to the bundle's size, and is not changed otherwise.
    """
    from hipa_deploy.images.source import control_source
    from hipa_deploy.marks.own_checker import chosen_checker

    paths = _outputs(
        bundle,
        out,
        prompts,
        [image],
        count=count,
        seed=seed,
        force=force,
        backend=backend,
        adaptor=adaptor,
        format=format,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )
    opened = _open(bundle)
    files = file_settings(opened, paths, quality=quality, watermark=watermark, c2pa=c2pa)
    source = control_source(opened, image, scale=scale, height=height, width=width)
    check_image_size(files, opened, source, paths)
    own_checker = chosen_checker(checker, allow_code)
    _generate_from(
        bundle,
        source,
        prompts,
        paths,
        out=out,
        seed=seed,
        count=count,
        adaptor=adaptor,
        backend=backend,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
        low_memory=low_memory,
        files=files,
        checker=own_checker,
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
    low_memory: LowMemoryOption = False,
    format: FormatOption = None,
    quality: QualityOption = None,
    watermark: WatermarkOption = None,
    c2pa: C2paOption = None,
    checker: CheckerOption = None,
    allow_code: AllowCodeOption = False,
    force: ForceOption = False,
) -> None:
    """Enlarge an image by the factor that the bundle is for, in one step a tile.

    Needs a bundle for upscaling, such as hipa-export --adaptor emoji-upscale writes.
    """
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.request import check_request
    from hipa_deploy.images.source import upscaling
    from hipa_deploy.marks.own_checker import chosen_checker

    # Before engines are loaded: a mistake in the image or the overlap is reported at once.
    inputs = [image, resolve_bundle(bundle)]
    opened = _open_with(bundle, [image])
    paths = image_outputs(out, 1, 1, 0, inputs=inputs, force=force, format=format)
    check_request(
        opened,
        backend,
        [prompt],
        seed=0,
        count=1,
        adaptor=adaptor,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )
    files = file_settings(opened, paths, quality=quality, watermark=watermark, c2pa=c2pa)
    enlargement = upscaling(opened, image, overlap=overlap)
    check_image_size(files, opened, enlargement, paths)
    own_checker = chosen_checker(checker, allow_code)

    with load_pipeline(
        bundle,
        backend,
        adaptor,
        low_memory,
        watermark,
        verify=verify,
        cache=cache,
        checker=own_checker,
    ) as pipe:
        with console.status("enlarging"):
            result = pipe.upscale(
                image,
                prompt,
                overlap=overlap,
                truncate=truncate,
                prompt_weights=prompt_weights,
            )
        note_syntax(pipe.bundle, [prompt], prompt_weights)
        write_images([result], paths, files, out=out, force=force)
        note_faster_backend(pipe, backend)


def _open(bundle: str) -> Bundle:
    """The bundle of a name or path, its manifest read, nothing loaded."""
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.embedded import resolve_bundle

    return Bundle.open(resolve_bundle(bundle))


def _open_with(bundle: str, images: list[Path]) -> Bundle:
    """The bundle, once it is known that it and the images are there.

    What is missing is named before an output that is there already.
    """
    from hipa_deploy.disk.reading import check_regular

    opened = _open(bundle)
    for image in images:
        check_regular(image, "Expected an image file.")
    return opened


def _outputs(
    bundle: str,
    out: Path | None,
    prompts: list[str],
    images: list[Path],
    *,
    count: int,
    seed: int,
    force: bool,
    backend: str,
    adaptor: str | None,
    format: FileFormat | None,
    truncate: bool,
    prompt_weights: bool | None,
) -> list[Path]:
    """Paths of the images to write; checked before the images and the bundle are read."""
    from hipa_deploy.embedded import resolve_bundle
    from hipa_deploy.generate.request import check_count, check_request

    check_count(len(prompts), count)
    inputs = [*images, resolve_bundle(bundle)]
    opened = _open_with(bundle, images)
    paths = image_outputs(out, len(prompts), count, seed, inputs=inputs, force=force, format=format)
    check_request(
        opened,
        backend,
        prompts,
        seed=seed,
        count=count,
        adaptor=adaptor,
        truncate=truncate,
        prompt_weights=prompt_weights,
    )
    return paths


def _generate_from(
    bundle: str,
    source: Source,
    prompts: list[str],
    paths: list[Path],
    *,
    out: Path | None,
    seed: int,
    count: int,
    adaptor: str | None,
    backend: str,
    truncate: bool,
    prompt_weights: bool | None,
    verify: bool,
    cache: bool,
    low_memory: bool,
    files: FileSettings,
    checker: Checker | None,
    force: bool,
) -> None:
    """Make every image from ``source`` and write it."""
    make_images(
        bundle,
        prompts,
        paths,
        out=out,
        adaptor=adaptor,
        backend=backend,
        low_memory=low_memory,
        force=force,
        source=source,
        seed=seed,
        count=count,
        truncate=truncate,
        prompt_weights=prompt_weights,
        verify=verify,
        cache=cache,
        files=files,
        checker=checker,
    )
